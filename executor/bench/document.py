"""A report as the last line of stdout has it: the keys that scripts rely on, and a list of points where there are
several.

Figures at the top are those of the point with the most output tokens a second, which `load` names.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from executor.bench.results import Point, Report
from executor.bench.statistics import COUNTS, LATENCIES, RATES, Figure, figures

MOST_ERRORS = 10


def document(report: Report) -> dict[str, Any]:
    """The document of a report with at least one point."""
    best = max(report.points, key=lambda point: figures(point.runs)["output_tokens_per_s"].median)
    found: dict[str, Any] = {
        "command": "bench",
        "mode": report.mode,
        "model": report.recipe["model_config"]["model_path"],
        "dataset": report.dataset,
        **point_document(best),
        "startup_s": _rounded(report.startup.first_token_s),
        "startup": {name: _rounded(value) for name, value in vars(report.startup).items()},
    }
    if len(report.points) > 1:
        found["points"] = [point_document(point) for point in report.points]
    errors = errors_of(report)
    if errors:
        found["errors"] = errors
    return found


def errors_of(report: Report) -> dict[str, int]:
    """The commonest reasons of failed requests, and how many failed for each."""
    failures = (request.error for point in report.points for run in point.runs for request in run.requests)
    return dict(Counter(error for error in failures if error is not None).most_common(MOST_ERRORS))


def point_document(point: Point) -> dict[str, Any]:
    """One load: medians over its repetitions; null where there are no data."""
    found = figures(point.runs)
    load = point.load
    whole = {name: int(_median(found, name)) for name in COUNTS}
    whole["failed"] = int(found["failed"].most)  # a repetition without failures hides none of another
    latencies = {
        kind: {part: _median(found, f"{kind}.{part}") for part in ("mean", "median", "p99")} for kind in LATENCIES
    }
    stages = {name.partition(".")[2]: _median(found, name) for name in found if name.startswith("stage_s.")}
    beside = {name.partition(".")[2]: _median(found, name) for name in found if name.startswith("beside.")}
    told: dict[str, Any] = {
        "load": load.words,
        **{name: value for name, value in vars(load).items() if value is not None},
        "repetitions": len(point.runs),
        **whole,
        "duration_s": _median(found, "duration_s"),
        **{name: _median(found, name) for name in RATES},
        **latencies,
        "model_tpot_ms": _median(found, "model_tpot_ms"),
        "stages_s": stages or None,
        **({"beside": beside} if beside else {}),
        "peak_memory_bytes": _median(found, "peak_memory_bytes"),
        "measured_over_floor": _median(found, "measured_over_floor"),
        "spread": {
            name: _rounded(found[name].spread)
            for name in ("duration_s", "output_tokens_per_s", "ttft_ms.mean", "tpot_ms.mean")
            if name in found
        },
    }
    if point.floor is not None:
        told["floor"] = {name: _rounded(value) for name, value in vars(point.floor).items()}
    return told


def _median(found: Mapping[str, Figure], name: str) -> float | int | None:
    if name not in found:
        return None
    return int(found[name].median) if name.endswith("_bytes") else _rounded(found[name].median)


def _rounded(value: Any) -> Any:
    """To six digits that count."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
