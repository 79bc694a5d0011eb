"""Data sets that are damaged, or that a stranger made with intent: a bad row is that row's error, and names nothing
outside of its folder; a bad file is refused in words."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dataset.sample import Sample
from executor.errors import UserError
from tests.dataset.forms import CLIP, base64_of, embedded, json_file, load, parquet, picture_file, png, table

ROW = {"question": "What?", "answers": ["red"], "image": embedded(png())}
ENTRY = {"image_id": "x", "question": "What?", "question_id": 3, "answers": ["red"]}
TABLE_ROW = {"index": "0", "question": "What?", "answer": "['red', 'blue']", "image": base64_of(png())}
SUBJECT_ROW = {
    **{"id": "validation_Math_1", "question": "<image 1> What?", "options": "['a', 'b']", "answer": "A"},
    **{"question_type": "multiple-choice", "image_1": embedded(png())},
}
PHRASE = {"image": "x.png", "sent": "the cat", "bbox": [1, 2, 30, 40], "width": 64, "height": 48}
CHOICE = {"video": "a.mp4", "question": "What?", "candidates": ["cat", "dog"], "answer": "dog"}


def textvqa(folder: Path, *changes: dict[str, Any]) -> list[Sample]:
    parquet(folder / "validation-0.parquet", [{**ROW, **changed} for changed in changes])
    return load("textvqa", folder)


def official(folder: Path, *changes: dict[str, Any]) -> list[Sample]:
    json_file(folder / "TextVQA_0.5.1_val.json", {"data": [{**ENTRY, **changed} for changed in changes]})
    picture_file(folder / "train_images" / "x.jpg")
    return load("textvqa", folder)


def subject(folder: Path, **changed: Any) -> Sample:
    parquet(folder / "Math" / "validation-0.parquet", [{**SUBJECT_ROW, **changed}])
    return load("mmmu", folder)[0]


def phrase(folder: Path, **changed: Any) -> Sample:
    json_file(folder / "refcoco_val.jsonl", [{**PHRASE, **changed}])
    picture_file(folder / "train2014" / "x.png")
    return load("refcoco", folder)[0]


def choice(folder: Path, **changed: Any) -> Sample:
    json_file(folder / "t.json", [{**CHOICE, **changed}])
    (folder / "video").mkdir(exist_ok=True)
    (folder / "video" / "a.mp4").write_bytes(CLIP)
    return load("video_mc", folder)[0]


@pytest.mark.parametrize(
    ("answers", "accepted"), [(["red", None, " "], ("red",)), ([None], ()), ([], ()), (5, ("5",)), ("", ())]
)
def test_what_is_null_or_blank_is_no_accepted_answer(tmp_path, answers, accepted):
    assert textvqa(tmp_path, {"answers": answers})[0].references == accepted
    assert official(tmp_path / "official", {"answers": answers})[0].references == accepted


def test_a_blank_answer_would_be_in_every_text(tmp_path):
    entry = {"image_path": "x.png", "question": "What?", "answers": [""], "type": "t", "dataset_name": "d"}
    json_file(tmp_path / "OCRBench.json", [entry])
    picture_file(tmp_path / "OCRBench_Images" / "x.png")
    assert "there is no answer" in load("ocrbench", tmp_path)[0].error


@pytest.mark.parametrize("answer", [[], {}, "", " ", [""], [None]])
def test_an_own_row_without_an_answer(tmp_path, answer):
    path = json_file(tmp_path / "mine.jsonl", [{"question": "What?", "answer": answer}])
    assert load("jsonl", path)[0].references == ()


@pytest.mark.parametrize("answers", [{"x": 1}, [["red"]], [{"answer": "red"}]])
def test_objects_are_no_answers(tmp_path, answers):
    assert "neither a text nor a number" in textvqa(tmp_path, {"answers": answers})[0].error


def test_an_object_is_no_question(tmp_path):
    assert "question holds" in official(tmp_path, {"question": {"a": 1}})[0].error


@pytest.mark.parametrize("field", ["question", "question_id", "answers"])
def test_half_a_character_is_its_rows_error(tmp_path, field):
    first, second = official(tmp_path, {field: "cut \ud83d"}, {})
    assert "half a character" in first.error
    assert second.error is None


def test_half_a_character_spelled_out_in_a_list(tmp_path):
    assert "half a character" in subject(tmp_path, options="['\\ud83d', 'b']").error


def test_a_name_cannot_break_a_line_or_steer_a_terminal(tmp_path):
    (sample,) = official(tmp_path, {"question_id": "3\n\x1b[31m\u202e"})
    assert sample.id == "TextVQA_0.5.1_val.json entry 1 (3??[31m?)"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "train_images/../../outside", "../sub/../outside"])
def test_pictures_lie_in_the_folder(tmp_path, name):
    picture_file(tmp_path / "outside.jpg")
    name = str(tmp_path / "outside") if name.startswith("/") else name
    (sample,) = official(tmp_path / "set", {"image_id": name})
    assert "there is no file outside.jpg" in sample.error
    (embedded_path,) = textvqa(tmp_path / "parquet", {"image": embedded(None, str(tmp_path / "outside.jpg"))})
    assert "there is no file outside.jpg" in embedded_path.error


def test_a_path_of_another_machine_counts_by_its_last_part(tmp_path):
    (sample,) = official(tmp_path, {"image_id": "/home/somebody/textvqa/x"})
    assert sample.media == ["x.jpg"]


def test_links_in_the_folder_are_followed(tmp_path):
    picture_file(tmp_path / "blobs" / "1.jpg")
    folder = tmp_path / "set"
    (folder / "train_images").mkdir(parents=True)
    (folder / "train_images" / "y.jpg").symlink_to(tmp_path / "blobs" / "1.jpg")
    assert official(folder, {"image_id": "y"})[0].error is None


@pytest.mark.parametrize("name", ["../", "..", "/etc", "video/../../x.mp4"])
def test_videos_lie_in_the_folder(tmp_path, name):
    (tmp_path / "x.mp4").write_bytes(CLIP)
    assert "is outside of" in choice(tmp_path / "set", video=name).error


def test_the_folder_itself_is_no_video(tmp_path):
    assert "there is no video ." in choice(tmp_path, video=".").error


@pytest.mark.parametrize("answer", ["B", "b", "dog", "(B)", "B.", "B. dog"])
def test_a_choices_letter_in_any_usual_form(tmp_path, answer):
    assert choice(tmp_path, answer=answer).references == ("B",)
    assert choice(tmp_path, answer=answer, candidates=["A. cat", "B. dog"]).references == ("B",)


@pytest.mark.parametrize("answer", ["C", "B. cat", "ß", 1, None, ["dog"], ""])
def test_no_choices_letter(tmp_path, answer):
    assert "answer must be one of the options" in choice(tmp_path, answer=answer).error


def test_more_options_than_letters(tmp_path):
    options = [f"option {number}" for number in range(27)]
    assert "27 options, and 26 letters" in choice(tmp_path, candidates=options, answer="A").error
    assert "27 options, and 26 letters" in subject(tmp_path, options=str(options)).error
    assert subject(tmp_path, options=str(options[:26])).error is None


@pytest.mark.parametrize("answer", ["C", "AB", "5"])
def test_a_letter_that_no_option_has(tmp_path, answer):
    assert "none of the letters of 2 options" in subject(tmp_path, answer=answer).error


@pytest.mark.parametrize("bbox", [[1, 2, float("inf"), 4], [float("nan")] * 4, [True, 0, 5, 5], [1, 2, 3]])
def test_a_box_is_four_finite_numbers(tmp_path, bbox):
    assert "bbox must be four numbers" in phrase(tmp_path, bbox=bbox).error


@pytest.mark.parametrize("width", [0, -5, "64", float("nan"), True, None])
def test_a_size_that_is_none_is_the_pictures(tmp_path, width):
    assert phrase(tmp_path, width=width).boxes == phrase(tmp_path).boxes


def test_phrases_of_one_box_have_names_of_their_own(tmp_path):
    row = {"answer": ["cat", "the cat"], "bbox": [1.0, 2.0, 3.0, 4.0], "question_id": "7", "image": embedded(png())}
    parquet(tmp_path / "val-0.parquet", [row, {**row, "answer": ["dog"]}])
    names = [sample.id for sample in load("refcoco", tmp_path)]
    assert names == [
        "val-0.parquet row 1 (7, phrase 1)",
        "val-0.parquet row 1 (7, phrase 2)",
        "val-0.parquet row 2 (7)",
    ]


@pytest.mark.parametrize("answer", ["[red]", "[" * 3000 + "]"])
def test_a_bad_list_in_a_table_stops_no_other_row(tmp_path, answer):
    table(tmp_path / "TextVQA_VAL.tsv", [{**TABLE_ROW, "answer": answer}, TABLE_ROW])
    first, second = load("textvqa", tmp_path)
    assert "answer is no list" in first.error
    assert second.references == ("red", "blue")


@pytest.mark.parametrize("answer", ["", "['', None]"])
def test_a_table_without_an_answer(tmp_path, answer):
    table(tmp_path / "TextVQA_VAL.tsv", [{**TABLE_ROW, "answer": answer}])
    assert load("textvqa", tmp_path)[0].references == ()


def test_what_is_called_parquet_and_is_no_file(tmp_path):
    path = tmp_path / "validation-0.parquet"
    path.mkdir()
    with pytest.raises(UserError, match="is no readable Parquet file"):
        load("textvqa", tmp_path)
    path.rmdir()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no readable Parquet file"):
        load("textvqa", tmp_path)


def test_a_column_that_cannot_be_told_in_python(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = {"question": pa.array([2**62], pa.timestamp("us")), "answers": [["red"]], "image": [png()]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "validation-0.parquet")
    with pytest.raises(UserError, match="is no readable Parquet file"):
        load("textvqa", tmp_path)


def test_damaged_bytes_are_refused_or_a_rows_error(tmp_path):
    path = parquet(tmp_path / "validation-0.parquet", [ROW] * 20, row_group_size=5)
    content = path.read_bytes()
    for seed in range(40):
        damaged = bytearray(content)
        for number in range(8):
            damaged[-(9 + (seed * 7919 + number * 104729) % 2000)] = (seed * 31 + number) % 256
        path.write_bytes(damaged[: len(content) - seed % 5 * 100])
        try:
            samples = load("textvqa", tmp_path)
        except UserError:
            continue
        assert all(isinstance(sample, Sample) for sample in samples)


def test_a_ring_of_links(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(textvqa(tmp_path, {})) == 1
    os.symlink("itself", tmp_path / "itself")
    assert len(textvqa(tmp_path, {})) == 1


def test_random_prompts_need_a_recipe(tmp_path):
    with pytest.raises(UserError, match="random is drawn for a recipe"):
        load("random", tmp_path)


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 5000, "x\0y"):
        (sample,) = official(tmp_path, {"image_id": name})
        assert sample.error
        json.dumps(sample.error)
