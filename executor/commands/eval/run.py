"""The `eval` command: answer a data set as `generate` does, score every answer, and say how sure the score is.

Rows are always saved as they come, so that an interrupted run goes on: at results_path, or else under output_path in a
file whose name stands for all that answers depend on. Scores are made anew at every run, answers are not.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.published import default_metric
from dataset.sample import Dataset
from executor.commands.generate.answering import Answers, run_work
from executor.commands.generate.rows import Row
from executor.errors import UserError
from executor.evaluate.metrics import METRICS
from executor.evaluate.runs import summary_path
from executor.evaluate.scored import scored, summary_of, with_answers
from executor.evaluate.scoring.score import Metric
from executor.host.env import code_digest, find_path
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

NOT_IN_ANSWERS = {"results_path", "limit"}
SHOWN_FAILURES = 10


def run(recipe: Recipe, build: Callable[..., Any] | None = None, out: TextIO | None = None) -> tuple[Row, int]:
    """Answer and score everything `recipe` asks; returns the JSON document and the exit status.

    `build` makes the engine (executor.commands.build.engine_of). Raises UserError for what keeps all from starting.
    """
    if recipe.eval.dump_layers is not None:
        from executor.commands.eval.layers import run_layers

        return run_layers(recipe, out)
    metric = metric_of(recipe)
    is_greedy_by_default = recipe.generation.temperature is None and not recipe.generation.do_sample
    if is_greedy_by_default:
        recipe = recipe.replace(generation={"temperature": 0.0})
    if recipe.data.results_path is None:
        recipe = recipe.replace(data={"results_path": str(usual_path(recipe))})
    return run_work(Scored(recipe, metric, is_greedy_by_default), recipe, build, out or sys.stdout)


def metric_of(recipe: Recipe) -> Metric:
    """What the recipe's data set is scored with. UserError for one that has no accepted answers."""
    name = recipe.eval.metric or default_metric(recipe.data.dataset)
    if recipe.data.prompt is not None or recipe.data.media:
        raise UserError(
            "data_config.prompt and media: eval scores a data set, whose answers are known; name one by "
            "data_config.dataset, or write a file with question and answer (dataset: jsonl)"
        )
    if name is None or recipe.data.dataset == "random":  # whose prompts nobody can answer right, by any metric
        raise UserError(
            f"data_config.dataset: {recipe.data.dataset} has no metric, since nobody has written down its right "
            "answers; name another data set (docs/datasets.md), or a metric if your rows hold answers: --metric"
        )
    return METRICS[name]


def dataset_name(recipe: Recipe) -> str:
    """The data set's name in rows; one's own file goes by its name."""
    data = recipe.data
    return Path(data.dataset_path).name if data.dataset == "jsonl" and data.dataset_path else data.dataset


def usual_path(recipe: Recipe) -> Path:
    """Where rows go without a results_path: the same file for the same answers, so that a run goes on from it.

    Its name changes with the checkpoint's files, the code, the data set and every key that answers depend on.
    """
    model = recipe.model
    folder = find_path(model.model_path)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    parts = {
        "model": model.model_dump(exclude={"output_path", "profile"}),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()],
        "generation": recipe.generation.model_dump(exclude={"draw"}),
        "data": recipe.data.model_dump(exclude=NOT_IN_ANSWERS),
        "max_model_len": recipe.scheduler.max_model_len,
        "code": code_digest(),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = f"{Path(dataset_name(recipe)).stem}-{Path(model.model_path).name}-{digest}.jsonl"
    return Path(model.output_path) / "eval" / name


class Scored:
    """Answers are scored as they come (executor.commands.generate.answering.Work)."""

    command = "eval"

    def __init__(self, recipe: Recipe, metric: Metric, is_greedy_by_default: bool) -> None:
        self._metric, self._is_greedy_by_default = metric, is_greedy_by_default
        self._name = dataset_name(recipe)
        self._sum, self._num_rows = 0.0, 0

    def dataset(self, recipe: Recipe) -> Dataset:
        return with_answers(load_dataset(recipe.data, recipe), self._metric)

    def finish(self, row: Row, dataset: Dataset) -> Row:
        row = scored(row, dataset[row["index"]], self._metric, self._name)
        self._sum += row["score"]
        self._num_rows += 1
        return row

    def printer(self, total: int, out: TextIO, already: frozenset[int]) -> None:
        """Thousands of answers are read in the rows."""

    def progress(self) -> str:
        return f"score {100 * self._sum / self._num_rows:.1f} %"

    def report(self, recipe: Recipe, answers: Answers, out: TextIO) -> Row:
        rows_path = Path(recipe.data.results_path)
        summary = {
            "command": self.command,
            "dataset": self._name,
            "metric": self._metric.name,
            **summary_of(answers.outputs),
            "model": recipe.model.model_path,
            "device": recipe.model.device,
            "seed": recipe.generation.seed,
            "greedy_by_default": self._is_greedy_by_default,
            "answered_before": len(answers.before),
            "duration_s": round(answers.seconds, 2),
            "rows": str(rows_path),
            "summary": str(summary_path(rows_path)),
        }
        told = recipe.model_dump(
            by_alias=True, include={"model", "parallel", "scheduler", "generation", "data", "eval"}
        )
        text = json.dumps({**summary, "recipe": told}, ensure_ascii=False, indent=1, default=list)
        _write(summary_path(rows_path), text + "\n")
        print(in_words(summary), file=out, flush=True)
        return summary


def _write(path: Path, text: str) -> None:
    """Whole or not at all. UserError where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the summary cannot be written ({error.strerror}). All answers are saved in the rows beside it: "
            "make room, or give another results_path, and the same command scores them at once"
        ) from error


def in_words(summary: Row) -> str:
    """The summary for people."""
    lines = [f"{summary['dataset']}, {summary['metric']}: {_figures(summary)}"]
    lines += [f"  {name}: {mean:.4f} in the mean" for name, mean in summary["details"].items()]
    for label, values in summary["breakdown"].items():
        width = max(len(label), *map(len, values))
        lines += ["", f"  {label:<{width}}  score"]
        lines += [f"  {value:<{width}}  {_figures(figures)}" for value, figures in values.items()]
    lines.append("")
    for name in summary["failed_samples"][:SHOWN_FAILURES]:
        lines.append(f"  not answered, counts as 0: {name}")
    if summary["failed"] > SHOWN_FAILURES:
        lines.append(f"  and {summary['failed'] - SHOWN_FAILURES} more")
    if summary["unparsed"]:
        lines.append(f"  nothing that could be scored in {summary['unparsed']} answers")
    if summary["answered_before"]:
        lines.append(f"  {summary['answered_before']} answers are those of an earlier run; delete the rows to ask anew")
    if summary["greedy_by_default"]:
        lines.append("  greedy, as eval is where a recipe names no temperature")
    return "\n".join([*lines, f"  rows     {summary['rows']}", f"  summary  {summary['summary']}"])


def _figures(figures: Row) -> str:
    low, high = (100 * bound for bound in figures["ci95"])
    score = f"{100 * figures['score']:.1f} % (95 % interval {low:.1f} to {high:.1f}), {figures['samples']} samples"
    return score + (f", {figures['failed']} of them failed" if figures.get("failed") else "")
