"""Published benchmarks in every form that is read: question, picture, accepted answers, labels."""

from pathlib import Path

import numpy as np
import pytest

from dataset.load import load_dataset
from dataset.published import PUBLISHED, default_metric
from executor.errors import UserError
from executor.evaluate.metrics import METRICS
from executor.media.container import ContainerFrames
from executor.media.media import MediaLimits
from executor.recipe.schema import DataSection
from models.tiny.training import world
from tests.dataset.forms import (
    CLIP,
    TEN,
    base64_of,
    content_of,
    embedded,
    json_file,
    load,
    parquet,
    picture_file,
    picture_of,
    png,
    table,
)

FORMULAS = "Handwritten Mathematical Expression Recognition"
SHORT = "Answer the question using a single word or phrase."


def textvqa_parquet(folder: Path) -> None:
    rows = [
        {"question_id": 34602, "question": "what is the brand?", "image": embedded(png(1)), "answers": TEN},
        {"question_id": 34603, "question": "who is IBM?", "image": embedded(png(2)), "answers": TEN},
    ]
    parquet(folder / "data" / "validation-00000-of-00001-abc.parquet", rows)
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows[:1])


def textvqa_official(folder: Path) -> None:
    picture_file(folder / "train_images" / "003a8.jpg", 1)
    picture_file(folder / "train_images" / "004b9.jpg", 2)
    entries = [
        {"question_id": 34602, "question": "what is the brand?", "image_id": "003a8", "answers": TEN},
        {"question_id": 34603, "question": "who is IBM?", "image_id": "004b9", "answers": TEN},
    ]
    json_file(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": entries})


def textvqa_lines(folder: Path) -> None:
    picture_file(folder / "train_images" / "003a8.jpg", 1)
    picture_file(folder / "train_images" / "004b9.jpg", 2)
    lines = [
        {"question_id": 34602, "question": "what is the brand?", "image": "data/textvqa/train_images/003a8.jpg"},
        {"question_id": 34603, "question": "who is IBM?", "image": "data/textvqa/train_images/004b9.jpg"},
    ]
    answers = [{"question_id": number, "answers": [{"answer": said} for said in TEN]} for number in (34603, 34602)]
    json_file(folder / "textvqa_val.jsonl", lines)
    json_file(folder / "textvqa_val_annotations.json", {"annotations": answers})


def textvqa_table(folder: Path) -> None:
    rows = [
        {"index": 34602, "question": "what is the brand?", "answer": str(TEN), "image": base64_of(png(1))},
        {"index": 34603, "question": "who is IBM?", "answer": str(TEN), "image": base64_of(png(2))},
    ]
    table(folder / "TextVQA_VAL.tsv", rows)


@pytest.mark.parametrize("form", [textvqa_parquet, textvqa_official, textvqa_lines, textvqa_table])
def test_textvqa(tmp_path, form):
    form(tmp_path)
    first, second = load("textvqa", tmp_path)
    assert first.error is None and second.error is None
    assert content_of(first)[1]["text"] == f"What is the brand?\n{SHORT}"
    assert second.question == f"Who is IBM?\n{SHORT}"
    assert (picture_of(first), picture_of(second)) == (png(1), png(2))
    assert first.references == tuple(TEN) and "34602" in first.id


def docvqa_parquet(folder: Path) -> None:
    row = {
        "questionId": "337",
        "question": "what is the date?",
        "image": embedded(png(1)),
        "answers": ["1/8/93", "1-8-93"],
    }
    parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", [row])
    parquet(folder / "InfographicVQA" / "validation-00000-of-00001.parquet", [row | {"question": "another set"}])


def docvqa_official(folder: Path) -> None:
    picture_file(folder / "documents" / "xnbl0037_1.png", 1)
    entry = {"questionId": 337, "question": "what is the date?", "image": "documents/xnbl0037_1.png"}
    json_file(
        folder / "val_v1.0.json", {"dataset_name": "SP-DocVQA", "data": [entry | {"answers": ["1/8/93", "1-8-93"]}]}
    )


def docvqa_of_rrc(folder: Path) -> None:
    picture_file(folder / "spdocvqa_images" / "xnbl0037_1.png", 1)
    entry = {"questionId": 337, "question": "what is the date?", "image": "documents/xnbl0037_1.png"}
    path = folder / "spdocvqa_qas" / "val_v1.0_withQT.json"
    json_file(path, {"data": [entry | {"answers": ["1/8/93", "1-8-93"], "question_types": ["handwritten"]}]})


def docvqa_table(folder: Path) -> None:
    row = {"index": 337, "image": base64_of(png(1)), "question": "what is the date?", "answer": "['1/8/93', '1-8-93']"}
    table(folder / "DocVQA_VAL.tsv", [row])


@pytest.mark.parametrize("form", [docvqa_parquet, docvqa_official, docvqa_of_rrc, docvqa_table])
def test_docvqa(tmp_path, form):
    form(tmp_path)
    (sample,) = load("docvqa", tmp_path)
    assert sample.question == f"what is the date?\n{SHORT}" and "337" in sample.id
    assert sample.references == ("1/8/93", "1-8-93") and picture_of(sample) == png(1)


def chartqa_parquet(folder: Path) -> None:
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "14", "image": embedded(png(1))},
        {"type": "augmented_test", "question": "Which year?", "answer": "2018", "image": embedded(png(2))},
    ]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def chartqa_of_m4(folder: Path) -> None:
    rows = [
        {"human_or_machine": 0, "query": "How many?", "label": ["14"], "image": embedded(png(1))},
        {"human_or_machine": 1, "query": "Which year?", "label": ["2018"], "image": embedded(png(2))},
    ]
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def chartqa_official(folder: Path) -> None:
    picture_file(folder / "ChartQA Dataset" / "test" / "png" / "one.png", 1)
    picture_file(folder / "ChartQA Dataset" / "test" / "png" / "two.png", 2)
    test = folder / "ChartQA Dataset" / "test"
    json_file(test / "test_human.json", [{"imgname": "one.png", "query": "How many?", "label": "14"}])
    json_file(test / "test_augmented.json", [{"imgname": "two.png", "query": "Which year?", "label": "2018"}])


