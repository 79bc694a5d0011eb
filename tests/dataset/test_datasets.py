"""Data sets in every form that is read: what is asked, about which media; and errors that name file and line."""

import base64
import json
from pathlib import Path

import pytest

from dataset import default_prompt
from dataset.load import load_dataset
from dataset.sample import Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
PNG = (MEDIA / "objects.png").read_bytes()


def rows_file(folder: Path, rows: list, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def samples_of(dataset: str, path: Path | None = None, **fields) -> list[Sample]:
    data = DataSection(dataset=dataset, dataset_path=None if path is None else str(path), **fields)
    return list(load_dataset(data))


def one(folder: Path, row: dict, dataset: str = "jsonl") -> Sample:
    (sample,) = samples_of(dataset, rows_file(folder, [row]))
    return sample


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "images" / "b.png").write_bytes(PNG)
    (tmp_path / "clip.mp4").write_bytes((MEDIA / "clip.mp4").read_bytes())
    return tmp_path


def test_default_prompt_asks_about_three_pictures_and_a_video():
    samples = samples_of("default")
    kinds = [part["type"] for sample in samples for part in sample.media_parts]
    files = {name for sample in samples for name in sample.media}
    assert all(sample.error is None and sample.question for sample in samples)
    assert kinds.count("video") >= 1
    assert len({name for name in files if not name.endswith(".mp4")}) >= 3
    assert {Path(name).suffix for name in files} == {".png", ".jpg", ".mp4"}


def test_default_prompt_takes_texts_and_objects(tmp_path, folder):
    path = folder / "prompts.json"
    path.write_text(json.dumps(["Hello", {"text": "Bye"}, {"prompt": "What?", "media": ["a.png", "clip.mp4"]}]))
    texts, objects, media = samples_of("default", path)
    assert (texts.question, texts.media) == ("Hello", [])
    assert objects.question == "Bye"
    assert (media.question, media.media) == ("What?", ["a.png", "clip.mp4"])
    assert [part["type"] for part in media.media_parts] == ["image", "video"]


def test_a_mistyped_key_of_the_default_form_is_named(folder):
    path = folder / "prompts.json"
    path.write_text('[{"prompt": "What?", "medai": ["a.png"]}]')
    (sample,) = samples_of("default", path)
    assert "prompts.json entry 1: unknown key 'medai' (did you mean 'media'?)" in sample.error


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?"},
        {"prompt": "Q?"},
        {"text": "Q?"},
        {"messages": [{"role": "user", "content": "Q?"}]},
        {"conversations": [{"from": "human", "value": "Q?"}]},
        {"turns": [[{"role": "user", "content": "Q?"}], [{"role": "user", "content": "later"}]]},
        {"turns": [{"role": "user", "content": "Q?"}]},
        {"turns": ["Q?"]},
    ],
)
@pytest.mark.parametrize(
    "picture",
    [
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"image": "images/b.png"},
        {"image": "b.png"},
        {"image": {"path": "a.png"}},
        {"images": [{"bytes": base64.b64encode(PNG).decode(), "path": None}]},
        {"images": [{"bytes": list(PNG)}]},
        {"image": base64.b64encode(PNG).decode()},
        {"image": "data:image/png;base64," + base64.b64encode(PNG).decode()},
    ],
)
def test_arena_rows_in_every_form(folder, row, picture):
    sample = one(folder, row | picture | {"model_a": "ignored"}, "vision-arena-bench-v0.1")
    assert sample.error is None
    assert sample.question == "Q?"
    (part,) = sample.media_parts
    assert part["type"] == "image"
    source = part["image"]
    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.split(",")[1])
    assert (source if isinstance(source, bytes) else Path(source).read_bytes()) == PNG
    # The picture comes before the words.
    content = next(message["content"] for message in sample.messages if message["role"] == "user")
    assert [piece["type"] for piece in content] == ["image", "text"]


def test_arena_folder_as_jsonl_and_as_json(folder):
    with pytest.raises(UserError, match=r"needs .*parquet, or with dataset.jsonl or dataset.json .* it has neither"):
        samples_of("vision-arena-bench-v0.1", folder)
    with pytest.raises(UserError, match="there is no such folder"):
        samples_of("vision-arena-bench-v0.1", folder / "absent")
    rows = [{"question": "One?", "image": "a.png"}, {"question": "Two?", "image": "b.png"}]
    (folder / "dataset.json").write_text(json.dumps(rows))
    assert [sample.question for sample in samples_of("vision-arena-bench-v0.1", folder)] == ["One?", "Two?"]
    rows_file(folder, rows[:1], "dataset.jsonl")
    (sample,) = samples_of("vision-arena-bench-v0.1", folder)
    assert sample.id == "dataset.jsonl:1"


