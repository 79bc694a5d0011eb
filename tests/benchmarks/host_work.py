"""The host work that a decode step waits for: what lies between two forwards of a running batch.

    python -m tests.benchmarks.host_work [--batch 32] [--steps 300] [--drafts K] [--against FOLDER]

`--batch` answers are written by an EngineLoop that hands every token to a callback, as a server does. Between the end
of one forward of the model and the beginning of the next lie sampling, bookkeeping, planning and the gathering of
inputs, and whatever of text and delivery is not done beside the next forward: `between_ms`, of which the thread has
computed for `between_cpu_ms` (the rest is other threads' and processes' doing). `step_ms` is from one forward's
beginning to the next one's. `--drafts`: each row is verified with so many drafts, all wrong, that cost nothing to make:
what verifying costs the host. `--against`: another checkout of this project, whose engine is measured by the same code
in turns with this one's; medians over all turns, and their ratio. Not a test: timings on shared machines vary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
TURNS = 4
WARM_UP_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/tiny/qwen3_vl")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a turn, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    folders = {"this": REPO} | ({"against": args.against.resolve()} if args.against else {})
    found: dict[str, list[dict]] = {name: [] for name in folders}
    for _ in range(TURNS if args.against else 1):
        for name, folder in folders.items():
            found[name].append(turn(folder))
    report = {name: {key: median(turns, key) for key in turns[0]} for name, turns in found.items()}
    if args.against:
        report["ratio"] = {key: round(report["this"][key] / report["against"][key], 3) for key in report["this"]}
    print(
        json.dumps(
            {
                "batch": args.batch,
                "threads": args.threads,
                "temperature": args.temperature,
                "drafts": args.drafts,
                **report,
            }
        )
    )


def turn(folder: Path) -> dict:
    """One measurement of the checkout in `folder`, by this file's code."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--against")]
    if "--against" in sys.argv:
        arguments.remove(sys.argv[sys.argv.index("--against") + 1])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments, "--one"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def median(turns: list[dict], key: str) -> float:
    return round(statistics.median(each[key] for each in turns), 3)


def measure(args: argparse.Namespace) -> dict:
    import torch

    from executor.commands.build import build_engine
    from executor.engine.loop import EngineLoop
    from executor.recipe.schema import build_recipe
    from executor.schedule.request import SamplingParams

    torch.set_num_threads(args.threads)
    params = SamplingParams(max_new_tokens=args.steps + 100, ignore_eos=True, temperature=args.temperature, seed=1)
    recipe = build_recipe(
        {
            "model_config": {"model_path": args.model, "device": "cpu", "dtype": "float32"},
            "scheduler_config": {"max_num_seqs": args.batch, "block_size": 16, "max_model_len": 1024},
        }
    )
    drafts, width = (0,) * args.drafts, args.batch * (1 + args.drafts)  # of a steady step's tokens
    begun: list[tuple[float, float]] = []  # wall, and the thread's own time
    ended: list[tuple[float, float]] = []
    rows: list[int] = []
    told: list[int] = []
    with build_engine(recipe) as engine:
        forward = engine.runner.step.forward
        if drafts:
            draft(engine, drafts)

        def timed(token_ids, *rest):
            begun.append((time.perf_counter(), time.thread_time()))
            logits = forward(token_ids, *rest)
            ended.append((time.perf_counter(), time.thread_time()))
            rows.append(len(token_ids))
            return logits

        engine.runner.step.forward = timed
        with EngineLoop(engine).start() as loop:
            handles = [
                loop.submit(f"Count to {number}.", params, on_event=lambda event: told.append(1))
                for number in range(args.batch)
            ]
            while sum(count == width for count in rows) < args.steps + WARM_UP_STEPS:
                time.sleep(0.05)
            for handle in handles:
                assert handle.failure is None, handle.failure
    steady = [n for n in range(1, len(rows)) if rows[n - 1] == rows[n] == width][WARM_UP_STEPS:]
    between = [[1000 * (begun[n][clock] - ended[n - 1][clock]) for n in steady] for clock in (0, 1)]
    steps = [1000 * (begun[n][0] - begun[n - 1][0]) for n in steady]
    return {
        "between_ms": statistics.median(between[0]),
        "between_cpu_ms": statistics.median(between[1]),
        "step_ms": statistics.median(steps),
    }


def draft(engine: Any, drafts: tuple[int, ...]) -> None:
    """From now on the engine verifies these with every row."""
    from executor.engine.speculation.speculator import Proposer, Speculator

    class Constant(Proposer):
        def propose(self, plan, wanted):
            return [drafts[:count] for count in wanted]

    engine.scheduler.max_yield = 1 + len(drafts)
    engine.runner.speculator = Speculator(Constant(), len(drafts))


if __name__ == "__main__":
    main()