def chartqa_table(folder: Path) -> None:
    rows = [
        {"index": 0, "question": "How many?", "answer": "14", "split": "test_human", "image": base64_of(png(1))},
        {
            "index": 1,
            "question": "Which year?",
            "answer": "2018",
            "split": "test_augmented",
            "image": base64_of(png(2)),
        },
    ]
    table(folder / "ChartQA_TEST.tsv", rows)


@pytest.mark.parametrize("form", [chartqa_parquet, chartqa_of_m4, chartqa_official, chartqa_table])
def test_chartqa(tmp_path, form):
    form(tmp_path)
    human, augmented = load("chartqa", tmp_path)
    assert human.question == "How many?\nAnswer the question with a single word."
    assert (human.references, augmented.references) == (("14",), ("2018",))
    assert (human.labels, augmented.labels) == ({"part": "human"}, {"part": "augmented"})
    assert (picture_of(human), picture_of(augmented)) == (png(1), png(2))


def mmmu_rows() -> list[dict]:
    pictures = dict.fromkeys((f"image_{number}" for number in range(3, 8)), embedded(None))
    return [
        {
            "id": "validation_Accounting_1",
            "question": "<image 1> Compare with <image 2>, then <image 1> again.",
            "options": "['$6', '$7', '<image 2>', '$9']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": embedded(png(1)),
            "image_2": embedded(png(2)),
            **pictures,
        },
        {
            "id": "validation_Art_Theory_2",
            "question": "Name the style: <image 1>",
            "options": "[]",
            "answer": "['baroque', '17th century']",
            "question_type": "open",
            "image_1": embedded(png(3)),
            "image_2": embedded(None),
            **pictures,
        },
    ]


