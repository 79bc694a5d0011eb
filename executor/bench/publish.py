"""What happens to a report: tables for people, a file, charts, and the document of the last line."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from executor.bench.document import document, errors_of
from executor.bench.results import Report, is_results_file, save
from executor.bench.table import beside_table, load_table, overview_table, startup_table
from executor.errors import UserError
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def now() -> str:
    """For Report.created."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def results_place(recipe: Recipe, mode: str, created: str) -> Path:
    """Where the results go: bench_config.results_path, or a new file under output_path, named by mode and time.

    Raises UserError, before anything is measured, where no file can be there.
    """
    key = "bench_config.results_path" if recipe.bench.results_path is not None else "model_config.output_path"
    path = Path(recipe.bench.results_path or recipe.model.output_path)
    try:
        path = path.expanduser()
        if recipe.bench.results_path is None:
            time = created[:19].replace("-", "").replace(":", "").replace("T", "_")
            names = (f"bench_{mode}_{time}{more}.json" for more in ("", *(f"_{number}" for number in range(2, 1000))))
            path = next(path / name for name in names if not (path / name).exists())
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            pass
        if is_new:
            path.unlink()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key}: results go to {path}, which cannot be written ({reason}); give another place"
        ) from error
    if not is_new and path.is_file() and not is_results_file(path):
        raise UserError(f"{key}: {path} is there and holds no results of bench; give another file")
    return path


def publish(recipe: Recipe, report: Report, path: Path, out: TextIO) -> tuple[dict[str, Any], int]:
    """Print, save and draw a report with at least one point; the document and the exit status.

    A failed request is a result, told beside the figures, which are of the others. Status 2 only where all failed.
    """
    for point in report.points:
        if len(report.points) > 1:
            print(f"\n{point.load.words}", file=out)
        print(load_table(point), beside_table(point), sep="\n", file=out, flush=True)
    if len(report.points) > 1:
        print(f"\n{overview_table(report.points)}", file=out)
    started = startup_table(report.startup)
    if started:
        print(f"\n{started}", file=out)
    save(report, path)
    print(f"results: {path}", file=out, flush=True)
    told = document(report)
    told["results_path"] = str(path)
    if recipe.bench.plot:
        from executor.bench.plot import draw  # matplotlib takes a moment that other runs need not wait for

        told["plots"] = [str(chart) for chart in draw([report], path.with_suffix(""))]
        for chart in told["plots"]:
            print(f"chart: {chart}", file=out, flush=True)
    errors = errors_of(report)
    for reason, count in errors.items():
        logger.error("%d requests failed: %s", count, reason)
    answered = any(request.error is None for point in report.points for run in point.runs for request in run.requests)
    return told, 0 if answered else 2
