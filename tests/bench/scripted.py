"""A server of streamed chats that answers by a script: which events, after which waits, or which refusal."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "scripted"


@dataclass
class Answer:
    """One answer: `pieces` as (wait in s, text) of the stream, or a refusal by `status` and `content`.

    `cut`: into how many writes each event is cut. `breaks_after`: the connection is closed before
    this piece.
    """

    pieces: Sequence[tuple[float, str]] = ()
    status: int = 200
    content: bytes = b""
    prompt_tokens: int = 7
    tokens: int | None = None  # None: one a piece
    has_usage: bool = True
    cut: int = 1
    breaks_after: int | None = None
    tail: bytes = b"data: [DONE]\n\n"


@dataclass
class Asked:
    """A request as the server got it, and when each piece of its answer was sent (time.perf_counter())."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int
    sent_s: list[float] = field(default_factory=list)


class Scripted:
    """`script` gives the answer of each chat by its number and body."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Answer], key: str | None = None) -> None:
        self.script, self.key = script, key
        self.asked: list[Asked] = []
        self.metrics: Callable[[], bytes] | None = None
        self.models: tuple[str, ...] = (MODEL,)
        self.num_connections = self.under_way = self.most_under_way = 0
        self.closes_after_each = False  # a kept connection is closed without a word
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def listening(self):
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()

    @contextmanager
    def in_thread(self) -> Iterator["Scripted"]:
        """For commands that have an event loop of their own."""
        loop, ready, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

        async def main() -> None:
            async with self.listening():
                ready.set()
                await over.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()
            loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        number = self.num_connections
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(head[0].split()[1], headers, json.loads(body) if body else {}, number)
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    await self._answer(asked, writer)
                finally:
                    self.under_way -= 1
                if self.closes_after_each:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if self.key is not None and asked.headers.get("authorization") != f"bearer {self.key}".lower():
            _whole(writer, 401, b'{"error": {"message": "the API key is wrong"}}')
        elif asked.path == "/v1/models":
            _whole(writer, 200, json.dumps({"data": [{"id": name} for name in self.models]}).encode())
        elif asked.path == "/metrics" and self.metrics is not None:
            _whole(writer, 200, self.metrics())
        elif asked.path == "/v1/chat/completions":
            self.asked.append(asked)
            answer = self.script(len(self.asked) - 1, asked.body)
            if answer.status == 200:
                await self._stream(asked, answer, writer)
            else:
                _whole(writer, answer.status, answer.content)
        else:
            _whole(writer, 404, b"not found")
        await writer.drain()

    async def _stream(self, asked: Asked, answer: Answer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for place, (wait_s, text) in enumerate(answer.pieces):
            if place == answer.breaks_after:
                writer.transport.abort()
                return
            await asyncio.sleep(wait_s)
            is_last = place == len(answer.pieces) - 1
            delta = {"role": "assistant", "content": text} if place == 0 else {"content": text}
            choice = {"index": 0, "delta": delta, "finish_reason": "length" if is_last else None}
            asked.sent_s.append(time.perf_counter())
            await _event(writer, {"choices": [choice]}, answer.cut)
        if answer.has_usage:
            tokens = len(answer.pieces) if answer.tokens is None else answer.tokens
            usage = {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": 2},
            }
            await _event(writer, {"choices": [], "usage": usage}, answer.cut)
        _chunk(writer, answer.tail)
        writer.write(b"0\r\n\r\n")


def even(num_pieces: int, ttft_s: float = 0.0, gap_s: float = 0.0, **more: Any) -> Answer:
    """Pieces at even distances."""
    return Answer([(gap_s if place else ttft_s, f"w{place} ") for place in range(num_pieces)], **more)


def _whole(writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)


async def _event(writer: asyncio.StreamWriter, tree: dict[str, Any], cut: int) -> None:
    data = f"data: {json.dumps(tree)}\n\n".encode()
    size = -(-len(data) // cut)
    for start in range(0, len(data), size):
        _chunk(writer, data[start : start + size])
        if cut > 1:
            await writer.drain()
            await asyncio.sleep(0)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
