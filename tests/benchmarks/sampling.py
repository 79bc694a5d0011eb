"""What choosing tokens costs: greedy, filtered, penalised and mixed rows over one vocabulary, in one process.

    python -m tests.benchmarks.sampling [--rows 16] [--vocab 151936] [--prompt 1000] [--repeats 30]

Logits look like a language model's (a few tokens far above a wide bulk); requests answer on, a token a step, so that
penalties see histories that grow. The ways take turns inside each repetition, so that a disturbance hits all alike.
Prints milliseconds a step (minimum and median) and ratios to greedy as JSON. Not a test: timings vary.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from executor.engine.sampler import Sampler
from executor.schedule.request import Prompt, Request, SamplingParams

QWEN3 = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
WAYS = {
    "greedy": [SamplingParams()],
    "plain_argmax": [],  # torch's own, for comparison: what greedy was until November 2026
    "top_k_top_p": [SamplingParams(**QWEN3)],
    "top_k": [SamplingParams(temperature=1.0, top_k=50)],
    "top_p": [SamplingParams(temperature=0.7, top_p=0.9)],
    "min_p": [SamplingParams(temperature=1.0, min_p=0.05)],
    "repetition": [SamplingParams(repetition_penalty=1.05)],
    "presence_frequency": [SamplingParams(presence_penalty=0.5, frequency_penalty=0.2)],
    "filters_and_penalties": [SamplingParams(**QWEN3, repetition_penalty=1.05, presence_penalty=1.5)],
    "mixed": [SamplingParams(), SamplingParams(**QWEN3), SamplingParams(repetition_penalty=1.05)],
    "temperature_only": [SamplingParams(temperature=1.0)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    steps = {name: _steps(params, args) for name, params in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            next(step)
            if repeat >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    least, middle = ({name: f(values) for name, values in times.items()} for f in (min, statistics.median))
    report = {
        "rows": args.rows,
        "vocab": args.vocab,
        "prompt_tokens": args.prompt,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    for name in WAYS:
        report[name] = {
            "min_ms": round(least[name], 3),
            "median_ms": round(middle[name], 3),
            "median_to_greedy": round(middle[name] / middle["greedy"], 2),
            "min_to_greedy": round(least[name] / least["greedy"], 2),
        }
    print(json.dumps(report, indent=1))


def logits_of(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """A bulk with a spread of 2.5 around 0, and some hundred tokens of each row that stand out, up to about 20."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 2.5
    stand_out = torch.randint(0, vocab, (rows, 300), generator=generator)
    return logits.scatter_(1, stand_out, 20 - 12 * torch.rand(rows, 300, generator=generator).sqrt())


def _steps(params: list[SamplingParams], args: argparse.Namespace) -> Iterator[None]:
    """Each `next` samples one step of all rows."""
    logits = logits_of(args.rows, args.vocab, 0)
    if not params:
        while True:
            yield logits.max(dim=-1)[1].tolist()
    random = np.random.default_rng(0)
    sampler = Sampler(args.vocab, "cpu")
    requests = []
    for row in range(args.rows):
        ids = random.integers(0, args.vocab, args.prompt).tolist()
        prompt = Prompt(ids, np.zeros((3, args.prompt), np.int64), 0)
        requests.append(Request(str(row), prompt, params[row % len(params)]))
    while True:
        with torch.inference_mode():
            sampled = sampler.sample(logits, requests)
        for request, token_id in zip(requests, sampled.token_ids, strict=True):
            request.output_token_ids.append(token_id)
        yield


if __name__ == "__main__":
    main()
