"""The calibration set: folders of pictures, texts beside them, rows; which of them are taken."""

import shutil

import pytest

from executor.calibrate.sample import check_count, chosen, fingerprint, open_calibration
from executor.calibrate.settings import Settings
from executor.errors import UserError
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
SETTINGS = Settings("w8a8", 0.5)


@pytest.fixture
def folder(tmp_path):
    for name in ("objects.png", "number.jpg", "clip.mp4"):
        shutil.copy(MEDIA / name, tmp_path / name)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_a_folder_asks_about_every_picture_and_video_in_it(folder):
    """By the text of the same name beside it, else by the default question of its kind."""
    (folder / "number.txt").write_text("Read the number.\n", encoding="utf-8")
    rows = list(open_calibration(folder))
    asked = {row.media[0]: row.question for row in rows}
    assert asked == {
        "clip.mp4": "Describe this video.",
        "number.jpg": "Read the number.",
        "objects.png": "Describe this image.",
    }
    assert not any(row.error for row in rows)


def test_the_one_file_of_rows_in_a_folder_is_what_is_asked(folder):
    (folder / "index.jsonl").write_text('{"image": "objects.png", "text": "What do you see?"}\n')
    (row,) = open_calibration(folder)
    assert row.question == "What do you see?" and row.media == ["objects.png"] and row.error is None
    assert [each.question for each in open_calibration(folder / "index.jsonl")] == ["What do you see?"]


def test_a_text_that_is_no_utf8_is_named(folder):
    (folder / "number.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="number.txt cannot be read as UTF-8"):
        open_calibration(folder)


def test_samples_are_spread_over_the_set(folder):
    rows = "".join(f'{{"question": "{number}?"}}\n' for number in range(100))
    (folder / "rows.jsonl").write_text(rows)
    data = open_calibration(folder)
    assert chosen(data, 4) == [0, 25, 50, 75] and chosen(data, 100) == chosen(data, 101) == list(range(100))


def test_another_picture_under_the_same_name_is_another_set(folder):
    before = fingerprint(open_calibration(folder), SETTINGS)
    assert fingerprint(open_calibration(folder), SETTINGS) == before
    shutil.copy(MEDIA / "word.png", folder / "objects.png")
    assert fingerprint(open_calibration(folder), SETTINGS) != before


@pytest.mark.parametrize("count, warns", [(1, True), (7, True), (8, False)])
def test_few_samples_are_warned_of(count, warns, folder, caplog):
    check_count(count, True, SETTINGS, folder)
    assert ("scales measured on fewer than 8" in caplog.text) == warns
