"""What a step of the scheduler costs while thousands of requests wait.

    python -m tests.benchmarks.scheduler [--waiting 10000] [--running 32 256] [--steps 300]

Requests of 200 tokens of text with 100 in common; none ends while steps are timed, so that nobody is admitted and
`blocked_us` is `schedule` and `update` of a decode step. `admitting_us`: of steps in which some answers end and as many
requests are admitted. `abort_us`: one of those that wait gives up. Times of the thread. Prints one line of JSON. Not a
test: timings on shared machines vary.
"""

import argparse
import json
import random
import statistics
import time

import numpy as np

from executor.schedule.request import Prompt, Request, SamplingParams
from executor.schedule.scheduler import Scheduler

PROMPT_TOKENS, SHARED_TOKENS, BLOCK_SIZE = 200, 100, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--running", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    found = {}
    for running in args.running:
        for waiting in (0, args.waiting):
            found[f"running_{running}_waiting_{waiting}"] = measure(running, waiting, args.steps)
    print(json.dumps(found))


def measure(running: int, waiting: int, steps: int) -> dict[str, float]:
    scheduler = Scheduler(
        num_blocks=running * 64,
        block_size=BLOCK_SIZE,
        max_num_seqs=running,
        max_num_batched_tokens=8192,
        max_model_len=1024,
        eos_token_ids=(0,),
    )
    for number in range(running + waiting):
        length = 400 if number < running else 8
        scheduler.add(request(number, length))
    while scheduler.num_running < running or not scheduler.schedule().is_decode:
        step(scheduler)
    blocked = [step(scheduler) for _ in range(steps)]
    assert scheduler.num_waiting == waiting
    found = {"blocked_us": statistics.median(blocked), "blocked_p99_us": sorted(blocked)[-max(1, steps // 100)]}
    if waiting:
        leaving = random.Random(0).sample([request.id for request in scheduler._waiting], 200)
        started = time.thread_time()
        for name in leaving:
            scheduler.abort(name)
        found["abort_us"] = 1e6 * (time.thread_time() - started) / len(leaving)
        while scheduler.num_waiting > waiting // 2:
            step(scheduler)
        admitting = [step(scheduler) for _ in range(steps)]
        found |= {"admitting_us": statistics.median(admitting), "admitting_max_us": max(admitting)}
    return {name: round(value, 1) for name, value in found.items()}


def request(number: int, max_new_tokens: int) -> Request:
    rng = random.Random(number)
    token_ids = [7] * SHARED_TOKENS + [rng.randrange(1, 1000) for _ in range(PROMPT_TOKENS - SHARED_TOKENS)]
    positions = np.broadcast_to(np.arange(PROMPT_TOKENS), (3, PROMPT_TOKENS))
    return Request(str(number), Prompt(token_ids, positions, 0), SamplingParams(max_new_tokens=max_new_tokens))


def step(scheduler: Scheduler) -> float:
    """Microseconds of a step in which every row that yields gets a token."""
    started = time.thread_time()
    plan = scheduler.schedule()
    planned = time.thread_time()
    tokens = [[5] if row.max_yield else [] for row in plan.rows]
    sampled = time.thread_time()
    scheduler.update(plan, tokens)
    return 1e6 * (planned - started + time.thread_time() - sampled)


if __name__ == "__main__":
    main()
