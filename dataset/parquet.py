"""Rows of Parquet files, as data sets are published on hubs: the small columns are read at once, pictures when asked.

A file of thousands of embedded pictures never lies in memory: at most one row group does (of files of the library
datasets 100 pictures), or a page of it where the file was written in pages, and a few decoded rows. Rows asked in their
order are decoded once. Knows nothing of what the columns mean. Needs pyarrow, which nothing else does.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.errors import ODD_DATA_ERRORS, UserError

ROWS_AT_ONCE = 4  # decoded together: what lies in memory of a column of pictures, twice
BUFFER_BYTES = 2**20  # read of a file at a time
_LFS_POINTER = b"version https://git-lfs"


def pyarrow_parquet() -> Any:
    """The module pyarrow.parquet. UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "this data set is in Parquet files, which need the package pyarrow: install it into the environment that "
            f"runs this project (python -m pip install pyarrow), or use the set's JSON form ({error})"
        ) from error
    return pyarrow.parquet


class ParquetRows:
    """The rows of some files of the same columns, in the files' order.

    needed: columns every file must have. optional: read where they are there. media: columns read on demand. What is
    in `needed` and `optional` lies in memory for all rows. Raises UserError for files that are no Parquet or lack a
    column. May be used from any thread.
    """

    def __init__(
        self, files: Sequence[Path], *, needed: Sequence[str], optional: Sequence[str] = (), media: Sequence[str] = ()
    ) -> None:
        self.files = tuple(files)
        self.values: list[dict[str, Any]] = []
        self._places: list[tuple[int, int]] = []  # file and row in it, of every row
        self._media: list[list[str]] = []
        self._lock = threading.Lock()
        self._cursor: _Cursor | None = None
        for number, path in enumerate(self.files):
            rows, columns = _small_columns(path, needed, optional, media)
            self.values += rows
            self._places += [(number, row) for row in range(len(rows))]
            self._media.append(columns)

    def __len__(self) -> int:
        return len(self.values)

    def where(self, index: int) -> str:
        """File and row, counted from 1, for people."""
        number, row = self._places[index]
        return f"{self.files[number].name} row {row + 1}"

    def media(self, index: int) -> Mapping[str, Any]:
        """The media columns of a row: as stored, {"bytes", "path"} where the file was made by the library datasets."""
        number, row = self._places[index]
        with self._lock:
            if self._cursor is None or self._cursor.path != self.files[number]:
                self._cursor = _Cursor(self.files[number], self._media[number])
            return self._cursor.row(row)


def _small_columns(
    path: Path, needed: Sequence[str], optional: Sequence[str], media: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows without their media, and which media columns the file has."""
    parquet = pyarrow_parquet()
    try:
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{path} is a pointer of git-lfs, not the file itself: fetch it (git lfs pull)")
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            lacking = [name for name in needed if name not in there]
            lacking += [] if not media or any(name in there for name in media) else [" or ".join(media)]
            if lacking:
                raise UserError(f"{path}: there is no column {', '.join(lacking)}; it has {', '.join(there)}")
            rows = file.read(columns=[name for name in (*needed, *optional) if name in there]).to_pylist()
    except UserError:
        raise
    except ODD_DATA_ERRORS as error:  # pyarrow's own errors are among these
        raise UserError(f"{path} is no readable Parquet file: {error}") from error
    return rows, [name for name in media if name in there]


class _Cursor:
    """Reads a file's media a few rows at a time. Going back within the last rows costs nothing, further back a new
    start of the row group."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self._columns = path, columns
        self._file = pyarrow_parquet().ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = [sum(counts[:group]) for group in range(len(counts) + 1)]
        self._group = -1
        self._batches: Iterator[list[dict[str, Any]]] = iter(())
        self._held: dict[int, dict[str, Any]] = {}  # the last two batches
        self._next = 0

    def row(self, index: int) -> dict[str, Any]:
        """The media of one row of the file."""
        group = next(number for number, start in enumerate(self._starts[1:]) if index < start)
        if index not in self._held and (group != self._group or index < self._next):
            self._begin(group)
        while index not in self._held:
            self._advance()
        return self._held[index]

    def _begin(self, group: int) -> None:
        self._group, self._next = group, self._starts[group]
        read = self._file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=self._columns, use_threads=False)
        self._batches = (batch.to_pylist() for batch in read)

    def _advance(self) -> None:
        rows = next(self._batches, None)
        if rows is None:
            raise EOFError(f"{self.path.name} ends inside row group {self._group}")
        before = self._next - ROWS_AT_ONCE
        self._held = {index: row for index, row in self._held.items() if before <= index < self._next}
        self._held |= dict(enumerate(rows, start=self._next))
        self._next += len(rows)
