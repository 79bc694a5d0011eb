"""Two benchmarks side by side: ratios, and which differences are larger than the repetitions' own spread.

A difference counts as larger where all repetitions of one lie beyond all of the other (statistics.differs). What makes
a comparison doubtful is said and does not stop it: another machine, model, workload or kind of measurement.
"""

from dataclasses import dataclass
from typing import Any

from executor.bench.results import Load, Point, Report
from executor.bench.statistics import LATENCIES, RATES, Figure, chance_of_difference, differs, figures
from executor.bench.table import GIB, columns
from executor.errors import UserError

COMPARED = (
    *("duration_s", *RATES),
    *(f"{kind}.{part}" for kind in LATENCIES for part in ("mean", "median", "p99")),
    *("model_tpot_ms", "peak_memory_bytes", "measured_over_floor"),
)
NOT_COMPARED = ("bench_config", "plan_config", "eval_config")  # sections that say nothing of what is measured
_NO_KEY = "not there"


@dataclass(frozen=True)
class Difference:
    """One figure of both. `is_larger`: than the spread; None where one has a single repetition."""

    name: str
    first: Figure
    second: Figure

    @property
    def ratio(self) -> float | None:
        """Second by first; None where the first is 0."""
        return self.second.median / self.first.median if self.first.median else None

    @property
    def is_larger(self) -> bool | None:
        return differs(self.first, self.second)

    @property
    def verdict(self) -> str:
        """For people: what the second is beside the first."""
        if self.is_larger is None:
            return "one repetition: cannot be said"
        if not self.is_larger:
            return "within the spread"
        is_greater = self.second.median > self.first.median
        return "better" if is_greater == (self.name in RATES) else "worse"


def common_loads(first: Report, second: Report) -> list[tuple[Load, Point, Point]]:
    """The loads that both have; of two reports with one load each those two. UserError where there are none."""
    points = {point.load: point for point in second.points}
    found = [(point.load, point, points[point.load]) for point in first.points if point.load in points]
    if not found and len(first.points) == len(second.points) == 1:
        return [(first.points[0].load, first.points[0], second.points[0])]
    if not found:
        has = [", ".join(point.load.words for point in report.points) for report in (first, second)]
        raise UserError(
            f"the two files have no load in common: the first has {has[0]}; the second {has[1]}; measure the same "
            "batch sizes, rates or concurrencies"
        )
    return found


def differences(first: Point, second: Point) -> list[Difference]:
    """Of all figures that both have."""
    one, other = figures(first.runs), figures(second.runs)
    return [Difference(name, one[name], other[name]) for name in COMPARED if name in one and name in other]


def doubts(first: Report, second: Report) -> list[str]:
    """What makes the two hard to compare, in words."""
    found = []
    if first.mode != second.mode:
        found.append(f"the modes differ: {first.mode} and {second.mode}")
    model = "model_config", "model_path"
    paths = [report.recipe[model[0]][model[1]] for report in (first, second)]
    if paths[0] != paths[1]:
        found.append(f"the models differ: {paths[0]} and {paths[1]}")
    for what, one, other in (
        ("machine", first.machine, second.machine),
        ("workload", {"dataset": first.dataset, **first.workload}, {"dataset": second.dataset, **second.workload}),
    ):
        for name in dict.fromkeys((*one, *other)):
            if one.get(name, _NO_KEY) != other.get(name, _NO_KEY):
                found.append(f"the {what} differs: {name} {one.get(name, _NO_KEY)} and {other.get(name, _NO_KEY)}")
    loads = [{point.load for point in report.points} for report in (first, second)]
    for place, alone in (("first", loads[0] - loads[1]), ("second", loads[1] - loads[0])):
        if alone:
            words = "; ".join(sorted(load.words for load in alone))
            found.append(f"only the {place} has {words}")
    return found


def recipe_differences(first: Report, second: Report) -> dict[str, tuple[Any, Any]]:
    """Keys of the settled recipes, and versions, that differ: {"model_config.dtype": ("float32", "bfloat16")}."""
    trees = []
    for report in (first, second):
        tree = {
            f"{section}.{key}": value
            for section, keys in report.recipe.items()
            if section not in NOT_COMPARED
            for key, value in keys.items()
        }
        trees.append(tree | {f"version of {name}": value for name, value in report.versions.items()})
    one, other = trees
    return {
        name: (one.get(name), other.get(name))
        for name in dict.fromkeys((*one, *other))
        if one.get(name, _NO_KEY) != other.get(name, _NO_KEY)
    }


def comparison_table(found: list[Difference]) -> str:
    """A line for each figure: both medians, the ratio, both spreads, and the verdict."""
    rows = [["figure", "first", "second", "second/first", "spread", "spread", "second is"]]
    for each in found:
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        spreads = [
            "-" if figure.spread is None else f"{100 * figure.spread:.1f} %" for figure in (each.first, each.second)
        ]
        label, unit = (f"{each.name[:-6]}_gib", GIB) if each.name.endswith("_bytes") else (each.name, 1)
        medians = [f"{figure.median / unit:.2f}" for figure in (each.first, each.second)]
        rows.append([label, *medians, ratio, *spreads, each.verdict])
    return columns(rows)


def how_judged(first: Point, second: Point) -> str:
    """What the verdicts are worth, in words."""
    numbers = len(first.runs), len(second.runs)
    if min(numbers) < 2:
        return (
            "A single repetition has no spread: measure with bench_config.repetitions=3 or more to judge differences."
        )
    share = chance_of_difference(*numbers)
    return (
        f"better, worse: all {numbers[1]} repetitions of the second lie beyond all {numbers[0]} of the first. Of two "
        f"equal systems that would be said of {100 * share:.3g} % of the figures; more repetitions make it rarer."
    )
