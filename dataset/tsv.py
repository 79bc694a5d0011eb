"""Tables of VLMEvalKit, which AISBench reads too: a row has index, question, answer and its picture as base64.

A picture of another row is named by that row's index. Files have gigabytes: where each row begins is noted once, and a
row's picture is read when it is asked.
"""

import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from executor.errors import UserError

INDEX_CHARACTERS = 64  # a shorter text in the column image is another row's index
MOST_FIELD_CHARACTERS = 2**31 - 1


class TsvRows:
    """The rows of one table. `values` are the columns but the picture. UserError for a table without them."""

    def __init__(self, path: Path, needed: tuple[str, ...]) -> None:
        self.path = path
        self.values: list[dict[str, str]] = []
        self._starts: list[int] = []  # where each row begins, in bytes
        self._by_index: dict[str, int] = {}
        csv.field_size_limit(MOST_FIELD_CHARACTERS)
        try:
            with open(path, "rb") as file:
                lines = _Lines(file)
                reader = csv.reader(lines, delimiter="\t")
                self.columns = next(reader, [])
                self._refuse_lacking(needed)
                self._note_rows(reader, lines)
        except (OSError, UnicodeError, csv.Error) as error:
            raise UserError(f"{path} is no readable table: {error}") from error

    def where(self, number: int) -> str:
        """File and row, counted from 1 without the heading, for people."""
        return f"{self.path.name} row {number + 1}"

    def picture(self, number: int) -> bytes:
        """The picture of a row. UserError where it is no base64, or of a row that is not there."""
        told = self._field(number)
        if not told:
            raise UserError("the column image is empty")
        if len(told) < INDEX_CHARACTERS:
            if told not in self._by_index:
                raise UserError(f"its picture is that of the row with index {told[:20]!r}, which is not there")
            told = self._field(self._by_index[told])
        try:
            return base64.b64decode(told, validate=True)
        except binascii.Error as error:
            raise UserError(f"the column image is no base64: {error}") from error

    def _field(self, number: int) -> str:
        with open(self.path, "rb") as file:
            file.seek(self._starts[number])
            fields = next(csv.reader(_Lines(file), delimiter="\t"))
        return fields[self.columns.index("image")]

    def _refuse_lacking(self, needed: tuple[str, ...]) -> None:
        lacking = [name for name in (*needed, "image") if name not in self.columns]
        if lacking:
            has = ", ".join(name[:40] for name in self.columns[:20]) or "nothing"
            raise UserError(f"{self.path}: there is no column {', '.join(lacking)}; it has {has}")

    def _note_rows(self, reader: Iterator[list[str]], lines: "_Lines") -> None:
        start = lines.position
        for fields in reader:
            if fields:
                if len(fields) != len(self.columns):
                    raise UserError(
                        f"{self.where(len(self.values))} of {self.path} has {len(fields)} fields and the heading "
                        f"{len(self.columns)}: the file was cut or is damaged"
                    )
                row = dict(zip(self.columns, fields, strict=True))
                del row["image"]
                self._by_index[row.get("index", "")] = len(self.values)
                self.values.append(row)
                self._starts.append(start)
            start = lines.position


class _Lines:
    """The lines of a file as text, and where the next one begins."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.position = file, file.tell()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        return line.decode("utf-8-sig" if self.position == len(line) else "utf-8")
