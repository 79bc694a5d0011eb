"""For benchmarks of the server: `serve` as a process of its own, and a client that costs next to nothing."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
START_S = 120


@dataclass(frozen=True)
class Served:
    port: int
    pid: int

    def cpu_s(self) -> float:
        """What it has computed so far, on all cores."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_healthy(port: int, process: subprocess.Popen, limit_s: float, words: str) -> None:
    """RuntimeError with `words` where the server of `process` has ended, or says nothing good within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(words) from None
            time.sleep(0.2)


@contextmanager
def served(*settings: str, folder: Path = REPO) -> Iterator[Served]:
    """A server of the tiny checkpoint, with `settings` of the recipe. `folder`: whose code it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for each in (f"server_config.port={port}", *settings) for word in ("--set", each)]
    process = subprocess.Popen(
        [sys.executable, "-m", "executor", "config/quickstart.yaml", "serve", *words], cwd=folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_healthy(port, process, START_S, "the server does not answer")
        yield Served(port, process.pid)
    finally:
        process.terminate()
        process.wait()


async def stream(port: int, body: dict, stamps: list[float]) -> int:
    """One streamed chat; `stamps` gets the time of each event as it comes. Returns the HTTP status."""
    content = json.dumps({"stream": True, "temperature": 0, "ignore_eos": True, **body}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = int((await reader.readline()).split()[1])
        while data := await reader.read(1 << 16):
            now = time.perf_counter()
            stamps.extend([now] * data.count(b"data: {"))
    finally:
        writer.close()
    return status


def text(words: str, num_tokens: int) -> dict:
    return {"messages": [{"role": "user", "content": words}], "max_tokens": num_tokens}
