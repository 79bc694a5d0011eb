"""How evenly a server writes while large pictures come in: gaps between tokens, and a short text's first token.

    python -m tests.benchmarks.mixed_load [--streams 8] [--seconds 15] [--against FOLDER]

`itl`: gaps between the events of running streams, while a picture of 12 megapixels is asked about again and again;
their 99th percentile over their median. `ttft`: of a short text, first alone, then while such a picture is prepared,
and nothing else runs. The client shares the machine with the server. Not a test: timings on shared machines vary.
"""

import argparse
import asyncio
import base64
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.benchmarks.serving import served, stream, text
from tests.benchmarks.while_preparing import picture

NUM_TEXTS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--against", type=Path, help="another checkout, measured after this one")
    args = parser.parse_args()
    report = {}
    folders = {"this": Path.cwd()} | ({"against": args.against.resolve()} if args.against else {})
    for name, folder in folders.items():
        with served(f"scheduler_config.max_num_seqs={args.streams + 4}", folder=folder) as server:
            report[name] = asyncio.run(measure(server.port, args.streams, args.seconds))
    print(json.dumps({"streams": args.streams, **report}))


def asked_about_a_picture() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(picture(Path(folder) / "p.jpg")["image"])
        url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


async def measure(port: int, num_streams: int, seconds: float) -> dict:
    large = asked_about_a_picture()
    await stream(port, large, [])
    alone = await texts(port)
    pictures = asyncio.ensure_future(again(port, large))
    await asyncio.sleep(0.3)
    beside = await texts(port)
    pictures.cancel()
    await asyncio.sleep(2)
    quiet = await running(port, num_streams, seconds / 2)
    pictures = asyncio.ensure_future(again(port, large))
    mixed = await running(port, num_streams, seconds)
    pictures.cancel()
    step_ms = statistics.median(quiet)
    return {
        "ttft_alone_ms": round(alone, 2),
        "ttft_beside_a_picture_ms": round(beside, 2),
        "ttft_allowed_ms": round(1.3 * alone + step_ms, 2),
        "itl_without_pictures": summary(quiet),
        "itl_with_pictures": summary(mixed),
    }


async def texts(port: int) -> float:
    """The median time to the first token of short texts, one after the other, in milliseconds."""
    found = []
    for number in range(NUM_TEXTS):
        stamps: list[float] = []
        started = time.perf_counter()
        await stream(port, text(f"Count to {number}.", 1), stamps)
        found.append(1000 * (stamps[0] - started))
        await asyncio.sleep(0.05)
    return statistics.median(found)


async def again(port: int, body: dict) -> None:
    while True:
        await stream(port, body, [])


async def running(port: int, count: int, seconds: float) -> list[float]:
    """Gaps between the events of `count` streams, in milliseconds."""
    gaps: list[float] = []

    async def one(number: int) -> None:
        while True:
            stamps: list[float] = []
            try:
                await stream(port, text(f"Count from {number}.", 1800), stamps)
            finally:
                gaps.extend(1000 * (after - before) for before, after in zip(stamps[5:], stamps[6:], strict=False))

    tasks = [asyncio.ensure_future(one(number)) for number in range(count)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return gaps


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    median, p99 = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
    return {
        "median_ms": round(median, 2),
        "p99_ms": round(p99, 2),
        "max_ms": round(ordered[-1], 2),
        "p99_over_median": round(p99 / median, 2),
        "gaps": len(ordered),
    }


if __name__ == "__main__":
    main()