def test_marks_place_the_media(folder):
    sample = one(folder, {"question": "<image>\nand <video> differ?", "media": ["a.png", "clip.mp4"]})
    content = sample.messages[0]["content"]
    assert [piece["type"] for piece in content] == ["image", "text", "video", "text"]
    few = one(folder, {"question": "<image> <image>", "images": ["a.png"]})
    assert "more <image> marks than pictures" in few.error
    many = one(folder, {"question": "<image>", "images": ["a.png", "b.png"]})
    assert "2 pictures and videos are given for 1" in many.error


def test_an_answer_of_the_assistant_is_the_reference(folder):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": "No."},
    ]
    sample = one(folder, {"messages": turns, "image": "a.png"})
    assert (sample.question, sample.reference, len(sample.messages)) == ("Second?", "No.", 4)
    assert sample.messages[1]["content"][0]["type"] == "image"
    assert one(folder, {"question": "Q?", "answer": 3}).reference == "3"


def test_bad_rows_among_good_ones_name_file_and_line(folder):
    path = rows_file(
        folder,
        [
            {"question": "Good?", "image": "a.png"},
            "{not json",
            "",
            {"question": "Lost?", "image": "absent.png"},
            {"image": "a.png"},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"question": "", "id": "empty"},
            {"question": "Bytes?", "image": {"bytes": "!!"}},
            "7",
            {"question": "Also good?"},
        ],
    )
    samples = samples_of("jsonl", path)
    wanted = [
        (1, None),
        (2, "not valid JSON"),
        (4, "there is no file absent.png (looked in"),
        (5, "there is no question: none of the keys messages"),
        (6, "role must be one of system, user"),
        (7, "question must be a text that is not empty"),
        (8, "not base64"),
        (9, "an entry is a text or an object, got a int"),
        (10, None),
    ]
    assert len(samples) == len(wanted)
    for sample, (line, words) in zip(samples, wanted, strict=True):
        assert sample.id.startswith(f"mine.jsonl:{line}")
        if words is None:
            assert sample.error is None
        else:
            assert sample.error.startswith(f"mine.jsonl:{line}: ") and words in sample.error


def test_files_that_are_no_data_sets(tmp_path):
    with pytest.raises(UserError, match="jsonl needs data_config.dataset_path"):
        samples_of("jsonl")
    with pytest.raises(UserError, match="there is no file"):
        samples_of("jsonl", tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="has no entries"):
        samples_of("jsonl", rows_file(tmp_path, []))


def test_own_prompt_about_own_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    data = DataSection(prompt="What?", media=("a.png", "clip.mp4"))
    (sample,) = load_dataset(data)
    assert (sample.question, sample.media) == ("What?", ["a.png", "clip.mp4"])
    with pytest.raises(UserError, match="there is no file absent.png"):
        load_dataset(DataSection(prompt="What?", media=("absent.png",)))


def test_a_folder_is_asked_file_by_file(folder):
    (folder / "images" / "c.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    (folder / "images" / "notes.txt").write_text("no media")
    samples = list(load_dataset(DataSection(prompt="What?", media=(str(folder / "images"),))))
    assert [sample.media for sample in samples] == [["b.png"], ["c.mp4"]]
    assert [sample.media_parts[0]["type"] for sample in samples] == ["image", "video"]
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no .* among the 0 files"):
        load_dataset(DataSection(prompt="What?", media=(str(folder / "empty"),)))


def test_limit_and_length_agree(folder):
    path = rows_file(folder, [{"question": f"{index}?"} for index in range(5)])
    whole = load_dataset(DataSection(dataset="jsonl", dataset_path=str(path)))
    part = load_dataset(DataSection(dataset="jsonl", dataset_path=str(path), limit=2))
    assert (len(whole), len(part)) == (5, 2)
    assert [sample.question for sample in part] == ["0?", "1?"]
    assert [sample.question for sample in part] == ["0?", "1?"]  # it can be read again


def test_fewer_requests_than_were_asked_for_are_told(folder, caplog):
    path = rows_file(folder, [{"question": f"{index}?"} for index in range(5)])
    for limit in (None, 5, 6):
        assert len(samples_of("jsonl", path, limit=limit)) == min(limit or 5, 5)
        assert ("data_config.limit is 6, but the data set has only 5" in caplog.text) == (limit == 6)


def test_fingerprints_tell_questions_apart(folder):
    first, same, other, picture = (
        one(folder, row)
        for row in ({"question": "A"}, {"prompt": "A"}, {"question": "B"}, {"question": "A", "image": "a.png"})
    )
    assert first.fingerprint() == same.fingerprint()
    assert len({sample.fingerprint() for sample in (first, other, picture)}) == 3


def test_default_prompt_file_is_strict_about_its_place(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        default_prompt.load(DataSection(dataset_path=str(tmp_path / "absent.json")))
