"""A client of OpenAI-compatible servers that costs next to nothing: raw HTTP/1.1 on kept connections, one event loop.

Knows addresses, keys, connections and time limits. What an answer holds is read by executor.bench.stream.
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from executor.bench.stream import ChatStream
from executor.errors import UserError, printable, shortened

REDIRECTS = range(301, 309)
BUSY = (408, 429)  # of the refusals, those that a server makes for itself
CHAT, MODELS, METRICS, HEALTH = "/v1/chat/completions", "/v1/models", "/metrics", "/health"
KEPT_BYTES = 1 << 16  # of an answer that tells a mistake


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and the key that it wants."""

    host: str
    port: int
    path: str = ""  # before /v1
    api_key: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    def at(cls, base_url: str, api_key: str | None = None, certificate: str | None = None) -> "Endpoint":
        """`base_url`: http://HOST:PORT, with a path or a /v1 behind it or not. `certificate`: the only one that https
        trusts, whatever name stands in it. UserError for another form."""
        try:
            parts = urlsplit(base_url.strip())
            port = parts.port
            (parts.hostname or "").encode("idna")
            is_whole = _is_one_word(parts.path) and port != 0
        except ValueError:
            parts, port, is_whole = urlsplit(""), None, False
        if parts.scheme not in ("http", "https") or not (parts.hostname and is_whole) or parts.query or parts.username:
            raise UserError(
                f"bench_config.base_url: got {printable(base_url)!r}; write http://HOST:PORT or https://HOST:PORT"
            )
        tls = None
        if parts.scheme == "https":
            tls = ssl.create_default_context(cafile=certificate)
            tls.check_hostname = certificate is None
        path = parts.path.rstrip("/").removesuffix(CHAT).removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), path, api_key, tls)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"

    def head(self, method: str, path: str, num_bytes: int) -> bytes:
        """The head of a request."""
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {self.url.partition('//')[2].partition('/')[0]}",
            "Accept: */*",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {num_bytes}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass(frozen=True)
class Reply:
    """One streamed chat as the client saw it. Times are those of time.perf_counter().

    `piece_times_s`: when each piece of the answer came; `ended_s`: when its last word came, or it failed.
    """

    sent_s: float
    ended_s: float
    piece_times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    has_usage: bool = False  # the server told the counts; else pieces are counted, and prompts not
    error: str | None = None
    is_mistake: bool = False  # the request is at fault: it could not be made, or was refused for what it is
    is_sent: bool = True


class Client:
    """Requests to one server on as many connections as are under way at once. To be used in one event loop."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.endpoint, self.timeout_s = endpoint, timeout_s
        self._chat_head = endpoint.head("POST", CHAT, 0).partition(b"Content-Length:")[0]
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises OSError where there is no such answer, TimeoutError after `timeout_s`."""
        content = bytearray()
        async with asyncio.timeout(self.timeout_s):
            head = self.endpoint.head("GET", path, 0)
            status = await self._exchange(head, b"", lambda status, data, now_s: content.extend(data))
        return status, bytes(content)

    async def chat(self, body: bytes, into: ChatStream | None = None) -> Reply:
        """One streamed chat completion; `body` is its JSON. What goes wrong is told in `error`.

        `into`: where the stream goes as it comes, for who looks on meanwhile.
        """
        stream, refusal = into or ChatStream(), bytearray()

        def read(status: int, data: bytes, now_s: float) -> None:
            if status == 200:
                stream.feed(data, now_s)
            elif len(refusal) < KEPT_BYTES:
                refusal.extend(data)

        head = self._chat_head + f"Content-Length: {len(body)}\r\n\r\n".encode()
        sent_s = time.perf_counter()
        error, is_mistake = None, False
        try:
            async with asyncio.timeout(self.timeout_s):
                status = await self._exchange(head, body, read)
            error = stream.fault() if status == 200 else f"HTTP {status}: {words_of(bytes(refusal))}"
            is_mistake = 300 <= status < 500 and status not in BUSY
        except TimeoutError:
            error = f"no whole answer within {self.timeout_s:g} s"
        except OSError as fault:
            error = reason_of(fault)
        ended_s = time.perf_counter() if error is not None else stream.ended_s
        return Reply(
            sent_s,
            ended_s,
            tuple(stream.piece_times_s),
            stream.prompt_tokens,
            stream.output_tokens if stream.has_usage else len(stream.piece_times_s),
            stream.cached_tokens,
            stream.has_usage,
            error,
            is_mistake,
        )

    async def _exchange(self, head: bytes, body: bytes, on_body: Callable[[int, bytes, float], None]) -> int:
        """Send a request and hand its answer's body to `on_body` with the status, piece by piece; returns the status.

        Raises OSError where the server is not there, or the answer breaks off.
        """
        while True:
            connection, is_used = await self._connection()
            try:
                status = await connection.exchange(head, body, on_body)
            except _Unanswered:
                if not is_used:
                    raise
                continue  # the server closed a kept connection before it saw the request
            finally:
                if connection.is_free:
                    self._idle.append(connection)
                else:
                    connection.transport.abort()
            return status

    async def _connection(self) -> tuple["_Connection", bool]:
        """A connection, and whether it has been used before."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection, True
        endpoint = self.endpoint
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, endpoint.host, endpoint.port, ssl=endpoint.tls)
        return connection, False

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.abort()
        self._idle.clear()


class _Unanswered(ConnectionError):
    """The connection was closed before a byte of the answer."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. `is_free`: the next one may come."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.is_free = False
        self._parser: Any = None
        self._done: asyncio.Future[int] | None = None
        self._on_body: Callable[[int, bytes, float], None] | None = None
        self._status = 0
        self._location = b""
        self._now_s = 0.0
        self._ends_with_connection = True

    async def exchange(self, head: bytes, body: bytes, on_body: Callable[[int, bytes, float], None]) -> int:
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._on_body, self._status, self._ends_with_connection, self.is_free = on_body, 0, True, False
        self.transport.writelines((head, body))
        try:
            return await self._done
        finally:
            self._done = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the server's answer is no HTTP ({error})"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._status:
            self._fail(_Unanswered(str(error or "the server closed the connection without an answer")))
        elif self._ends_with_connection and error is None:
            self._finish()
        else:
            self._fail(ConnectionError("the connection was lost in the middle of the answer"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"location":
            self._location = value
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # lesser ones come before the answer
            self._status = status
        if status in REDIRECTS and self._on_body is not None:
            self._on_body(status, b"it lies at " + self._location + b" ", self._now_s)

    def on_body(self, data: bytes) -> None:
        if self._on_body is not None:
            self._on_body(self._status, data, self._now_s)

    def on_message_complete(self) -> None:
        if not self._status:
            return
        self.is_free = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._status)
        self._on_body = None

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self._on_body = None


def _is_one_word(text: str) -> bool:
    """Whether it can stand in the head of a request."""
    return text.isascii() and text.isprintable() and " " not in text


def words_of(content: bytes) -> str:
    """What a refusal says: the message of OpenAI's form of errors, else its text."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = None
    if isinstance(tree, Mapping):
        told = tree.get("error", tree.get("detail", tree.get("message")))
        message = told.get("message") if isinstance(told, Mapping) else told
        if isinstance(message, str):
            return shortened(message)
    return shortened(content.decode(errors="replace")) or "no words"


def reason_of(error: OSError) -> str:
    """Why no connection could be had, in one line that is the same for equal reasons."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}"
    if (error.errno or 0) > 0:  # asyncio's own text names address and port, another one for each try
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__