def mmmu_of_authors(folder: Path) -> None:
    accounting, art = mmmu_rows()
    parquet(folder / "Accounting" / "validation-00000-of-00001.parquet", [accounting])
    parquet(folder / "Art_Theory" / "validation-00000-of-00001.parquet", [art])
    parquet(folder / "Art_Theory" / "dev-00000-of-00001.parquet", [art])


def mmmu_of_lmms(folder: Path) -> None:
    parquet(folder / "data" / "validation-00000-of-00001-xyz.parquet", mmmu_rows())


@pytest.mark.parametrize("form", [mmmu_of_authors, mmmu_of_lmms])
def test_mmmu(tmp_path, form):
    form(tmp_path)
    accounting, art = load("mmmu", tmp_path)
    kinds = [part["type"] for part in content_of(accounting)]
    assert kinds == ["image", "text", "image", "text"]
    assert (picture_of(accounting), picture_of(accounting, 1), picture_of(art)) == (png(1), png(2), png(3))
    assert content_of(accounting)[1]["text"] == "Compare with"
    assert content_of(accounting)[3]["text"] == (
        ", then <image 1> again.\nA. $6\nB. $7\nC. <image 2>\nD. $9\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert accounting.choices == ("$6", "$7", "<image 2>", "$9") and accounting.references == ("B",)
    assert accounting.labels == {"question_type": "multiple-choice", "subject": "Accounting", "discipline": "Business"}
    assert art.question == f"Name the style:\n{SHORT}"
    assert art.choices == () and art.references == ("baroque", "17th century")
    assert art.labels["subject"] == "Art_Theory" and art.labels["discipline"] == "Art and Design"


def ocrbench_parquet(folder: Path) -> None:
    row = {"dataset": "HME100k", "question": " Write the formula. ", "question_type": FORMULAS, "answer": ["x ^ 2"]}
    parquet(folder / "data" / "test-00000-of-00001.parquet", [row | {"image": embedded(png(1))}])


def ocrbench_official(folder: Path) -> None:
    picture_file(folder / "OCRBench_Images" / "HME100k" / "one.jpg", 1)
    entry = {"dataset_name": "HME100k", "type": FORMULAS, "question": " Write the formula. ", "id": 0}
    entry |= {"image_path": "HME100k/one.jpg", "answers": ["x ^ 2"]}
    json_file(folder / "OCRBench" / "OCRBench.json", [entry])


def ocrbench_table(folder: Path) -> None:
    row = {"index": 1, "question": " Write the formula. ", "answer": "['x ^ 2']", "category": FORMULAS}
    table(folder / "OCRBench.tsv", [row | {"image": base64_of(png(1))}])


@pytest.mark.parametrize("form", [ocrbench_parquet, ocrbench_official, ocrbench_table])
def test_ocrbench(tmp_path, form):
    form(tmp_path)
    (sample,) = load("ocrbench", tmp_path)
    assert sample.question == "Write the formula." and picture_of(sample) == png(1)
    assert sample.references == ("x ^ 2",)
    assert sample.labels == {"question_type": FORMULAS, "dataset": "HME100k"}


def refcoco_parquet(folder: Path) -> None:
    row = {"question_id": "5", "answer": ["left cup", "red one"], "bbox": [16.0, 12.0, 32.0, 24.0]}
    parquet(folder / "data" / "val-00000-of-00001.parquet", [row | {"image": embedded(png(1))}])


def refcoco_lines(folder: Path) -> None:
    picture_file(folder / "train2014" / "COCO_train2014_1.jpg", 1)
    line = {"image": "data/coco/train2014/COCO_train2014_1.jpg", "bbox": [16, 12, 48, 36], "height": 48, "width": 64}
    json_file(folder / "refcoco_val.jsonl", [line | {"sent": "left cup"}, line | {"sent": "red one"}])


@pytest.mark.parametrize("form", [refcoco_parquet, refcoco_lines])
def test_refcoco_asks_for_each_phrase_and_keeps_boxes_as_parts_of_the_picture(tmp_path, form):
    form(tmp_path)
    cup, red = load("refcoco", tmp_path)
    assert cup.boxes == red.boxes == ((0.25, 0.25, 0.75, 0.75),)
    assert '"left cup"' in cup.question and '"red one"' in red.question and cup.references == ()
    assert picture_of(cup) == picture_of(red) == png(1)


def test_refcoco_reads_no_pickle_and_mixes_no_sets(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"RefCOCO, part val, needs one of: val-\*.parquet"):
        load("refcoco", tmp_path)
    refcoco_lines(tmp_path)
    (tmp_path / "refcoco+_val.jsonl").write_text((tmp_path / "refcoco_val.jsonl").read_text())
    with pytest.raises(UserError, match="are data sets of their own; name one file"):
        load("refcoco", tmp_path)
    assert len(load("refcoco", tmp_path / "refcoco+_val.jsonl")) == 2


def test_video_mme(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fFjv93ACGo8.mp4").write_bytes(CLIP)
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "sub_category": "Humanity & History",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many?",
        "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three kinds are equal."],
        "answer": "C",
    }
    parquet(tmp_path / "videomme" / "test-00000-of-00001.parquet", [row, row | {"videoID": "absent"}])
    sample, lost = load("video_mc", tmp_path)
    assert content_of(sample)[0] == {"type": "video", "video": str(tmp_path / "data" / "fFjv93ACGo8.mp4")}
    assert "How many?\nA. Apples.\nB. Candles." in sample.question and sample.question.endswith("The best answer is:")
    assert sample.references == ("C",) and sample.choices[0] == "Apples."
    assert sample.labels == {"duration": "short", "domain": "Knowledge", "task_type": "Counting Problem"}
    assert "there is no video absent (looked in data/, video/, videos/" in lost.error


