"""`eval compare A.jsonl B.jsonl`: two runs over the same samples in figures, and as an HTML report with the pictures.

Reads rows and summaries that eval has written; no model and no device. Of the recipe only output_path and
eval_config.report_path count.
"""

import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Dataset, Sample
from executor.errors import ODD_DATA_ERRORS, UserError
from executor.evaluate.compare import Comparison, Contrast, compare
from executor.evaluate.report.write import breakdown_tree, contrast_tree, write_report
from executor.evaluate.runs import Run, read_run, summary_path
from executor.recipe.schema import DataSection, Recipe

logger = logging.getLogger(__name__)

SHOWN_FLIPS = 20


def run(recipe: Recipe, compared: tuple[Path, Path], out: TextIO | None = None) -> tuple[dict[str, Any], int]:
    """Compare two files of rows, A and B; returns the JSON document and the exit status.

    Raises UserError where they cannot be compared.
    """
    out = out or sys.stdout
    if recipe.eval.report_path is not None:
        check_report_path(Path(recipe.eval.report_path).expanduser(), compared)
    comparison = compare(*(read_run(path) for path in compared))
    for warning in comparison.warnings:
        logger.warning("%s", warning)
    path = report_path(recipe, comparison)
    with_summary = comparison.first if comparison.first.summary else comparison.second
    write_report(path, comparison, sample_finder(with_summary))
    print(in_words(comparison), f"  report  {path}", sep="\n", file=out, flush=True)
    document = {
        "command": "eval",
        "mode": "compare",
        "dataset": comparison.first.dataset,
        "metric": comparison.first.metric,
        "first": str(comparison.first.path),
        "second": str(comparison.second.path),
        **contrast_tree(comparison.whole),
        "flipped": {verdict: [pair.first.id for pair in comparison.of(verdict)] for verdict in ("worse", "better")},
        "breakdown": breakdown_tree(comparison),
        "warnings": list(comparison.warnings),
        "report": str(path),
    }
    return document, 0


def check_report_path(path: Path, compared: tuple[Path, Path]) -> None:
    """UserError where a report would take the place of one of the runs, or of something that is no file."""
    kept = [file for rows in compared for file in (Path(rows).expanduser(), summary_path(rows))]
    try:
        if path.resolve() in [file.resolve() for file in kept]:
            raise UserError(f"eval_config.report_path: {path} is one of the runs' own files; give another path")
        if path.exists() and not path.is_file():
            raise UserError(f"eval_config.report_path: {path} is there and no regular file; give the path of a file")
    except (OSError, RuntimeError) as error:  # a name too long, links in a ring
        raise UserError(f"eval_config.report_path: {path} cannot be written ({error}); give another path") from error


def report_path(recipe: Recipe, comparison: Comparison) -> Path:
    """Where the report goes."""
    if recipe.eval.report_path is not None:
        return Path(recipe.eval.report_path).expanduser()
    name = f"{comparison.first.name}-beside-{comparison.second.name}.html"
    return Path(recipe.model.output_path) / "eval" / name


def sample_finder(run: Run) -> Callable[[int, str], Sample | None]:
    """Finds samples of the run's data set, for pictures that lie in it, as far as it is still where it was."""

    @cache
    def dataset() -> Dataset | None:
        try:
            return load_dataset(DataSection.model_validate(run.summary["recipe"]["data_config"]))
        except KeyError:
            logger.warning(
                "%s: no summary lies beside it, so that pictures inside the data set are not shown", run.path
            )
        except ODD_DATA_ERRORS as error:  # moved, or of another release: pictures are left out, and each says so
            reason = " ".join(str(error).split())
            logger.warning("the data set of %s cannot be read, its pictures are not shown: %s", run.path, reason)
        return None

    lock = Lock()

    def find(index: int, name: str) -> Sample | None:
        with lock:  # asked for by several threads, read once
            samples = dataset()
        if samples is None or index >= len(samples):
            return None
        sample = samples[index]
        return sample if sample.id == name else None

    return find


def in_words(comparison: Comparison) -> str:
    """The comparison for people."""
    lines = [
        f"{comparison.first.dataset}, {comparison.first.metric}, {len(comparison.pairs)} samples in both",
        f"  A  {comparison.first.path} {comparison.first.model}",
        f"  B  {comparison.second.path} {comparison.second.model}",
        "",
    ]
    rows = [("", "A", "B", "B - A", "better", "worse"), ("all", *_cells(comparison.whole))]
    for label, values in comparison.breakdown.items():
        rows += [(f"{label}: {value}", *_cells(contrast)) for value, contrast in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    difference = comparison.whole.difference
    is_real = "is more than chance" if difference.is_real else "may be chance"
    lines += ["", f"  the difference {is_real} (sign test p = {difference.p_value:.3g})"]
    if not difference.better + difference.worse:
        lines[-1] = "  no sample scores differently in B"
    for verdict in ("worse", "better"):
        names = [pair.first.id for pair in comparison.of(verdict)]
        more = f" and {len(names) - SHOWN_FLIPS} more" if len(names) > SHOWN_FLIPS else ""
        lines += [f"  {verdict} in B: {', '.join(names[:SHOWN_FLIPS])}{more}"] if names else []
    return "\n".join(lines)


def _cells(contrast: Contrast) -> tuple[str, ...]:
    first, second, difference = contrast.first, contrast.second, contrast.difference
    scores = [f"{100 * each.mean:.1f} [{100 * each.low:.1f}, {100 * each.high:.1f}]" for each in (first, second)]
    change = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return (*scores, change, str(difference.better), str(difference.worse))
