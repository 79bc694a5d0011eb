"""Parquet rows: read in any order, never all in memory, and what is said of files that are none."""

import random
import sys
import threading

import pytest

from dataset import parquet as parquet_module
from dataset.load import load_dataset
from dataset.parquet import ROWS_AT_ONCE, ParquetRows
from executor.errors import UserError
from executor.recipe.schema import DataSection
from tests.dataset.forms import TEN, embedded, load, parquet, picture_of, png

pyarrow = pytest.importorskip("pyarrow")


def some_rows(count: int, start: int = 0) -> list[dict]:
    return [{"id": start + index, "image": embedded(b"%d" % (start + index))} for index in range(count)]


def opened(*files) -> ParquetRows:
    return ParquetRows(files, needed=("id",), media=("image",))


def test_rows_in_any_order_over_row_groups_and_files(tmp_path):
    first = parquet(tmp_path / "a.parquet", some_rows(23), row_group_size=9)
    second = parquet(tmp_path / "b.parquet", some_rows(10, 23), row_group_size=3)
    rows = opened(first, second)
    assert [values["id"] for values in rows.values] == list(range(33)) and len(rows) == 33
    assert (rows.where(0), rows.where(23)) == ("a.parquet row 1", "b.parquet row 1")
    rng = random.Random(0)
    for index in [*range(33), *reversed(range(33)), *(rng.randrange(33) for _ in range(200))]:
        assert rows.media(index)["image"]["bytes"] == b"%d" % index


def test_rows_asked_by_several_threads(tmp_path):
    rows = opened(parquet(tmp_path / "a.parquet", some_rows(40), row_group_size=8))
    wrong = []

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for index in (rng.randrange(40) for _ in range(100)):
            if rows.media(index)["image"]["bytes"] != b"%d" % index:
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "written, most_pictures",
    [({"row_group_size": 8}, 2 * 8 + 3 * ROWS_AT_ONCE), ({"write_batch_size": 1, "data_page_size": 2**20}, 16)],
)
def test_a_row_group_or_a_page_lies_in_memory_and_no_more(tmp_path, written, most_pictures):
    """64 pictures of 1 MB: in row groups of eight, and in one row group with a page for each."""
    rng = random.Random(0)
    rows = [{"id": index, "image": embedded(rng.randbytes(2**20))} for index in range(64)]
    path = parquet(tmp_path / "a.parquet", rows, compression="none", use_dictionary=False, **written)
    pool = pyarrow.default_memory_pool()
    before, most, held = pool.bytes_allocated(), 0, opened(path)
    for index, row in enumerate(rows):
        assert held.media(index)["image"] == row["image"]
        most = max(most, pool.bytes_allocated() - before)
    assert most < most_pictures * 2**20
    assert len(held._cursor._held) <= 2 * ROWS_AT_ONCE


def test_forward_order_decodes_every_row_once(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", some_rows(60), row_group_size=20)
    begun = []
    begin = parquet_module._Cursor._begin
    monkeypatch.setattr(
        parquet_module._Cursor, "_begin", lambda cursor, group: (begun.append(group), begin(cursor, group))
    )
    rows = opened(path)
    for index in range(60):
        rows.media(index)
        rows.media(max(index - ROWS_AT_ONCE, 0))  # as threads that run a little behind do
    assert begun == [0, 1, 2]
    rows.media(0)
    assert begun == [0, 1, 2, 0]


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    path = parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"id": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="need the package pyarrow: .*python -m pip install pyarrow"):
        load("ocrbench", path.parent.parent)


def test_files_that_are_no_parquet(tmp_path):
    path = parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "Q?", "image": embedded(png())}])
    whole = path.read_bytes()
    for content, words in (
        (b"", "is no readable Parquet file"),
        (whole[: len(whole) // 2], "is no readable Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of git-lfs"),
        (b"<html>404</html>", "is no readable Parquet file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            load("textvqa", tmp_path)
        assert str(path) in str(caught.value)


def test_pages_that_are_damaged_are_errors_of_their_rows(tmp_path):
    """The small columns are whole, and those pictures that are whole are asked about."""
    rows = [
        {"question": f"Q{index}?", "answers": TEN, "image": embedded(random.Random(index).randbytes(5000))}
        for index in range(12)
    ]
    path = parquet(tmp_path / "validation-00000-of-00001.parquet", rows, row_group_size=4, compression="snappy")
    file = pyarrow.parquet.ParquetFile(path).metadata
    column = next(
        file.row_group(1).column(index)
        for index in range(file.num_columns)
        if file.row_group(1).column(index).path_in_schema == "image.bytes"
    )
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    samples = load("textvqa", tmp_path)
    assert [sample.error is None for sample in samples] == [True] * 4 + [False] * 4 + [True] * 4
    assert all(sample.error.startswith(sample.id) and "cannot be read" in sample.error for sample in samples[4:8])
    assert [picture_of(sample) for sample in samples[8:]] == [row["image"]["bytes"] for row in rows[8:]]


def test_columns_that_are_missing_are_named(tmp_path):
    parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "Q?", "picture": embedded(png())}])
    with pytest.raises(UserError, match="there is no column image; it has question, picture"):
        load("textvqa", tmp_path)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"question": "Q?", "image": embedded(png())}])
    with pytest.raises(UserError, match="there is no column answer, dataset, question_type; it has question, image"):
        load("ocrbench", tmp_path)


def test_files_that_belong_together_must_all_be_there(tmp_path):
    row = {"question": "Q?", "answers": TEN, "image": embedded(png())}
    for number in (0, 2):
        parquet(tmp_path / f"validation-{number:05}-of-00004.parquet", [row])
    with pytest.raises(UserError, match="validation is 4 files, and number 1, 3 is not there"):
        load("textvqa", tmp_path)
    for number in (1, 3):
        parquet(tmp_path / f"validation-{number:05}-of-00004.parquet", [row])
    assert len(load("textvqa", tmp_path)) == 4
    assert len(load("textvqa", tmp_path / "validation-00002-of-00004.parquet")) == 1


def test_a_part_without_rows(tmp_path):
    schema = pyarrow.schema([("question", pyarrow.string()), ("image", pyarrow.binary())])
    parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "Q?"}])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "validation-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"TextVQA, part validation: validation-00000-of-00001.parquet in .* hold no rows"
    ):
        load("textvqa", tmp_path)


def test_pictures_as_plain_bytes_by_path_or_not_at_all(tmp_path):
    (tmp_path / "cat.png").write_bytes(png(3))
    rows = [embedded(None, "cat.png"), embedded(None, "dog.png"), embedded(None), None]
    rows = [{"question": "Q?", "answers": TEN, "image": value} for value in rows]
    parquet(tmp_path / "validation-00000-of-00001.parquet", rows)
    beside, lost, empty, none = load("textvqa", tmp_path)
    assert picture_of(beside) == png(3)
    assert "there is no file dog.png" in lost.error
    assert "the column image holds no picture" in empty.error and "holds no picture" in none.error
    parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "Q?", "image": png(4)}])
    (plain,) = load("textvqa", tmp_path)
    assert picture_of(plain) == png(4) and plain.references == ()


def test_a_digest_is_of_the_files_and_reads_no_rows(tmp_path):
    path = parquet(tmp_path / "validation-00000-of-00001.parquet", [{"question": "Q?", "image": png(4)}])
    data = DataSection(dataset="textvqa", dataset_path=str(tmp_path))
    before = load_dataset(data).digest()
    assert before == load_dataset(data).digest()
    parquet(path, [{"question": "Q?", "image": png(5)}])
    assert before != load_dataset(data).digest()
