"""Folders and files of one's own: the default question, and what of a folder is asked, passed over or an error."""

import logging
import os
from pathlib import Path

import pytest

from dataset.entries import read_entry
from dataset.load import load_dataset
from executor.errors import UserError
from executor.media.media import load_media
from executor.recipe.schema import DataSection
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "10.png").write_bytes((MEDIA / "objects.png").read_bytes())
    (folder / "2.mp4").write_bytes((MEDIA / "clip.mp4").read_bytes())
    (folder / "noending").write_bytes((MEDIA / "objects.png").read_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "damaged.JPG").write_bytes(b"no picture")
    (folder / "lost.jpg").symlink_to(folder / "not there")
    (folder / "unreadable.mov").symlink_to("/proc/self/mem")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


def test_a_folder_without_a_prompt_asks_the_default_question_of_each_file(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        samples = list(load_dataset(DataSection(media=(str(folder),))))
    asked = {sample.media[0]: sample.question for sample in samples}
    assert asked.pop("2.mp4") == "Describe this video." and asked.pop("unreadable.mov") == "Describe this video."
    assert set(asked) == {"10.png", "noending", "empty.png", "damaged.JPG", "lost.jpg"}
    assert set(asked.values()) == {"Describe this image."}
    assert [sample.media[0] for sample in samples][:2] == ["2.mp4", "10.png"]
    assert all(sample.error is None and f"({sample.media[0]})" in sample.id for sample in samples)
    (line,) = [record.message for record in caplog.records if record.name == "dataset.sources"]
    for words in (
        "3 pictures and videos",
        "1 sub-folders passed over",
        "2 other files passed over",
        "1 links to nothing get an error row",
        "1 files of 0 bytes get an error row",
        "1 damaged files get an error row",
        "1 files that cannot be read get an error row",
    ):
        assert words in line


def test_the_question_of_one_s_own_is_asked_of_broken_files_too(folder: Path) -> None:
    samples = list(load_dataset(DataSection(prompt="What?", media=(str(folder),))))
    assert len(samples) == 7 and {sample.question for sample in samples} == {"What?"}


def test_default_questions_by_kind_and_number() -> None:
    picture, clip = str(MEDIA / "objects.png"), str(MEDIA / "clip.mp4")

    def question(*media: str) -> str:
        (sample,) = load_dataset(DataSection(media=media))
        assert len(sample.media_parts) == len(media)
        return sample.question

    assert question(picture) == "Describe this image."
    assert question(clip) == "Describe this video."
    assert question(picture, picture) == "Describe these images."
    assert question(clip, clip) == "Describe these videos."
    assert question(clip, picture) == "Describe these images and videos."


def test_folders_that_cannot_be_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match="no picture or video among the 1 files of this folder"):
        load_dataset(DataSection(media=(str(tmp_path),)))
    with pytest.raises(UserError, match="there is no file"):
        load_dataset(DataSection(media=(str(tmp_path / "lost"),)))
    with pytest.raises(UserError, match="a folder must be the only media"):
        load_dataset(DataSection(media=(str(tmp_path), str(MEDIA / "objects.png"))))


def test_a_folder_of_pictures_under_video_is_one_video(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (1, 2, 10):
        (frames / f"{number}.png").write_bytes((MEDIA / "objects.png").read_bytes())
    (sample,) = read_entry({"question": "What moves?", "video": "frames"}, "rows.jsonl:1", tmp_path)
    assert sample.media_parts == [{"type": "video", "video": str(frames)}]
    assert [Path(frame.source).name for frame in load_media(str(frames), "video").content] == [
        "1.png",
        "2.png",
        "10.png",
    ]
    assert len(read_entry({"question": "What?", "media": "frames"}, "rows.jsonl:1", tmp_path)) == 3
    (frames / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match="3.png: a frame of this video is empty, damaged or a link to nothing"):
        load_media(str(frames), "video")
