"""Many clients at once: what a server refuses, loses, and has kept when they have gone.

    python -m tests.benchmarks.load [--connections 1000] [--requests 10000] [--pictures 0.2] [--leave 0.05]

A server of the tiny checkpoint in a process of its own answers texts and small pictures, streamed and whole, asked one
after the other on each of the connections; a share of the clients leaves at a random moment. Fails (exit status 1) for
an answer that is not whole, a refusal other than 429 or 503 with Retry-After, and for what is still held when everybody
has gone: KV blocks, requests, file descriptors, threads. Memory is told at every tenth of the requests. Not a test:
a run takes minutes.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests.benchmarks.serving import Served, served

MAX_TRIES = 1000
LIMIT_S = 900.0  # of one answer
SETTLED_S = 20.0  # that the server has to free everything


@dataclass
class Report:
    """What the clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_refused: int = 0
    answer_s: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


class Client:
    """One connection that asks again and again, and is opened anew where the server or the client has closed it."""

    def __init__(self, port: int, rng: random.Random, report: Report) -> None:
        self.port, self.rng, self.report = port, rng, report
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: dict[str, Any], leaves_s: float | None) -> None:
        """One request until it is answered; `leaves_s`: so long it waits for that."""
        begun = time.monotonic()
        for _ in range(MAX_TRIES):
            try:
                async with asyncio.timeout(LIMIT_S if leaves_s is None else leaves_s):
                    status, headers, content = await self._exchange(body)
            except TimeoutError:
                self.close()
                self._note("left" if leaves_s is not None else "late", is_fault=leaves_s is None)
                return
            except (OSError, EOFError, asyncio.IncompleteReadError) as error:
                self.close()
                self._note(f"{type(error).__name__}: {error}", is_fault=True)
                return
            if status in (429, 503) and headers.get("retry-after", "").isdigit():
                self.report.num_refused += 1
                await asyncio.sleep(int(headers["retry-after"]) * (0.5 + self.rng.random()))
                continue
            is_whole = content.endswith(b"data: [DONE]\n\n") if body["stream"] else content.endswith(b"}")
            if status == 200 and is_whole and b'"error"' not in content:
                self.report.answer_s.append(time.monotonic() - begun)
                self._note("answered")
            else:
                self._note(f"status {status}: {content[-300:]!r}", is_fault=True)
            return
        self._note("refused again and again", is_fault=True)

    def _note(self, outcome: str, *, is_fault: bool = False) -> None:
        self.report.outcomes["fault" if is_fault else outcome] += 1
        if is_fault:
            self.report.faults.append(outcome)

    async def _exchange(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self.reader, self.writer
        assert reader is not None and writer is not None
        sent = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        if "content-length" in headers:
            content = await reader.readexactly(int(headers["content-length"]))
        else:
            content = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                content = content[-4096:] + (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), headers, content

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
        self.writer = None


def questions(rng: random.Random, pictures: float) -> Iterator[dict[str, Any]]:
    """Bodies of requests without an end; `pictures`: which share of them has one."""
    drawn = [_picture(rng) for _ in range(16)]
    while True:
        words = " ".join(
            rng.choice(("What", "is", "a", "red", "square", "circle")) for _ in range(rng.randrange(3, 40))
        )
        content: Any = words
        if rng.random() < pictures:
            content = [{"type": "image_url", "image_url": {"url": rng.choice(drawn)}}, {"type": "text", "text": words}]
        yield {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": rng.randrange(1, 24),
            "stream": rng.random() < 0.5,
            "ignore_eos": True,
            "n": rng.choice((1, 1, 1, 1, 2)),
        }


def _picture(rng: random.Random) -> str:
    data = io.BytesIO()
    colour = tuple(rng.randrange(256) for _ in range(3))
    Image.new("RGB", (rng.randrange(56, 112), rng.randrange(56, 112)), colour).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


async def load(server: Served, args: argparse.Namespace) -> Report:
    """`args.requests` on `args.connections`."""
    rng, report = random.Random(args.seed), Report()
    bodies, num_left = questions(rng, args.pictures), args.requests

    async def client() -> None:
        nonlocal num_left
        one = Client(server.port, rng, report)
        while num_left > 0:
            num_left -= 1
            if num_left % max(1, args.requests // 10) == 0:
                report.memory_mib.append(round(held_by(server)["memory_mib"], 1))
            await one.ask(next(bodies), rng.random() * 20 if rng.random() < args.leave else None)
        one.close()

    await asyncio.gather(*(client() for _ in range(args.connections)))
    return report


def held_by(server: Served) -> dict[str, float]:
    """What a process holds, and what its engine does."""
    folder = Path(f"/proc/{server.pid}")
    status = (folder / "status").read_text()
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60).read().decode()
    return {
        "memory_mib": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
        "descriptors": len(list((folder / "fd").iterdir())),
        **{
            name: float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        },
    }


def settled(server: Served, before: dict[str, float]) -> dict[str, float]:
    """What is held once as much as `before` is, or SETTLED_S have gone by. Memory may be more: it is told apart."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        after = held_by(server)
        if all(after[name] <= before[name] for name in before if name != "memory_mib") or time.monotonic() > deadline:
            return after
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--pictures", type=float, default=0.2, help="share of the requests that have one")
    parser.add_argument("--leave", type=float, default=0.05, help="share of the clients that leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="keys of the recipe, as for infer.sh")
    args = parser.parse_args()
    with served(*args.set) as server:
        asyncio.run(load(server, argparse.Namespace(**{**vars(args), "connections": 8, "requests": 40, "leave": 0})))
        before = settled(server, dict.fromkeys(("num_requests_running", "num_requests_waiting"), 0.0))
        begun, cpu_s = time.monotonic(), server.cpu_s()
        report = asyncio.run(load(server, args))
        seconds, cpu_s = time.monotonic() - begun, server.cpu_s() - cpu_s
        after = settled(server, before)
    kept = {name: after[name] - before[name] for name in before if name != "memory_mib" and after[name] > before[name]}
    times = sorted(report.answer_s)
    print(
        json.dumps(
            {
                "connections": args.connections,
                "requests": args.requests,
                "outcomes": report.outcomes,
                "refused": report.num_refused,
                "seconds": round(seconds, 1),
                "server_cpu_s": round(cpu_s, 1),
                "answer_s": {
                    "median": round(times[len(times) // 2], 2),
                    "p99": round(times[len(times) * 99 // 100], 2),
                },
                "memory_mib": [round(before["memory_mib"], 1), *report.memory_mib, round(after["memory_mib"], 1)],
                "before": before,
                "after": after,
                "kept": kept,
                "faults": report.faults[:20],
            }
        )
    )
    return int(bool(report.faults or kept))


if __name__ == "__main__":
    sys.exit(main())
