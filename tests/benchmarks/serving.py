"""For benchmarks of the server: `serve` as a process of its own, and a client that costs next to nothing."""

import json
import os
import re
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

from executor.bench.client import Client, Endpoint
from executor.bench.stream import ChatStream

REPO = Path(__file__).resolve().parents[2]
START_S = 120
STREAM_S = 900.0


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
    """One streamed chat on a connection of its own; `stamps` gets the time of each piece as it comes. Returns the HTTP
    status. RuntimeError for an answer that is not whole."""
    content = json.dumps({"stream": True, "temperature": 0, "ignore_eos": True, **body}).encode()
    client, coming = Client(Endpoint.at(f"http://127.0.0.1:{port}"), STREAM_S), ChatStream()
    coming.piece_times_s = stamps
    try:
        reply = await client.chat(content, coming)
    finally:
        client.close()
    if reply.error is None:
        return 200
    refusal = re.match(r"HTTP (\d+): ", reply.error)
    if refusal is None:
        raise RuntimeError(reply.error)
    return int(refusal[1])


def text(words: str, num_tokens: int) -> dict:
    return {"messages": [{"role": "user", "content": words}], "max_tokens": num_tokens}
