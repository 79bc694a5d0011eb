"""Boxes and points that an answer names, drawn on a copy of the picture.

Answers come as models write them: fenced JSON, several objects, cut off in the middle, numbers without end. What can be
read is read, the rest is left; no text raises. Knows the two conventions of coordinates, not which family uses which.
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

MAX_MARKS = 1000  # more are not seen apart, and would take minutes to draw
LABEL_CHARACTERS = 80
# The parsers recurse, and Python's own can exhaust the stack; deeper objects are no boxes.
_OBJECT_DEPTH, _PYTHON_CHARACTERS = 50, 20_000

_INNERMOST_OBJECT = re.compile(r"\{[^{}]*\}")
_IDLE_BACKSLASH = re.compile(r"\\(?![\\'\"abfnrtvxuUN0-7\n])")
_NUMBER = r"\s*[-+]?[0-9]{1,15}(?:\.[0-9]{0,15})?\s*"
_NUMBER_TEXT = re.compile(_NUMBER)
_NUMBERS_TEXT = re.compile(rf"\s*[\[(]?({_NUMBER}(?:,{_NUMBER})+)[\])]?\s*")


@dataclass(frozen=True)
class Mark:
    """A box (x1, y1, x2, y2) or a point (x, y) with its label, in the answer's own unit or in pixels."""

    coordinates: tuple[float, ...]
    label: str = ""

    @property
    def is_box(self) -> bool:
        return len(self.coordinates) == 4


def find_marks(text: str) -> list[Mark]:
    """Boxes and points of the JSON objects in `text`, in their order, MAX_MARKS at most; what cannot be read is passed
    over."""
    marks: list[Mark] = []
    for match in _INNERMOST_OBJECT.finditer(text):
        item = _read_object(match.group())
        label = next(filter(None, (_label(item.get(key)) for key in LABEL_KEYS)), "")
        for key in (*BOX_KEYS, *POINT_KEYS):
            for numbers in _number_lists(item.get(key), 4 if key in BOX_KEYS else 2):
                marks.append(Mark(numbers, label))
                if len(marks) == MAX_MARKS:
                    return marks
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
    font = _font(max(10, side // 50))
    colors: dict[str, str] = {}
    for mark in marks:
        color = colors.setdefault(mark.label, COLORS[len(colors) % len(COLORS)])
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


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; where Pillow was built without FreeType its bitmaps, which are of one size."""
    try:
        return ImageFont.load_default(size=size)
    except (ImportError, OSError):
        return ImageFont.load_default_imagefont()


def _write_label(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    label: str,
    color: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """White on `color`, above `corner` where there is room, and never outside the picture."""
    if isinstance(font, ImageFont.ImageFont):  # bitmaps of Latin letters
        label = label.encode("latin-1", "replace").decode("latin-1")
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else min(corner[1], size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 2 - left, y + 2 - top), label, fill="white", font=font)


def _read_object(text: str) -> dict[str, Any]:
    depth = deepest = 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        deepest = max(deepest, depth)
    if deepest > _OBJECT_DEPTH:
        return {}
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):  # also an integer of more digits than Python converts
        if len(text) > _PYTHON_CHARACTERS:
            return {}
        try:
            # Single quotes, a trailing comma. Python would warn of backslashes that mean nothing.
            item = ast.literal_eval(_IDLE_BACKSLASH.sub(r"\\\\", text))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return {}
    return item if isinstance(item, dict) else {}


def _label(value: Any) -> str:
    """A label of one line that any font can be asked for; "" for what is none."""
    if isinstance(value, list | tuple):
        value = ", ".join(item for item in value if isinstance(item, str))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = format(value, ".6g") if isinstance(value, float) or abs(value) > 10**15 else str(value)
    if not isinstance(value, str):
        return ""
    # Line breaks, control characters, halves of characters.
    line = " ".join("".join(c if c.isprintable() else " " for c in value[: 4 * LABEL_CHARACTERS]).split())
    return line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 3] + "..."


def _number_lists(value: Any, count: int) -> list[tuple[float, ...]]:
    """Lists of `count` numbers: `[1, 2]` is one of them, `[[1, 2], [3, 4]]` are two; two corners are a box."""
    if isinstance(value, str) and (match := _NUMBERS_TEXT.fullmatch(value)):
        value = match[1].split(",")
    if not isinstance(value, list | tuple) or not value:
        return []
    lists = list(value) if all(isinstance(item, list | tuple) for item in value) else [value]
    if count == 4 and [len(numbers) for numbers in lists] == [2, 2]:
        lists = [[*lists[0], *lists[1]]]
    read = [tuple(_number(number) for number in numbers) for numbers in lists if len(numbers) == count]
    return [numbers for numbers in read if None not in numbers]


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; None for everything else."""
    if isinstance(value, str) and _NUMBER_TEXT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
