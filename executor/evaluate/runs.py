"""The scored rows of one run of `eval`, read back from its file; and the summary that lies beside it.

A row is one of `generate` (docs/datasets.md) with what scored.py adds to it.
Knows no metric: a score is a number from 0 to 1 that the run has written.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.sample import Box
from executor.errors import UserError, printable

_TEXT, _TEXT_OR_NONE, _NUMBER = (str,), (str, type(None)), (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    **{"id": _TEXT, "dataset": _TEXT, "metric": _TEXT, "prompt": _TEXT, "media": (list,), "references": (list,)},
    **{"text": _TEXT_OR_NONE, "extracted": _TEXT_OR_NONE, "labels": (dict,), "error": _TEXT_OR_NONE},
    **{"score": _NUMBER, "sources": (list,), "index": (int,)},
}


@dataclass(frozen=True)
class ScoredRow:
    """One sample as a run has answered it."""

    index: int  # in its data set
    id: str
    labels: Mapping[str, str]  # what scores are broken down by
    question: str
    media: tuple[str, ...]  # short names, for people
    sources: tuple[str | None, ...]  # where each lies: a path or address; None: in the data set itself
    references: tuple[str, ...]
    text: str | None  # what the model has said; None where it could not be asked
    extracted: str | None  # what of it was scored
    score: float  # from 0 to 1
    error: str | None
    boxes: tuple[Box, ...] = ()  # where the thing asked for is, as parts of the picture's width and height
    said_boxes: tuple[Box, ...] = ()  # where the answer has it


@dataclass(frozen=True)
class Run:
    """All rows of one file, in their order."""

    path: Path
    dataset: str
    metric: str
    rows: tuple[ScoredRow, ...]
    summary: Mapping[str, Any]  # what eval has written beside the rows; empty where that is not there

    @property
    def name(self) -> str:
        """What to call the run beside another one."""
        return self.path.stem

    @property
    def model(self) -> str:
        """The checkpoint and its numbers, as far as they are known."""
        model = self.summary.get("recipe", {}).get("model_config", {})
        words = [Path(str(model.get("model_path", ""))).name, model.get("dtype"), model.get("quantization")]
        return ", ".join(str(word) for word in words if word not in ("", None, "none"))


def summary_path(results_path: str | Path) -> Path:
    """Where the summary of a file of rows lies: a.summary.json beside a.jsonl."""
    path = Path(results_path).expanduser()
    return path.with_name(f"{path.stem}.summary.json")


def read_run(path: Path) -> Run:
    """The run that wrote the file. UserError where it is no file of scored rows."""
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the rows that eval has written") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: there are no rows in it; give the rows that eval has written")
    trees = [_tree(line, path, number) for number, line in numbered]
    for key in ("dataset", "metric"):
        values = sorted({tree[key] for tree in trees})
        if len(values) > 1:
            raise UserError(f"{path}: holds rows of more than one {key}: {', '.join(values)}; keep one of them")
    rows = tuple(_row(tree) for tree in trees)
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f"{path}: the sample {row.id} is in it twice; keep one of its rows")
        seen.add(row.id)
    return Run(path, trees[0]["dataset"], trees[0]["metric"], rows, _summary(summary_path(path)))


def _tree(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} line {number}: no JSON ({error}). Give the rows that eval has written; after an interrupted run "
            "the same eval command goes on and mends them"
        ) from error
    if not isinstance(tree, dict) or "text" not in tree:
        raise UserError(f"{path} line {number}: no answer to a sample; give the rows that eval has written (JSONL)")
    if "score" not in tree:
        raise UserError(f"{path} line {number}: an answer without a score, as generate writes them; score it with eval")
    for key, types in _FIELDS.items():
        if type(tree.get(key)) not in types:
            raise UserError(f"{path} line {number}: {key} is missing or of another kind; give the rows as they were")
    lists_of_texts = (tree["media"], tree["references"], [source for source in tree["sources"] if source is not None])
    if not all(isinstance(item, str) for items in lists_of_texts for item in items):
        raise UserError(f"{path} line {number}: media, references and sources hold texts; give the rows as they were")
    if not 0 <= tree["score"] <= 1:
        raise UserError(f"{path} line {number}: the score is {tree['score']}; scores are from 0 to 1")
    return tree


def _row(tree: Mapping[str, Any]) -> ScoredRow:
    return ScoredRow(
        index=tree["index"],
        id=tree["id"],
        labels={str(key): str(value) for key, value in tree["labels"].items()},
        question=tree["prompt"],
        media=tuple(tree["media"]),
        sources=tuple(tree["sources"]),
        references=tuple(tree["references"]),
        text=tree["text"],
        extracted=tree["extracted"],
        score=float(tree["score"]),
        error=tree["error"],
        boxes=_boxes(tree.get("boxes", ())),
        said_boxes=_boxes(tree.get("said_boxes", ())),
    )


def _boxes(value: Any) -> tuple[Box, ...]:
    """Boxes of four numbers each; UserError for anything else."""
    is_list = isinstance(value, list | tuple) and all(isinstance(box, list) and len(box) == 4 for box in value)
    numbers = [number for box in value for number in box] if is_list else []
    if not is_list or not all(type(number) in _NUMBER and math.isfinite(number) for number in numbers):
        raise UserError(
            "boxes and said_boxes of a row are lists of four numbers, all finite; give the rows of eval as they were"
        )
    return tuple(tuple(float(number) for number in box) for box in value)


def _summary(path: Path) -> Mapping[str, Any]:
    """Empty where there is none; UserError where it cannot be read."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{printable(str(path))}: cannot be read ({error}); mend it or take it away") from error
    recipe = tree.get("recipe", {}) if isinstance(tree, dict) else None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model_config", {}), dict):
        raise UserError(f"{printable(str(path))}: no summary as eval writes them; mend it or take it away")
    return tree


def by_label(rows: Iterable[Any], labels_of: Callable[[Any], Mapping[str, str]]) -> dict[str, dict[str, list[Any]]]:
    """{label: {value: its rows}}, both by name: what a score is broken down into. Rows may have no labels."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        for label, value in labels_of(row).items():
            found.setdefault(label, {}).setdefault(value, []).append(row)
    return {label: dict(sorted(found[label].items())) for label in sorted(found)}
