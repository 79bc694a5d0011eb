"""Two reports side by side, with figures whose ratios and spreads are known."""

import io
import json
from dataclasses import replace

import pytest

from executor.bench.compare import common_loads, differences, doubts, recipe_differences
from executor.bench.results import Load, Point, Report, RequestResult, Run, save
from executor.commands.bench.compare import run as compare
from executor.errors import UserError
from executor.recipe.schema import build_recipe

RECIPE = {"model_config": {"model_path": "models/a", "dtype": "float32"}, "data_config": {"dataset": "random"}}


def run_of(seconds, tokens=11):
    """One request that takes so long, its first token after a tenth of that."""
    gap_s = 0.9 * seconds / (tokens - 1)
    times = tuple(0.1 * seconds + gap_s * number for number in range(tokens))
    return Run(seconds, (RequestResult(0.0, times[-1], times, 100, 0, tokens),), peak_memory_bytes=2**30)


def report_of(*durations_s, **changes):
    point = Point(Load(batch_size=1), tuple(run_of(seconds) for seconds in durations_s))
    report = Report(
        "latency", "random", "2026-01-01T00:00:00+00:00", RECIPE, {"requests": 1}, {"cpu": "x"}, {}, (point,)
    )
    return replace(report, **changes)


def found(first, second):
    return {each.name: each for each in differences(first.points[0], second.points[0])}


def test_ratios_and_verdicts():
    each = found(report_of(1.0, 1.1, 0.9), report_of(2.0, 2.2, 2.1))
    assert each["duration_s"].ratio == pytest.approx(2.1)
    assert each["output_tokens_per_s"].ratio == pytest.approx(1 / 2.1)
    assert each["ttft_ms.mean"].ratio == each["tpot_ms.mean"].ratio == pytest.approx(2.1)
    assert {each[name].verdict for name in ("duration_s", "output_tokens_per_s", "tpot_ms.p99")} == {"worse"}
    assert each["peak_memory_bytes"].verdict == "within the spread"
    back = found(report_of(2.0, 2.2, 2.1), report_of(1.0, 1.1, 0.9))
    assert {back[name].verdict for name in ("duration_s", "output_tokens_per_s", "tpot_ms.p99")} == {"better"}


def test_repetitions_that_overlap_are_no_difference():
    each = found(report_of(1.0, 1.1, 2.0), report_of(1.9, 2.2, 2.1))
    assert each["duration_s"].verdict == "within the spread" and each["duration_s"].is_larger is False


def test_one_repetition_says_nothing():
    each = found(report_of(1.0), report_of(2.0, 2.1))
    assert each["duration_s"].is_larger is None and "cannot be said" in each["duration_s"].verdict


def test_what_makes_it_doubtful():
    first = report_of(1.0)
    assert doubts(first, first) == []
    other_model = {**RECIPE, "model_config": {**RECIPE["model_config"], "model_path": "models/b"}}
    more = Point(Load(batch_size=4), first.points[0].runs)
    second = report_of(
        1.0, mode="serve", recipe=other_model, machine={"cpu": "y"}, workload={"requests": 2}, dataset="default",
        points=(*first.points, more),
    )  # fmt: skip
    words = "\n".join(doubts(first, second))
    for part in (
        "modes differ: latency and serve",
        "models differ: models/a and models/b",
        "machine differs: cpu x and y",
        "workload differs: requests 1 and 2",
        "workload differs: dataset random and default",
        "only the second has batch size 4",
    ):
        assert part in words


def test_what_was_changed_on_purpose_is_told_and_is_no_doubt():
    changed = {
        **RECIPE,
        "model_config": {**RECIPE["model_config"], "dtype": "bfloat16"},
        "bench_config": {"warmups": 9},
    }
    second = report_of(1.0, recipe=changed, versions={"torch": "2"})
    assert recipe_differences(report_of(1.0), second) == {
        "model_config.dtype": ("float32", "bfloat16"),
        "version of torch": (None, "2"),
    }
    assert doubts(report_of(1.0), second) == []


def test_loads_are_matched():
    first = report_of(1.0)
    lone = replace(first, points=(Point(Load(), first.points[0].runs),))
    assert [load for load, _, _ in common_loads(first, first)] == [Load(batch_size=1)]
    assert len(common_loads(first, lone)) == 1  # one load each: those two
    with pytest.raises(UserError, match="no load in common"):
        common_loads(replace(first, points=(*first.points, *first.points)), lone)


def test_the_command(tmp_path):
    paths = tmp_path / "a.json", tmp_path / "b.json"
    save(report_of(1.0, 1.1), paths[0])
    save(report_of(2.0, 2.1, machine={"cpu": "y"}), paths[1])
    out = io.StringIO()
    recipe = build_recipe(
        {"model_config": {"model_path": "-", "output_path": str(tmp_path)}, "bench_config": {"plot": True}}
    )
    document, status = compare(recipe, paths, out)
    json.dumps(document)
    assert status == 0 and document["warnings"] == ["the machine differs: cpu x and y"]
    duration = document["points"][0]["figures"]["duration_s"]
    assert duration == {"first": 1.05, "second": 2.05, "ratio": 1.9524, "larger_than_spread": True}
    line = next(line for line in out.getvalue().splitlines() if line.startswith("duration_s"))
    assert line.split()[:4] == ["duration_s", "1.05", "2.05", "1.952"] and line.endswith("worse")
    assert "33.3 % of the figures" in out.getvalue()  # two and two: 2 of 6 orders
    assert [path for path in document["plots"] if path.endswith(".png")]
    with pytest.raises(UserError, match="no results file of bench"):
        paths[1].write_text("[]")
        compare(recipe, paths, out)
