"""From requests to figures: the formulae of `vllm bench serve` (vllm/benchmarks/serve.py, calculate_metrics).

Per run: means, medians and 99th percentiles (numpy's, linear) over the requests that were answered. TPOT of a request
is (e2e - TTFT) / (tokens - 1), of those with more than one token; ITL are all gaps between pieces of all answers.
Over the repetitions of a load: the median of each figure, and its least and greatest value. Figures without data are
None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from executor.bench.results import RequestResult, Run


@dataclass(frozen=True)
class Latency:
    """Of one kind of time within one run, in ms."""

    mean: float | None = None
    median: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class Summary:
    """One run in figures; tokens are those of the requests that were answered."""

    requests: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    vision_tokens: int
    cached_tokens: int
    ttft_ms: Latency
    tpot_ms: Latency
    itl_ms: Latency
    e2e_ms: Latency

    @property
    def completed(self) -> int:
        return self.requests - self.failed

    @property
    def request_per_s(self) -> float:
        return self.completed / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def total_tokens_per_s(self) -> float:
        return (self.input_tokens + self.output_tokens) / self.duration_s


@dataclass(frozen=True)
class Figure:
    """One figure over the repetitions of a load."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def most(self) -> float:
        return max(self.values)

    @property
    def spread(self) -> float | None:
        """The range of the repetitions as a share of their median; None for a single one."""
        if len(self.values) < 2 or not self.median:
            return None
        return (self.most - self.least) / abs(self.median)


LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
RATES = ("request_per_s", "output_tokens_per_s", "total_tokens_per_s")  # the greater the better
COUNTS = ("requests", "failed", "input_tokens", "output_tokens", "vision_tokens", "cached_tokens")


def latency(values_s: Sequence[float]) -> Latency:
    """Seconds -> mean, median and 99th percentile in ms."""
    if not len(values_s):
        return Latency()
    values_ms = np.asarray(values_s, dtype=np.float64) * 1000
    return Latency(float(np.mean(values_ms)), float(np.median(values_ms)), float(np.percentile(values_ms, 99)))


def tpot_s(request: RequestResult) -> float | None:
    """Seconds per token after the first; None for an answer of fewer than two."""
    if request.ttft_s is None or request.output_tokens < 2:
        return None
    return (request.e2e_s - request.ttft_s) / (request.output_tokens - 1)


def summarize(run: Run) -> Summary:
    """One run in figures. `run.duration_s` is above 0."""
    answered = [request for request in run.requests if request.error is None]
    gaps = [np.diff(request.token_times_s) for request in answered if len(request.token_times_s) > 1]
    tpots = [tpot_s(request) for request in answered]
    return Summary(
        requests=len(run.requests),
        failed=len(run.requests) - len(answered),
        duration_s=run.duration_s,
        input_tokens=sum(request.prompt_tokens for request in answered),
        output_tokens=sum(request.output_tokens for request in answered),
        vision_tokens=sum(request.vision_tokens for request in answered),
        cached_tokens=sum(request.cached_tokens for request in answered),
        ttft_ms=latency([request.ttft_s for request in answered if request.ttft_s is not None]),
        tpot_ms=latency([value for value in tpots if value is not None]),
        itl_ms=latency(np.concatenate(gaps) if gaps else []),
        e2e_ms=latency([request.e2e_s for request in answered]),
    )


def figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every figure over the repetitions `runs`: "ttft_ms.mean", "duration_s", "failed", ... Figures that some run does
    not have are left out."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for name, value in _flat(run).items():
            values.setdefault(name, []).append(value)
    return {name: Figure(tuple(each)) for name, each in values.items() if len(each) == len(runs)}


def _flat(run: Run) -> dict[str, float]:
    summary = summarize(run)
    flat = {name: getattr(summary, name) for name in (*COUNTS, "duration_s", *RATES)}
    for kind in LATENCIES:
        of_kind = getattr(summary, kind)
        flat |= {f"{kind}.{part}": getattr(of_kind, part) for part in ("mean", "median", "p99")}
    flat["model_tpot_ms"] = None if run.model_tpot_s is None else 1000 * run.model_tpot_s
    flat["peak_memory_bytes"] = run.peak_memory_bytes
    flat["measured_over_floor"] = run.duration_s / run.floor_s if run.floor_s else None
    flat |= {f"stage_s.{name}": seconds for name, seconds in run.stages_s.items()}
    flat |= {f"beside.{name}": value for name, value in run.beside.items()}
    return {name: value for name, value in flat.items() if value is not None}


def differs(first: Figure, second: Figure) -> bool | None:
    """Whether all repetitions of one lie beyond all of the other, so that the difference is larger than their spread.
    None where neither can be said: fewer than two repetitions of either."""
    if min(len(first.values), len(second.values)) < 2:
        return None
    return first.most < second.least or second.most < first.least


def chance_of_difference(num_first: int, num_second: int) -> float:
    """How often `differs` says so of two equal systems: of all orders of the repetitions, the two in which one's lie
    all before the other's (the most extreme outcome of a rank-sum test)."""
    return 2 / comb(num_first + num_second, num_first)