def test_mvbench(tmp_path):
    for name in ("star/Charades_v1_480/ABC.mp4", "perception/videos/video_1.mp4", "other/ABC.mp4"):
        (tmp_path / "video" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "video" / name).write_bytes(CLIP)
    counting = {"video": "video_1.mp4", "question": "How often?", "candidates": ["3", "2", "4"], "answer": "2"}
    sequence = {"video": "Charades_v1_480/ABC.mp4", "question": "What first?", "candidates": ["a", "b"], "answer": "b"}
    json_file(tmp_path / "json" / "action_count.json", [counting])
    json_file(
        tmp_path / "json" / "action_sequence.json",
        [sequence | {"start": 1.5, "end": 2}, sequence | {"video": "ABC.mp4"}, sequence | {"answer": "c"}],
    )
    count, stretch, twice, odd = load("video_mc", tmp_path)
    assert count.references == ("B",) and count.labels == {"task": "action_count"}
    assert content_of(stretch)[0]["video_start"] == 1.5 and content_of(stretch)[0]["video_end"] == 2
    assert "there are 2 videos ABC.mp4" in twice.error
    assert "answer must be one of the options or its letter, got 'c'" in odd.error


def test_arena_as_published_is_read_row_by_row(tmp_path):
    """Conversations of one first turn, pictures as a list inside the file."""
    rows = [
        {"question_id": "a", "turns": [[{"content": "What is it?", "role": "user"}]], "images": [embedded(png(1))]},
        {
            "question_id": "b",
            "turns": [[{"content": "Alike?", "role": "user"}]],
            "images": [embedded(png(seed)) for seed in (2, 3)],
        },
        {"question_id": "c", "turns": [], "images": [embedded(png(4))]},
    ]
    path = parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    for place in (tmp_path, path):
        first, second, third = load("vision-arena-bench-v0.1", place)
        assert (first.id, first.question, second.question) == (
            "train-00000-of-00001.parquet row 1",
            "What is it?",
            "Alike?",
        )
        assert picture_of(first) == png(1) and [picture_of(second, index) for index in (0, 1)] == [png(2), png(3)]
        assert third.error is not None and "row 3" in third.error
    path.rename(path.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(UserError, match="number 1 is not there"):
        load("vision-arena-bench-v0.1", tmp_path)


def test_aisbench_rows_have_their_answer(tmp_path):
    picture_file(tmp_path / "a.png", 1)
    rows = [
        {"type": "image", "path": ["a.png"], "question": "What?", "answer": "a cup"},
        {"type": "image", "path": ["a.png"], "question": "What?", "answer": ["cup", "mug"]},
    ]
    one, several = load("jsonl", json_file(tmp_path / "mm_custom.jsonl", rows))
    assert one.references == ("a cup",) and one.reference == "a cup"
    assert several.references == ("cup", "mug") and several.reference == "cup"


def test_the_little_world_is_a_function_of_its_seed():
    samples = list(load_dataset(DataSection(dataset="tiny_world", limit=11, random_seed=3)))
    again = list(load_dataset(DataSection(dataset="tiny_world", limit=11, random_seed=3)))
    others = list(load_dataset(DataSection(dataset="tiny_world", limit=11, random_seed=4)))
    assert [sample.fingerprint() for sample in samples] == [sample.fingerprint() for sample in again]
    assert not {sample.fingerprint() for sample in samples} & {sample.fingerprint() for sample in others}
    assert len({sample.labels["kind"] for sample in samples}) == 11
    assert all(METRICS["exact_match"].fits(sample) for sample in samples)
    (box,) = [sample for sample in samples if sample.labels["kind"] == "box"]
    assert len(box.boxes) == 1 and box.references == () and box.boxes[0] < (1, 1, 1, 1)
    assert {sample.media_parts[0]["type"] for sample in samples} == {"image", "video"}
    assert len(load_dataset(DataSection(dataset="tiny_world"))) == 500


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_missing_names_the_set_the_files_and_where_it_is_published(tmp_path, name):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        load(name, tmp_path)
    published = PUBLISHED[name]
    assert published.title in str(caught.value) and published.published_as in str(caught.value)
    assert "parquet" in str(caught.value) and "it has readme.txt" in str(caught.value)
    with pytest.raises(UserError, match="there is no such folder"):
        load(name, tmp_path / "absent")
    with pytest.raises(UserError, match=r"readme.txt is none of these files"):
        load(name, tmp_path / "readme.txt")
    assert published.metric in METRICS and default_metric(name) == published.metric


def test_parts_are_named_as_the_set_names_them(tmp_path):
    textvqa_parquet(tmp_path)
    assert len(load("textvqa", tmp_path, split="train")) == 1
    assert len(load("textvqa", tmp_path, split="val")) == len(load("textvqa", tmp_path, split="Validation")) == 2
    with pytest.raises(UserError, match=r"TextVQA has no part 'tests' \(did you mean 'test'\?\); it has validation"):
        load("textvqa", tmp_path, split="tests")
    with pytest.raises(UserError, match="TextVQA, part test, needs one of"):
        load("textvqa", tmp_path, split="test")


def test_only_the_first_are_read_where_a_limit_says_so(tmp_path):
    textvqa_parquet(tmp_path)
    (sample,) = load("textvqa", tmp_path, limit=1)
    assert "34602" in sample.id


def test_clips_of_the_little_world_hold_its_frames_as_they_were_drawn():
    (sample,) = [
        sample
        for sample in load_dataset(DataSection(dataset="tiny_world", limit=11))
        if sample.labels["kind"] == "motion"
    ]
    scene = world.sample(0, int(sample.id.split()[-1])).scene
    video = ContainerFrames(sample.media_parts[0]["video"], "clip", MediaLimits())
    frames = [frame for _, frame in video.read(list(range(scene.num_frames)))]
    assert len(frames) == len(video.timeline.times_s) == scene.num_frames
    assert np.array_equal(np.asarray(frames), scene.frames())
