"""Boxes and points are found in whatever shape models write them, and land on the right pixels."""

import numpy as np
import pytest
from PIL import Image

from executor.media.draw import Mark, draw_marks, find_marks, to_pixels


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
        ('{"bbox_2d": [1, 2, 3]} {"bbox_2d": [1, 2, 3, "x"]} {"point_2d": [1, true]}', []),
        ('{"bbox_2d": [1, 2, 3, NaN]} {"bbox_2d": null} {"label": "cat"} {broken}', []),
        ("a red square", []),
        ("{" * 500 + "}" * 500, []),
        ("", []),
    ],
)
def test_what_is_found(text, marks):
    assert find_marks(text) == marks


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
