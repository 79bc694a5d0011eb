"""Rows of published sets that cannot be asked: each is told with its place, and the others are asked."""

import pytest

from executor.errors import UserError
from tests.dataset.forms import TEN, embedded, json_file, load, parquet, picture_file, png


def test_pictures_that_are_not_there_are_named_with_where_they_were_looked_for(tmp_path):
    picture_file(tmp_path / "train_images" / "a.jpg")
    entries = [{"question": "Q?", "image_id": name, "answers": TEN} for name in ("a", "b", None)]
    json_file(tmp_path / "TextVQA_0.5.1_val.json", {"data": entries})
    good, lost, unnamed = load("textvqa", tmp_path)
    assert good.error is None
    assert lost.error.startswith("TextVQA_0.5.1_val.json entry 2: there is no file b.jpg (looked in ")
    assert str(tmp_path / "train_images") in lost.error
    assert "there is no file None.jpg" in unnamed.error


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is no readable JSON file"),
        ("[1, 2]", "wanted a list of objects under 'data'"),
        ('{"dataset": []}', "wanted a list of objects under 'data', got NoneType"),
        ('{"data": []}', "hold no rows"),
        ("\udcff", "is no readable JSON file"),
    ],
)
def test_json_of_another_form(tmp_path, content, words):
    (tmp_path / "val_v1.0.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=words):
        load("docvqa", tmp_path)


def test_json_lines_of_another_form(tmp_path):
    path = tmp_path / "refcoco_val.jsonl"
    for content, words in (("{\n", "is no readable JSON Lines file"), ("3\n", "refcoco_val.jsonl:1: wanted an object")):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            load("refcoco", tmp_path)


def test_answers_beside_textvqa_lines_are_needed(tmp_path):
    json_file(tmp_path / "textvqa_val.jsonl", [{"question": "Q?", "image": "a.jpg", "question_id": 1}])
    with pytest.raises(UserError, match="has its answers in textvqa_val_annotations.json, which is not beside it"):
        load("textvqa", tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"question": None}, "there is no question"),
        ({"question": "  "}, "there is no question"),
        ({"options": "not a list"}, "options is no list: 'not a list'"),
        ({"options": "__import__('os').getcwd()"}, "options is no list"),
        ({"options": "[]"}, "a multiple-choice question has no options"),
        ({"question": "<image 8>"}, "the column image_8 holds no picture"),
        ({"image_1": embedded(None)}, "the column image_1 holds no picture"),
    ],
)
def test_mmmu_rows(tmp_path, change, words):
    row = {"id": "validation_Math_1", "question": "<image 1>?", "options": "['1', '2']", "answer": "A"}
    row |= {"question_type": "multiple-choice", "image_1": embedded(png())}
    parquet(tmp_path / "Math" / "validation-00000-of-00001.parquet", [row, row | change])
    good, bad = load("mmmu", tmp_path)
    assert good.error is None and words in bad.error
    assert bad.error.startswith("validation-00000-of-00001.parquet row 2")


def test_mmmu_answers_of_the_part_test_are_unknown(tmp_path):
    row = {"id": "test_Math_1", "question": "<image 1>?", "options": "['1', '2']", "answer": "?"}
    row |= {"question_type": "multiple-choice", "image_1": embedded(png())}
    parquet(tmp_path / "Math" / "test-00000-of-00001.parquet", [row])
    (sample,) = load("mmmu", tmp_path, split="test")
    assert sample.error is None and sample.references == ()


@pytest.mark.parametrize(
    "box, words",
    [
        ([1, 2, 3], "bbox must be four numbers"),
        (["1", 2, 3, 4], "bbox must be four numbers"),
        (None, "bbox must be four numbers"),
        ([9, 9, 9, 20], "bbox is empty"),
    ],
)
def test_boxes_of_refcoco_lines(tmp_path, box, words):
    picture_file(tmp_path / "train2014" / "a.jpg")
    json_file(tmp_path / "refcoco_val.jsonl", [{"image": "a.jpg", "sent": "cup", "bbox": box}])
    (sample,) = load("refcoco", tmp_path)
    assert words in sample.error


def test_a_picture_whose_size_is_needed_must_open(tmp_path):
    row = {"answer": ["cup"], "bbox": [1.0, 2.0, 3.0, 4.0], "image": embedded(b"no picture")}
    parquet(tmp_path / "val-00000-of-00001.parquet", [row])
    (sample,) = load("refcoco", tmp_path)
    assert "the picture cannot be opened, and its size is needed" in sample.error


def test_charts_and_words_without_answers(tmp_path):
    parquet(tmp_path / "test-00000-of-00001.parquet", [{"question": "Q?", "image": png()}])
    (sample,) = load("chartqa", tmp_path)
    assert "there is no answer or label" in sample.error
    row = {"question": "Q?", "answer": [], "dataset": "IAM", "question_type": "x", "image": png()}
    (sample,) = load("ocrbench", parquet(tmp_path / "ocr" / "test-00000-of-00001.parquet", [row]))
    assert "there is no answer" in sample.error


def test_video_questions_need_two_options(tmp_path):
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "a.mp4").write_bytes(b"")
    json_file(tmp_path / "mine.jsonl", [{"video": "a.mp4", "question": "Q?", "candidates": ["x"], "answer": "x"}])
    (sample,) = load("video_mc", tmp_path)
    assert "there are 1 options; two are the fewest" in sample.error
