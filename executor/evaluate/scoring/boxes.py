"""Grounding: the box in an answer against the box of the thing asked for.

Read are the forms of Qwen2.5-VL and Qwen3-VL ({"bbox_2d": [x1, y1, x2, y2]}), a plain list of four numbers, and
Qwen-VL's (x1,y1),(x2,y2). As in eval_mm/evaluate_grounding.py of QwenLM/Qwen-VL the first box counts, and it is right
where its intersection over union with the true one is at least 0.5.
"""

import math
import re

from dataset.sample import Box, Sample
from executor.evaluate.scoring.score import BoxSpace, Score

RIGHT_IOU = 0.5
ROUNDING = 1e-9  # of shares of a picture's sides: half of a box is half of it in any units
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LIST = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_NAMED = re.compile(r"""["']?(?:bbox_2d|bbox|box_2d|box)["']?\s*:\s*""" + _LIST.pattern)
_CORNERS = re.compile(r"\(" + _NUMBER + "," + _NUMBER + r"\)\s*,\s*\(" + _NUMBER + "," + _NUMBER + r"\)")


def score(text: str, sample: Sample, space: BoxSpace | None = None) -> Score:
    """1 where the first box of the text overlaps a true one enough, else 0; the overlap itself is in the details."""
    assert space is not None, "a box means nothing without the units it is written in"
    said = boxes_in(text)
    if not said:
        return Score(0.0, "", {"iou": 0.0})
    x1, y1, x2, y2 = said[0]
    box = (x1 / space.width, y1 / space.height, x2 / space.width, y2 / space.height)
    overlap = max(iou(box, true) for true in sample.boxes)
    return Score(float(overlap >= RIGHT_IOU - ROUNDING), str([plain(value) for value in said[0]]), {"iou": overlap})


def boxes_in(text: str) -> list[Box]:
    """Every box of an answer in its order, in the answer's own units. Named ones, where there are any, go alone."""
    for pattern in (_NAMED, _LIST, _CORNERS):
        found = [tuple(float(number) for number in match.groups()) for match in pattern.finditer(text)]
        found = [box for box in found if all(map(math.isfinite, box))]  # hundreds of digits are no number
        if found:
            return found
    return []


def in_units(box: Box, space: BoxSpace) -> Box:
    """A box of parts of a picture, in a model's units."""
    return (box[0] * space.width, box[1] * space.height, box[2] * space.width, box[3] * space.height)


def iou(one: Box, other: Box) -> float:
    """Intersection over union, 0 to 1. A box whose corners are the wrong way round is empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (one, other)]
    union = sum(areas) - both
    return both / union if union > 0 else 0.0


def plain(value: float) -> int | float:
    """A whole number without its point."""
    return int(value) if value.is_integer() else value
