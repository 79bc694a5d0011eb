"""What a token costs between engine and socket: the serving process's CPU time for each chunk of many streams.

`python -m tests.benchmarks.stream_overhead --streams 64 --tokens 400` gives one JSON line. The engine is left out: a
backend gives all streams a token at a time, as a step does, and waits until the event loop has written them. The
clients are another process, which only reads.
"""

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import pstats
import socket
import sys
import time
from types import SimpleNamespace


from executor.prompt.chat import Chat
from executor.recipe.schema import build_recipe
from executor.serve.app import build_app
from executor.serve.asks import Ask, Delta, Done, EngineStats
from executor.serve.feed import Crossing, Feed
from executor.serve.server import Server, config_of, listen
from executor.serve.service import Service

MODEL = "models/tiny/qwen3_vl"
BODY = {"messages": [{"role": "user", "content": "What is a square?"}], "stream": True, "max_tokens": 100}


class SteppedBackend:
    """Gives every request a token in each step, once `num_streams` are there."""

    fault = None
    num_unfinished = 0
    stats = EngineStats()

    def __init__(self, num_streams: int, num_tokens: int) -> None:
        self.num_streams, self.num_tokens = num_streams, num_tokens
        self.feeds: list[Feed] = []
        self.crossing = Crossing(asyncio.get_running_loop())
        self.cpu_s = self.wall_s = 0.0

    def ask(self, ask: Ask) -> Feed:
        feed = Feed()
        self.feeds.append(feed)
        if len(self.feeds) == self.num_streams:
            self.task = asyncio.ensure_future(self.run())
        return feed

    async def run(self) -> None:
        await asyncio.sleep(0.5)
        cpu_s, wall_s = time.process_time(), time.monotonic()
        for step in range(self.num_tokens):
            finish = "length" if step == self.num_tokens - 1 else None
            for feed in self.feeds:
                self.crossing.put(feed, Delta(0, " word", (1,), 13, finish_reason=finish))
            for _ in range(6):  # delivered, woken, written
                await asyncio.sleep(0)
        self.cpu_s, self.wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
        for feed in self.feeds:
            feed.push(Done(13, 0, 0, self.num_tokens, 0.0, 0.0, 0.0, 0.0, ("length",)))


def read(port: int, num_streams: int, counts: multiprocessing.Queue) -> None:
    """In another process: asks and counts events."""

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps(BODY).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            more = await reader.read(1 << 20)
            if not more or received.startswith(b"HTTP/1.1 5"):
                raise RuntimeError(received.decode())
            received += more
        return received.count(b"data: {")

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(num_streams)))

    counts.put(asyncio.run(all_of_them()))


async def measure(num_streams: int, num_tokens: int, listener: socket.socket) -> dict[str, float]:
    recipe = build_recipe({"model_config": {"model_path": MODEL}, "server_config": {"port": 0}})
    backend = SteppedBackend(num_streams, num_tokens)
    chat = Chat.load(MODEL)
    processor = SimpleNamespace(generation_config={}, tokenizer=chat.tokenizer, chat=chat)
    recipe = recipe.model_copy(update={"scheduler": recipe.scheduler.model_copy(update={"max_model_len": 2048})})
    service = Service(recipe, processor, 512, backend)
    service.is_ready = True
    server = Server(config_of(build_app(service), recipe.server))
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    while backend.wall_s == 0:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.3)
    server.should_exit = True
    await running
    chunks = num_streams * num_tokens
    return {"cpu_us_per_chunk": backend.cpu_s / chunks * 1e6, "wall_us_per_chunk": backend.wall_s / chunks * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="the functions that take most time, on stderr")
    args = parser.parse_args()
    listener = listen(build_recipe({"model_config": {"model_path": MODEL}, "server_config": {"port": 0}}).server)
    listener.listen(args.streams)
    counts: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
    words = (listener.getsockname()[1], args.streams, counts)
    clients = multiprocessing.get_context("spawn").Process(target=read, args=words)
    clients.start()
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    figures = asyncio.run(measure(args.streams, args.tokens, listener))
    if args.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    events = sum(counts.get(timeout=60))
    clients.join()
    print(json.dumps({"streams": args.streams, "tokens": args.tokens, "events": events, **figures}))


if __name__ == "__main__":
    main()
