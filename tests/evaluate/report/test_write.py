"""The report as a file: hostile texts stay texts, pictures are inside or said to be missing, and nothing else is."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from dataset.sample import Sample
from executor.errors import UserError
from executor.evaluate.compare import compare
from executor.evaluate.report import pictures
from executor.evaluate.report.write import write_report
from executor.evaluate.runs import read_run
from tests.evaluate.rows_files import row, rows_file
from tests.media.media_files import make_frames, write_video
from tests.reference import REPO

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>@@REPORT@@\u2028"


def report_of(folder: Path, rows: list[dict], others: list[dict] | None = None, find=lambda index, name: None) -> str:
    first = read_run(rows_file(folder / "a.jsonl", rows))
    second = read_run(rows_file(folder / "b.jsonl", others or rows))
    write_report(folder / "report" / "r.html", compare(first, second), find)
    return (folder / "report" / "r.html").read_text()


def data_of(page: str, name: str = "report-data"):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)[1])


def shown(page: str, number: int = 0) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a sample, and the reasons of those that are not there."""
    urls, found, reasons = data_of(page, "picture-data"), [], []
    for picture in data_of(page)["rows"][number]["pictures"]:
        if picture["at"] is None:
            reasons.append(picture["reason"])
        else:
            head, _, data = urls[picture["at"]].partition(",")
            assert head == "data:image/jpeg;base64"
            found.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return found, reasons


def test_hostile_texts_do_not_end_their_element(tmp_path):
    texts = {"text": HOSTILE, "extracted": HOSTILE, "prompt": HOSTILE, "id": HOSTILE, "labels": {HOSTILE: HOSTILE}}
    texts |= {"references": [HOSTILE], "media": [HOSTILE], "sources": [HOSTILE]}
    page = report_of(tmp_path, [row(0, **texts)])
    assert page.count("<script") == page.count("</script>") == 3
    assert "<img src" not in page and "alert(2)>" not in page.split("\\u003cimg")[0]
    (told,) = data_of(page)["rows"]
    assert (told["question"], told["id"], told["labels"]) == (HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    assert told["answers"][0]["text"] == told["references"][0] == HOSTILE


def test_nothing_comes_from_outside(tmp_path):
    page = report_of(tmp_path, [row(0)])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r'(src|href)="', page) and "@import" not in page and "url(" not in page


def test_pictures_are_large_where_samples_changed_and_small_elsewhere(tmp_path):
    path = tmp_path / "p.jpg"
    Image.effect_noise((1600, 1200), 40).convert("RGB").save(path)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100), "red").save(turned, exif=exif)
    rows = [row(0, sources=[str(path)]), row(1, sources=[str(turned)])]
    ((small,), _) = shown(report_of(tmp_path, rows))
    page = report_of(tmp_path, rows, [row(0, 0.0, sources=[str(path)]), rows[1]])
    ((large,), _), ((upright,), _) = shown(page), shown(page, 1)
    assert [small.size, large.size, upright.size] == [(256, 192), (768, 576), (100, 200)]


def test_equal_pictures_are_in_the_page_once(tmp_path):
    path = str(REPO / "dataset/media/objects.png")
    page = report_of(tmp_path, [row(index, sources=[path]) for index in range(5)])
    assert len(data_of(page, "picture-data")) == 1 and len(shown(page, 4)[0]) == 1


def test_of_a_video_the_first_frame_is_shown(tmp_path):
    frames = make_frames(6, 48, 64)
    frames[0][:] = (250, 0, 0)
    write_video(tmp_path / "v.mp4", frames)
    ((picture,), _) = shown(report_of(tmp_path, [row(0, sources=[str(tmp_path / "v.mp4")])]))
    red, green, blue = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert picture.size == (64, 48) and red > 200 and green < 60 and blue < 60


def test_pictures_in_the_data_set_are_found_there(tmp_path):
    data = (REPO / "dataset/media/word.png").read_bytes()
    message = {"role": "user", "content": [{"type": "image", "image": data}]}
    asked = []

    def find(index, name):
        asked.append((index, name))
        return Sample(name, (message,)) if index == 0 else None

    page = report_of(tmp_path, [row(0, sources=[None]), row(1, sources=[None])], find=find)
    assert sorted(asked) == [(0, "sample 0"), (1, "sample 1")]
    assert len(shown(page)[0]) == 1
    assert shown(page, 1) == ([], ["the picture lies in the data set, which is not at hand"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/moved/away.png", "/moved/away.png: no such file"),
        ("https://example.org/a.png", "https://example.org/a.png is not fetched for a report"),
        ("broken.png", "broken.png"),
        ("text.txt", "text.txt: not a readable picture or video"),
    ],
)
def test_a_picture_that_is_not_there_is_said_to_be_missing(tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    whole = (REPO / "dataset/media/word.png").read_bytes()
    Path("broken.png").write_bytes(whole[: len(whole) // 2])
    Path("text.txt").write_text("no picture at all")
    page = report_of(tmp_path, [row(0, sources=[source])])
    (found, (reason,)) = shown(page)
    assert found == [] and says in reason


def test_of_many_pictures_the_first_are_shown(tmp_path):
    path = str(REPO / "dataset/media/objects.png")
    number = pictures.MOST_PICTURES + 3
    page = report_of(tmp_path, [row(0, media=["p"] * number, sources=[path] * number)])
    assert len(shown(page)[0]) == pictures.MOST_PICTURES and data_of(page)["rows"][0]["more_pictures"] == 3


def test_a_place_that_cannot_be_written(tmp_path):
    first = read_run(rows_file(tmp_path / "a.jsonl", [row(0)]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="eval_config.report_path: .* cannot be written"):
        write_report(tmp_path / "file" / "r.html", compare(first, first), lambda index, name: None)
