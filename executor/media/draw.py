"""Boxes and points that an answer names, drawn on a copy of the picture.

Answers come as models write them: fenced JSON, several objects, cut off in the middle. What can be read is read, the
rest is left. Knows the two conventions of coordinates, not which family uses which.
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

Convention = Literal["absolute", "relative_1000"]  # pixels of the resized picture; thousandths of either side

BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
POINT_KEYS = ("point_2d", "point", "points")
LABEL_KEYS = ("label", "name", "text_content", "text", "category")
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")

_INNERMOST_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2) or a point (x, y) with its label, in the answer's own unit or in pixels."""

    coordinates: tuple[float, ...]
    label: str = ""

    @property
    def is_box(self) -> bool:
        return len(self.coordinates) == 4


def find_marks(text: str) -> list[Mark]:
    """Boxes and points of all JSON objects in `text`, in their order; objects that cannot be read are passed over."""
    marks = []
    for match in _INNERMOST_OBJECT.finditer(text):
        item = _read_object(match.group())
        label = next((str(item[key]) for key in LABEL_KEYS if isinstance(item.get(key), str | int)), "")
        for key in (*BOX_KEYS, *POINT_KEYS):
            for numbers in _number_lists(item.get(key)):
                if len(numbers) == (4 if key in BOX_KEYS else 2):
                    marks.append(Mark(numbers, label))
    return marks


def to_pixels(
    marks: Sequence[Mark], convention: Convention, resized_hw: tuple[int, int], picture_hw: tuple[int, int]
) -> list[Mark]:
    """The marks in pixels of the original picture, boxes with their upper left corner first, all inside it."""
    height, width = picture_hw
    unit_h, unit_w = resized_hw if convention == "absolute" else (1000, 1000)
    scaled = []
    for mark in marks:
        xs = [min(max(x * width / unit_w, 0), width - 1) for x in mark.coordinates[0::2]]
        ys = [min(max(y * height / unit_h, 0), height - 1) for y in mark.coordinates[1::2]]
        coordinates = (min(xs), min(ys), max(xs), max(ys)) if mark.is_box else (xs[0], ys[0])
        scaled.append(Mark(coordinates, mark.label))
    return scaled


def draw_marks(picture: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy of `picture` (RGB) with `marks`, in its pixels; one colour for each label."""
    copy = picture.convert("RGB")
    if copy is picture:
        copy = picture.copy()
    pen = ImageDraw.Draw(copy)
    side = max(copy.size)
    line = max(1, side // 300)
    font = ImageFont.load_default(size=max(10, side // 50))
    labels = list(dict.fromkeys(mark.label for mark in marks))
    for mark in marks:
        color = COLORS[labels.index(mark.label) % len(COLORS)]
        if mark.is_box:
            pen.rectangle(mark.coordinates, outline=color, width=line)
            corner = (mark.coordinates[0], mark.coordinates[1])
        else:
            x, y = mark.coordinates
            radius = max(2, side // 150)
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline="white")
            corner = (x + radius, y + radius)
        if mark.label:
            _write_label(pen, corner, mark.label, color, font, copy.size)
    return copy


def _write_label(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    label: str,
    color: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """White on `color`, above `corner` where there is room, and never outside the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else min(corner[1], size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 2 - left, y + 2 - top), label, fill="white", font=font)


def _read_object(text: str) -> dict[str, Any]:
    try:
        item = json.loads(text)
    except json.JSONDecodeError:
        try:
            item = ast.literal_eval(text)  # single quotes, a trailing comma
        except (ValueError, SyntaxError, RecursionError):
            return {}
    return item if isinstance(item, dict) else {}


def _number_lists(value: Any) -> list[tuple[float, ...]]:
    """`[1, 2]` as one list of numbers, `[[1, 2], [3, 4]]` as two; anything else as none."""
    if not isinstance(value, list | tuple) or not value:
        return []
    lists = value if all(isinstance(item, list | tuple) for item in value) else [value]
    good = [numbers for numbers in lists if all(_is_number(number) for number in numbers)]
    return [tuple(float(number) for number in numbers) for numbers in good]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
