"""What HTTP costs a token: the server's time minus the engine's, at many streams at once.

    python -m tests.benchmarks.http_overhead [--streams 64] [--tokens 200] [--against FOLDER]

The engine alone answers the same requests with the same number of cores for its model, through an EngineLoop with a
callback that does nothing; then a server in a process of its own, for a client in this one that only counts events.
`overhead_ms` is the difference of the wall time per token, `overhead_cpu_ms` that of what the two have computed, which
other processes on the machine change less. Not a test: timings on shared machines vary.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.serving import REPO, served, stream, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--against", type=Path, help="another checkout, measured after this one")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(engine_alone(args.streams, args.tokens)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for the model, the other for HTTP and this client
    report = {}
    folders = {"this": REPO} | ({"against": args.against.resolve()} if args.against else {})
    for name, folder in folders.items():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--engine", "--streams", str(args.streams), "--tokens",
             str(args.tokens)], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
        engine_ms, engine_cpu_ms = json.loads(done.stdout.splitlines()[-1])
        with served(f"scheduler_config.max_num_seqs={args.streams}", folder=folder) as server:
            asyncio.run(answered(server.port, args.streams, 20))
            before_s = server.cpu_s()
            server_ms = asyncio.run(answered(server.port, args.streams, args.tokens))
            server_cpu_ms = 1000 * (server.cpu_s() - before_s) / (args.streams * args.tokens)
        report[name] = {
            "engine_ms_per_token": round(engine_ms, 4),
            "server_ms_per_token": round(server_ms, 4),
            "overhead_ms": round(server_ms - engine_ms, 4),
            "overhead_cpu_ms": round(server_cpu_ms - engine_cpu_ms, 4),
        }
    print(json.dumps({"streams": args.streams, "tokens": args.tokens, **report}))


def engine_alone(num_streams: int, num_tokens: int) -> tuple[float, float]:
    """Milliseconds per token, of wall time and of computing."""
    from executor.commands.build import build_engine
    from executor.engine.loop import EngineLoop
    from executor.recipe.schema import load_recipe
    from executor.schedule.request import SamplingParams

    recipe = load_recipe("config/quickstart.yaml", [f"scheduler_config.max_num_seqs={num_streams}"])
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    with build_engine(recipe) as engine, EngineLoop(engine) as loop:
        loop.start()
        for _ in range(2):  # the first time to warm up
            started, before_s = time.perf_counter(), time.process_time()
            ends: list[float] = []

            def note(event: object, ends: list[float] = ends) -> None:
                if isinstance(event, Exception) or hasattr(event, "texts"):
                    ends.append(time.perf_counter())

            for number in range(num_streams):
                loop.submit(f"Count from {number}.", params, on_event=note)
            while len(ends) < num_streams:
                time.sleep(0.005)
            cpu_s = time.process_time() - before_s
    return tuple(1000 * seconds / (num_streams * num_tokens) for seconds in (max(ends) - started, cpu_s))


async def answered(port: int, num_streams: int, num_tokens: int) -> float:
    """Milliseconds per token."""
    stamps: list[list[float]] = [[] for _ in range(num_streams)]
    started = time.perf_counter()
    await asyncio.gather(
        *(stream(port, text(f"Count from {number}.", num_tokens), stamps[number]) for number in range(num_streams))
    )
    seconds = max(each[-1] for each in stamps) - started
    return 1000 * seconds / (num_streams * num_tokens)


if __name__ == "__main__":
    main()
