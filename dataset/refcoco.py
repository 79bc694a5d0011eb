"""`dataset: refcoco`: where in a picture is what a phrase describes (RefCOCO, RefCOCO+, RefCOCOg).

Read are the Parquet files of lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg (boxes as x, y, width, height) and
refcoco_val.jsonl, refcoco+_testA.jsonl, refcocog_test.jsonl, as Qwen-VL's eval_mm has them (boxes as corners),
beside COCO's train2014/. Every phrase is a question. The pickled files of the refer toolkit are not read: unpickling
runs what a stranger wrote.
"""

import io
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dataset.place import Place, Row, from_parquet, from_rows, picture_part, place_of, question, read_json_lines
from dataset.sample import Box, Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection

SETS = ("refcoco", "refcoco+", "refcocog")
PICTURE_FOLDERS = ("train2014", "coco/train2014", "images/train2014", "images")


def load(data: DataSection) -> Dataset:
    """The phrases of one part. UserError where no form of the set is there."""
    place = place_of("refcoco", data)
    if files := place.parquet():
        build = partial(_sample, place, corners=False)
        return from_parquet(
            place, files, build, needed=("answer", "bbox"), optional=("question_id",), spread=_phrases_of
        )
    names = [f"{name}_{place.split}.jsonl" for name in SETS]
    there = [path for path in (place.find(name) for name in names) if path is not None]
    if place.file is not None:
        there = there[:1]
    if len(there) > 1:
        raise UserError(
            f"{place.root} has {', '.join(path.name for path in there)}: these are data sets of their own; name one "
            f"file: --set data_config.dataset_path={there[0]}"
        )
    if there:
        return from_rows(place, _line_rows(place, there[0]), partial(_sample, place, corners=True), there)
    raise place.missing(f"{place.split}-*.parquet", f"{' or '.join(names)} with train2014/")


def _phrases_of(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A row of the Parquet files names one place by several phrases."""
    phrases = values.get("answer")
    phrases = phrases if isinstance(phrases, list) else [phrases]
    name = values.get("question_id")
    for number, phrase in enumerate(phrases, start=1):
        parts = [] if name is None else [str(name)]
        parts += [f"phrase {number}"] if len(phrases) > 1 else []  # samples are paired by their names
        yield {**values, "sent": phrase, "question_id": ", ".join(parts) or None}


def _sample(place: Place, row: Row, *, corners: bool) -> Sample:
    picture = row.picture("image")
    size = (row.values.get("width"), row.values.get("height"))
    width, height = size if all(is_number(each) and each > 0 for each in size) else _size(picture)
    box = _box(row.values.get("bbox"), width, height, corners)
    text = place.published.ask(row.text("sent").strip())
    return question(row, text, [picture_part(picture)], boxes=(box,))


def _box(value: Any, width: float, height: float, corners: bool) -> Box:
    """A box in pixels, as parts of its picture."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_number, value)):
        raise UserError(f"bbox must be four numbers, got {value!r}")
    x1, y1, x2, y2 = value
    if not corners:
        x2, y2 = x1 + x2, y1 + y2
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"bbox is empty: {value!r}")
    return (x1 / width, y1 / height, x2 / width, y2 / height)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(picture: str | bytes) -> tuple[int, int]:
    """Width and height by the file's head."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            return image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the picture cannot be opened, and its size is needed: {error}") from error


def _line_rows(place: Place, path: Path) -> Iterator[Row]:
    for number, entry in enumerate(read_json_lines(path), start=1):
        yield Row(f"{path.name}:{number}", entry, partial(_picture, place, str(entry.get("image"))))


def _picture(place: Place, name: str, column: str) -> str:
    return place.locate(name, *PICTURE_FOLDERS)
