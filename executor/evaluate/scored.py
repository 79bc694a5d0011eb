"""Answers into scored rows, and scored rows into a summary.

A scored row is a row of `generate` (executor/commands/generate/rows.py) with dataset, metric, labels, references,
sources, extracted and score; where a box is asked for, boxes and said_boxes, as parts of the picture. A sample that
could not be answered scores 0: leaving it out would reward failing.
Knows no engine and no file.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dataset.sample import Dataset, Sample, media_source
from executor.errors import UserError, printable
from executor.evaluate.interval import estimate_of
from executor.evaluate.runs import by_label
from executor.evaluate.scoring.boxes import boxes_in
from executor.evaluate.scoring.score import BoxSpace, Metric

Row = dict[str, Any]


def with_answers(dataset: Dataset, metric: Metric) -> Dataset:
    """The data set as it can be scored: a sample without what `metric` needs is one with an error.

    Those that lie in memory are judged now, and there UserError is raised for all of them at once; a long row is judged
    when it is read.
    """
    lacking = [each.id for each in dataset.samples if isinstance(each, Sample) and _lacks(each, metric)]
    needed = " or ".join(metric.needs)
    if lacking:
        raise UserError(
            f"{len(lacking)} of {len(dataset)} samples have no {needed} to score an answer by, the first of them "
            f"{printable(lacking[0])}; add them (docs/datasets.md), or use generate, which scores nothing"
        )
    samples = [each if isinstance(each, Sample) else partial(_judged, each, metric) for each in dataset.samples]
    return Dataset(dataset.path, samples, dataset.files)


def _judged(load: Any, metric: Metric) -> Sample:
    sample = load()
    if not _lacks(sample, metric):
        return sample
    return Sample(
        sample.id, sample.messages, error=f"{sample.id}: it has no {' or '.join(metric.needs)} to score an answer by"
    )


def _lacks(sample: Sample, metric: Metric) -> bool:
    return sample.error is None and not metric.fits(sample)


def scored(row: Row, sample: Sample, metric: Metric, dataset: str) -> Row:
    """The row with its score. One that has a score already is scored anew, maybe by another metric; UserError where the
    sample cannot be scored by that."""
    if row["error"] is None and sample.error is not None:
        raise UserError(
            f"an earlier run has answered {sample.id}, which cannot be scored now: {sample.error}. Take the metric, or "
            "mend the data set, that it was answered with, or give another results_path"
        )
    row = {key: value for key, value in row.items() if key not in ("reference", "details")}
    row |= {
        "dataset": dataset,
        "metric": metric.name,
        "labels": dict(sample.labels),
        "references": list(sample.references),
        "sources": [_place(media_source(part)) for part in sample.media_parts],
    }
    if sample.boxes:
        row |= {"boxes": [list(box) for box in sample.boxes], "said_boxes": []}
    if row["error"] is not None:
        return row | {"extracted": None, "score": 0.0}
    space = _box_space(row, sample)
    if sample.boxes:
        units = (space.width, space.height, space.width, space.height)
        said = boxes_in(row["text"])[:1]  # the one that is scored
        row["said_boxes"] = [[value / unit for value, unit in zip(box, units, strict=True)] for box in said]
    score = metric.score(row["text"], sample, space)
    details = {"details": dict(score.details)} if score.details else {}
    return row | {"extracted": score.extracted, "score": score.value} | details


def _box_space(row: Row, sample: Sample) -> BoxSpace | None:
    """The units of the boxes in an answer about one picture."""
    sizes = row.get("media_sizes") or [{}]
    units = sizes[0].get("box_units")
    if units is None and sample.boxes:
        raise UserError(
            f"the answer to {sample.id} was saved by another release, which did not write down the units of its boxes; "
            "give another results_path"
        )
    return BoxSpace(*units) if units else None


def _place(source: Any) -> str | None:
    """Where a picture or video lies, of frames the first one; None where it lies in the data set itself."""
    if isinstance(source, list | tuple):
        source = source[0] if source else None
    if source is None or isinstance(source, bytes) or str(source)[:5].lower() == "data:":
        return None
    return printable(str(source))


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of all rows of a run: score, samples, ci95, failed samples, and the same by each label's values."""
    failed = [row["id"] for row in rows if row["error"] is not None]
    breakdown = {
        label: {value: _figures(some) for value, some in values.items()}
        for label, values in by_label(rows, lambda row: row["labels"]).items()
    }
    names = sorted({name for row in rows for name in row.get("details", ())})
    means = {name: round(sum(row.get("details", {}).get(name, 0.0) for row in rows) / len(rows), 5) for name in names}
    return {
        **_figures(rows),
        "failed": len(failed),
        "failed_samples": failed,
        "unparsed": sum(row["extracted"] == "" for row in rows),  # answers in which nothing could be scored
        "details": means,  # of all samples; a failed one has 0
        "breakdown": breakdown,
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of 1, to five places."""
    estimate = estimate_of([row["score"] for row in rows])
    return {
        "score": round(estimate.mean, 5),
        "samples": estimate.num_samples,
        "ci95": [round(estimate.low, 5), round(estimate.high, 5)],
    }
