"""JSONL and JSON files as data sets: read row by row, so that a file of many embedded pictures never lies in memory.

What a row means is entries.py's; here are files, lines and their errors.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.entries import read_entry
from dataset.sample import Dataset, Sample
from executor.errors import UserError


def open_rows(path: Path, *, strict: bool = False) -> Dataset:
    """The samples of a .jsonl file (an object a line) or a .json file (a list). UserError if it is neither, or empty.

    A line that is no JSON becomes a sample with an error.
    """
    rows = json_lines if path.suffix.lower() in (".jsonl", ".ndjson") else json_list

    def read() -> Iterator[Sample]:
        for where, entry in rows(path):
            yield from [entry] if isinstance(entry, Sample) else read_entry(entry, where, path.parent, strict=strict)

    try:
        count = sum(1 for _ in read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data set {path} cannot be read: {error}") from error
    if not count:
        raise UserError(f"the data set {path} has no entries")
    return Dataset(path, count, read)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, object) of every line that is not blank; a Sample with an error in place of a broken one."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield where, Sample(where, error=f"{where}: not valid JSON: {error.msg} at column {error.colno}")


def json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """(file entry N, value) of a JSON list, counted from 1. UserError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: wanted a JSON list of entries, got a {type(content).__name__}")
    for number, entry in enumerate(content, start=1):
        yield f"{path.name} entry {number}", entry
