"""Boxes and points are found in whatever shape models write them, and land on the right pixels."""

import json
import random
import time

import numpy as np
import pytest
from PIL import Image, ImageFont

from executor.media.draw import MAX_MARKS, Mark, draw_marks, find_marks, to_pixels


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]', [Mark((1, 2, 3, 4), "cat")]),
        ('```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "cat"}\n]\n```', [Mark((1, 2, 3, 4), "cat")]),
        ('Here: {"point_2d": [5, 6], "label": "nose"}. Good?', [Mark((5, 6), "nose")]),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7', [Mark((1, 2, 3, 4))]),  # cut off by max_new_tokens
        ("[{'bbox_2d': [1, 2.5, 3, 4], 'label': 'a \"b\"',}]", [Mark((1, 2.5, 3, 4), 'a "b"')]),
        ('{"objects": [{"bbox": [1, 2, 3, 4], "name": "x"}]}', [Mark((1, 2, 3, 4), "x")]),
        ('{"points": [[1, 2], [3, 4]], "label": "eyes"}', [Mark((1, 2), "eyes"), Mark((3, 4), "eyes")]),
        ('{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3], "label": 7}', [Mark((1, 2, 3, 4), "7"), Mark((2, 3), "7")]),
        ('{"bbox_2d": ["1", " 2.5", "3", "-4"], "label": "x"}', [Mark((1, 2.5, 3, -4), "x")]),
        ('{"bbox_2d": "[1, 2, 3, 4]"} {"point_2d": "5,6"}', [Mark((1, 2, 3, 4)), Mark((5, 6))]),
        ('{"bbox_2d": [[1, 2], [3, 4]]}', [Mark((1, 2, 3, 4))]),  # two corners
        ('{"bbox_2d": [-5, 1e300, 3, 1e5]}', [Mark((-5, 1e300, 3, 1e5))]),
        ('{"bbox_2d": [1, 2, 3, 1e999]} {"point_2d": [-Infinity, 0]}', []),
        (f'{{"point_2d": [1, {"9" * 400}]}} {{"point_2d": [1, {"9" * 5000}]}} {{"point_2d": [2, 3]}}', [Mark((2, 3))]),
        ('{"point_2d": ' + "[" * 100_000 + "]" * 100_000 + '} {"point_2d": [2, 3]}', [Mark((2, 3))]),
        ("{'point_2d': " + "(" * 9_000 + ")" * 9_000 + "} {'point_2d': (2, 3)}", [Mark((2, 3))]),
        ("{'point_2d': " + "-" * 9_000 + "1}", []),
        ("{'a': '\\d', 'point_2d': [1, 2], 'label': '\\d'}", [Mark((1, 2), "\\d")]),
        ('{"point_2d": [1, 2], "label": ["a", "b", 3, null]}', [Mark((1, 2), "a, b")]),
        ('{"point_2d": [1, 2], "label": null, "name": true, "text": 1.5}', [Mark((1, 2), "1.5")]),
        ('{"point_2d": [1, 2], "label": "two\\nlines\\u0000 \\ud800 end"}', [Mark((1, 2), "two lines end")]),
        ('{"bbox_2d": [1, 2, 3]} {"bbox_2d": [1, 2, 3, "x"]} {"point_2d": [1, true]}', []),
        ('{"bbox_2d": [1, 2, 3, NaN]} {"bbox_2d": null} {"label": "cat"} {broken}', []),
        ("a red square", []),
        ("{" * 500 + "}" * 500, []),
        ("", []),
    ],
)
def test_what_is_found(text, marks):
    assert find_marks(text) == marks


def test_long_labels_and_many_boxes_are_cut():
    (mark,) = find_marks(json.dumps({"point_2d": [1, 2], "label": "long " * 10_000}))
    assert len(mark.label) == 80 and mark.label.endswith("...")
    boxes = json.dumps([{"bbox_2d": [i, i, i + 9, i + 9], "label": f"box {i}"} for i in range(10_000)])
    marks = find_marks(boxes)
    assert len(marks) == MAX_MARKS and marks[-1].label == f"box {MAX_MARKS - 1}"
    started = time.monotonic()
    draw_marks(Image.new("RGB", (64, 48)), to_pixels(marks, "absolute", (10_000, 10_000), (48, 64)))
    assert time.monotonic() - started < 10


