"""Files of rows as they come: encodings, names that say something else, long rows, keys that nobody uses."""

import base64
import json
import logging
from pathlib import Path

import pytest

from dataset import files
from dataset.load import load_dataset
from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.recipe.schema import DataSection
from tests.reference import REPO

PNG = (REPO / "dataset" / "media" / "objects.png").read_bytes()
ROWS = [{"question": "图里有什么？"}, {"question": "Zwei?"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)


def dataset_of(path: Path) -> Dataset:
    return load_dataset(DataSection(dataset="jsonl", dataset_path=str(path)))


def questions(path: Path) -> list[str]:
    return [sample.question for sample in dataset_of(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "text", [LINES, LINES.replace("\n", "\r\n"), LIST, json.dumps(ROWS, indent=2), "\n \n" + LINES]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_what_a_file_holds_is_told_by_its_content(tmp_path: Path, encoding: str, text: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert questions(path) == [row["question"] for row in ROWS]


def test_a_mark_inside_and_one_entry_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    path.write_bytes(LINES.encode("utf-8-sig") + LINES.encode("utf-8-sig"))
    assert questions(path) == [row["question"] for row in ROWS] * 2
    path.write_text(json.dumps(ROWS[1], indent=2))
    assert questions(path) == ["Zwei?"]


def test_a_file_of_another_encoding_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "gbk.jsonl"
    path.write_bytes(LINES.encode("gbk"))
    first, second = dataset_of(path)
    assert first.error.startswith("gbk.jsonl:1: not UTF-8") and "iconv -f GB18030 -t UTF-8 gbk.jsonl" in first.error
    assert (second.error, second.question) == (None, "Zwei?")
    path.write_bytes(LIST.encode("gbk"))
    with pytest.raises(UserError, match=r"gbk.jsonl is not UTF-8 .* iconv -f GB18030"):
        dataset_of(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"PAR1....", "is a Parquet file; write its rows with"),
        ("a.jsonl.gz", b"\x1f\x8b\x08..", "compressed by gzip; unpack it"),
        ("a.jsonl", LINES.encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.csv", b"question,image\nQ,a.png\n", "is a table; write its rows as JSON Lines"),
        ("a.json", b'{\n "data": [1]\n}', "one object without a question; its list 'data' may be what is wanted"),
        ("a.json", b'["a" "b"]', "not valid JSON: Expecting ',' delimiter, line 1, column 6"),
        ("a.json", b'["a"] ["b"]', "not valid JSON: Extra data after the list"),
        ("a.json", b'["a",', "not valid JSON: Expecting value"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[]", "has no entries"),
        ("a.jsonl", b"\xef\xbb\xbf\n\n", "has no entries"),
        ("a.jsonl", b"", "has no entries"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        dataset_of(tmp_path / name)
    assert name in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_every_row_is_parsed_once_and_a_long_one_is_not_kept(tmp_path: Path, name: str, monkeypatch) -> None:
    picture = base64.b64encode(PNG * (files.KEPT_BYTES // len(PNG) + 1)).decode()
    rows = [
        {"question": f"{number}?", "image": picture} if number % 2 else {"question": "short"} for number in range(6)
    ]
    text = json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    parsed: list[str] = []
    read_entry = files.read_entry

    def counted(entry, where, *given, **more):
        parsed.append(where)
        return read_entry(entry, where, *given, **more)

    monkeypatch.setattr(files, "read_entry", counted)
    dataset = dataset_of(tmp_path / name)
    assert len(dataset) == 6 and len(parsed) == 3
    assert [isinstance(sample, Sample) for sample in dataset.samples] == [True, False] * 3
    dataset.digest()
    assert len(parsed) == 3
    assert [sample.question for sample in dataset] == ["short", "1?", "short", "3?", "short", "5?"]
    assert len(parsed) == 6
    assert dataset[3].media_parts[0]["image"].startswith(PNG)
    assert len(dataset.first(2)) == 2 and dataset.first(2)[1].question == "1?"


def test_a_long_row_about_a_folder_is_its_row_s_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    row = {"question": "Q" * files.KEPT_BYTES, "image": str(tmp_path)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"question": "Short?", "image": "."}))
    long, *short = dataset_of(tmp_path / "rows.jsonl")
    assert "cannot ask about a folder" in long.error
    assert [sample.media for sample in short] == [["a.png"], ["b.png"]]


def test_keys_that_are_not_used_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "Q?", "imgae": "a.png", "id": 1, "category": "x", "options": ["A"], "empty": None}] * 3
    rows.append({"question": "Q?", "text": "more"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        dataset_of(tmp_path / "rows.jsonl")
    (record,) = [record for record in caplog.records if record.name == "dataset.files"]
    assert "'imgae' (3 rows (did you mean 'image'?))" in record.message
    assert "'options' (3 rows" in record.message and "'text' (1 rows)" in record.message
    for harmless in ("'id'", "'category'", "'empty'"):
        assert harmless not in record.message
