"""`bench compare FIRST SECOND`: two results files of bench, figure by figure."""

import logging
import sys
from pathlib import Path
from typing import Any, TextIO

from executor.bench.compare import (
    Difference,
    common_loads,
    comparison_table,
    differences,
    doubts,
    how_judged,
    recipe_differences,
)
from executor.bench.results import load
from executor.host.env import find_path
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def run(recipe: Recipe, compared: tuple[Path, Path], out: TextIO | None = None) -> tuple[dict[str, Any], int]:
    """Compare the two files; the JSON document and the exit status. Raises UserError for files that are none of ours.

    `recipe`: only whether, and into which folder, it draws.
    """
    out = out or sys.stdout
    first, second = (load(find_path(path)) for path in compared)
    pairs = common_loads(first, second)
    warnings, changed = doubts(first, second), recipe_differences(first, second)
    print(f"first:  {compared[0]} ({first.mode}, {first.created})", file=out)
    print(f"second: {compared[1]} ({second.mode}, {second.created})", file=out)
    for words in warnings:
        logger.warning("%s", words)
    for name, (one, other) in changed.items():
        print(f"  {name}: {one} / {other}", file=out)
    points = []
    for at, one, other in pairs:
        found = differences(one, other)
        print(f"\n{at.words}\n{comparison_table(found)}", file=out, flush=True)
        points.append({"load": at.words, "figures": {each.name: _document(each) for each in found}})
    print("", *dict.fromkeys(how_judged(one, other) for _, one, other in pairs), sep="\n", file=out, flush=True)
    document: dict[str, Any] = {
        "command": "bench",
        "mode": "compare",
        "first": str(compared[0]),
        "second": str(compared[1]),
        "warnings": warnings,
        "changed": {name: list(values) for name, values in changed.items()},
        "points": points,
    }
    if recipe.bench.plot:
        from executor.bench.plot import draw

        files = f"first: {compared[0].name}; second: {compared[1].name}"
        stem = Path(recipe.model.output_path) / f"bench_compare_{compared[0].stem}_{compared[1].stem}"
        document["plots"] = [str(chart) for chart in draw([first, second], stem, ("first", "second"), files)]
        for chart in document["plots"]:
            print(f"chart: {chart}", file=out, flush=True)
    return document, 0


def _document(each: Difference) -> dict[str, Any]:
    return {
        "first": round(each.first.median, 4),
        "second": round(each.second.median, 4),
        "ratio": None if each.ratio is None else round(each.ratio, 4),
        "larger_than_spread": each.is_larger,
    }