def random_answer(draw: random.Random) -> str:
    """JSON-like text of all that models have been seen to write, and worse, cut and joined at random."""
    numbers = ("0", "-1", "17", "999.5", "1e999", "-1e308", "1e400", "NaN", "Infinity", "1" * 30, "9" * 5000, "true")
    others = (
        '"12"',
        '" 3.5 "',
        '""',
        "null",
        "[]",
        "[[1, 2]]",
        '"[1, 2]"',
        "{}",
        "'7'",
        '"\\ud83d"',
        "-",
        "1 2",
        "(3, 4)",
    )
    labels = (
        '"a"',
        '"\\n\\u0000\\ud800"',
        "7",
        "1" * 5000,
        "[1, [2]]",
        '["x", "y"]',
        '{"a": 1}',
        "'it''s'",
        '"' + "w" * 999 + '"',
    )
    keys = ("bbox_2d", "bbox", "point_2d", "points", "label", "name", "text")

    def number() -> str:
        kind = draw.random()
        return str(draw.randrange(1000)) if kind < 0.8 else draw.choice(numbers if kind < 0.95 else others)

    def value() -> str:
        if draw.random() < 0.1:
            return "[" * draw.choice((5, 50, 5000))
        count = draw.choice((0, 1, 2, 3, 4, 4, 4, 5))
        return "[" + ", ".join(number() for _ in range(count)) + "]"

    items = []
    for _ in range(draw.randrange(1, 5)):
        fields = (f'"{draw.choice(keys)}": {value() if draw.random() < 0.7 else draw.choice(labels)}' for _ in range(3))
        items.append("{" + ", ".join(fields) + "}")
    text = draw.choice(("```json\n[{}]```", "{}", "[{}", "{{'a': [{}]}}")).replace("{}", ", ".join(items))
    return text.replace('"', "'") if draw.random() < 0.2 else text[: draw.choice((len(text), len(text) // 2))]


@pytest.mark.filterwarnings("error")
def test_no_answer_can_make_drawing_fail():
    draw = random.Random(0)
    found = 0
    for number in range(400):
        marks = find_marks(random_answer(draw))
        found += len(marks)
        size = draw.choice(((1, 1), (31, 17), (3, 90)))
        convention = draw.choice(("absolute", "relative_1000"))
        marks = to_pixels(marks, convention, (28, 56), size[::-1])
        for mark in marks:
            assert all(0 <= x < size[0] for x in mark.coordinates[0::2]), number
            assert all(0 <= y < size[1] for y in mark.coordinates[1::2]), number
        draw_marks(Image.new("RGB", size), marks)
    assert found > 50


def test_without_freetype_the_bitmap_font_writes_what_it_can(monkeypatch):
    def no_font(size):
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", no_font)
    drawn = draw_marks(Image.new("RGB", (90, 60)), [Mark((5, 30, 60, 50), "cat 猫")])
    assert np.asarray(drawn)[10:30].std() > 0


def test_coordinates_of_both_families():
    marks = [Mark((14, 28, 56, 112), "a"), Mark((56, 56), "b")]
    box, point = to_pixels(marks, "absolute", (112, 56), (224, 560))
    assert box.coordinates == (140, 56, 559, 223)  # kept inside the picture
    assert point.coordinates == (559, 112)
    box, point = to_pixels([Mark((125, 500, 500, 875)), Mark((0, 999))], "relative_1000", (7, 7), (80, 400))
    assert box.coordinates == (50, 40, 200, 70)
    assert point.coordinates == (0, pytest.approx(79, abs=1))


def test_a_box_written_from_the_wrong_corner_and_one_outside():
    turned, outside = to_pixels([Mark((30, 40, 10, 20)), Mark((-5, -5, 2000, 3))], "absolute", (50, 50), (50, 50))
    assert turned.coordinates == (10, 20, 30, 40)
    assert outside.coordinates == (0, 0, 49, 3)


def test_the_picture_itself_stays_as_it_is():
    picture = Image.new("RGB", (100, 80), "white")
    drawn = draw_marks(picture, [Mark((20, 30, 60, 70), ""), Mark((80, 40), "")])
    assert np.asarray(picture).min() == 255
    changed = np.argwhere((np.asarray(drawn) != 255).any(axis=-1))
    assert drawn.size == picture.size
    assert changed[:, 0].min() == 30 and changed[:, 0].max() == 70
    assert np.asarray(drawn)[30, 20].tolist() == np.asarray(drawn)[70, 60].tolist() != [255, 255, 255]
    assert np.asarray(drawn)[50, 40].tolist() == [255, 255, 255]
    assert np.asarray(drawn)[40, 80].tolist() != [255, 255, 255]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 20)])
@pytest.mark.parametrize("label", ["", "猫", "a very long label that is wider than the picture\nof two lines"])
def test_any_picture_and_label_can_be_drawn(size, label):
    picture = Image.new("L", size, 200)
    marks = to_pixels([Mark((0, 0, 1000, 1000), label), Mark((500, 500), label)], "relative_1000", (1, 1), size[::-1])
    drawn = draw_marks(picture, marks)
    assert drawn.size == size and drawn.mode == "RGB"
    assert np.asarray(drawn).std() > 0 or size == (1, 1)


def test_one_colour_for_each_label():
    marks = [Mark((5, 5, 15, 15), "a"), Mark((25, 25, 35, 35), "b"), Mark((45, 45, 55, 55), "a")]
    drawn = np.asarray(draw_marks(Image.new("RGB", (60, 60), "white"), marks))
    corners = [drawn[mark.coordinates[3], mark.coordinates[2]].tolist() for mark in marks]
    assert corners[0] == corners[2] != corners[1]
