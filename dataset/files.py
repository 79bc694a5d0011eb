"""JSONL and JSON files as data sets: what a file holds is told by its content, whatever it is called.

What a row means is entries.py's; here are files, encodings, lines and their errors. Every row is parsed once: a short
one when the file is opened, and kept; one of much text (an embedded picture) when it is asked, and not kept.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataset.entries import KNOWN_KEYS, TEXT_KEYS, read_entry
from dataset.sample import Dataset, Sample
from executor.errors import ODD_DATA_ERRORS, UserError, nearest, printable

logger = logging.getLogger(__name__)

KEPT_BYTES = 16 * 1024  # a longer row is read when it is its turn
UTF8_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {  # a file that begins so says its encoding itself
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
NO_TEXT = {
    b"PAR1": "a Parquet file; write its rows with pandas.read_parquet(...).to_json(..., orient='records', lines=True)",
    b"ARROW1": "an Arrow file; write its rows as JSON Lines",
    b"\x1f\x8b": "compressed by gzip; unpack it: gunzip FILE",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as JSON Lines",
    b"BZh": "compressed by bzip2; unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "compressed by xz; unpack it: xz -d FILE",
    b"(\xb5/\xfd": "compressed by zstd; unpack it: zstd -d FILE",
}
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = (
    "not UTF-8 ({error}). Save the file as UTF-8; a file of a Chinese Windows is GBK:  "
    "iconv -f GB18030 -t UTF-8 {name} > new.jsonl"
)


@dataclass(frozen=True)
class Row:
    """One row before it is parsed. `load` gives its value, or raises UserError or what json raises."""

    where: str  # "dataset.jsonl:12"
    num_bytes: int
    load: Callable[[], Any]


def open_rows(path: Path, *, strict: bool = False) -> Dataset:
    """The samples of a file of JSON Lines (an object a line) or of one JSON list. UserError if it is neither, or empty.

    A row that is no JSON, or cannot be asked, becomes a sample with an error.
    """
    unused: Counter[str] = Counter()
    read = partial(_samples, folder=path.parent, strict=strict, unused=unused)
    samples: list[Sample | Callable[[], Sample]] = []
    try:
        for row in rows_of(path):
            if row.num_bytes > KEPT_BYTES:
                samples.append(partial(_one_sample, row, read))
            else:
                samples += read(row)
    except OSError as error:
        raise UserError(f"the data set {path} cannot be read: {error.strerror or error}") from error
    if not samples:
        raise UserError(f"the data set {path} has no entries")
    if unused:
        _report(path, unused)
    return Dataset(path, samples, (path,))


def _samples(row: Row, *, folder: Path, strict: bool, unused: Counter[str]) -> list[Sample]:
    try:
        entry = row.load()
    except json.JSONDecodeError as error:
        return [Sample(row.where, error=f"{row.where}: not valid JSON: {error.msg} at column {error.colno}")]
    except UserError as error:
        return [Sample(row.where, error=f"{row.where}: {error}")]
    except RecursionError:
        return [Sample(row.where, error=f"{row.where}: not readable: nested too deeply")]
    except ODD_DATA_ERRORS as error:  # a number of too many digits, a file that has changed
        logger.debug("%s", row.where, exc_info=True)
        return [Sample(row.where, error=printable(f"{row.where}: not readable ({type(error).__name__}: {error})"))]
    return read_entry(entry, row.where, folder, strict=strict, unused=lambda key: unused.update([key]))


def _one_sample(row: Row, read: Callable[[Row], list[Sample]]) -> Sample:
    """The sample of a long row, read now; how many it makes must be known before."""
    samples = read(row)
    if len(samples) == 1:
        return samples[0]
    return Sample(
        row.where,
        error=f"{row.where}: a row of more than {KEPT_BYTES} bytes cannot ask about a folder; name the files in it",
    )


def _report(path: Path, unused: Counter[str]) -> None:
    keys = []
    for key, count in unused.most_common():
        hint = "" if key in TEXT_KEYS else nearest(key, KNOWN_KEYS)
        keys.append(f"'{printable(str(key))[:60]}' ({count} rows{hint})")
    more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
    logger.warning("%s: these keys of its rows are not used: %s%s", path.name, ", ".join(keys[:20]), more)


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, in order. UserError for one that holds no rows of JSON at all."""
    with open(path, "rb") as file:
        head = file.read(4096)
    kind = next((words for magic, words in NO_TEXT.items() if head.startswith(magic)), None)
    if kind:
        raise UserError(f"the data set {path} is {kind}")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise UserError(
            f"the data set {path} is a table; write its rows as JSON Lines: pandas.read_csv(...).to_json(..., "
            "orient='records', lines=True)"
        )
    name = printable(path.name)
    encoding = next((encoding for mark, encoding in OTHER_MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head:
        raise UserError(f"the data set {path} holds zero bytes: UTF-16 without its mark, or no text; save it as UTF-8")
    if encoding is not None:
        text = _decoded(path, encoding)
        yield from _list_rows(text, name) if _is_list(text) else _text_rows(text, name)
        return
    start = head.removeprefix(UTF8_MARK).lstrip()
    if start.startswith(b"["):
        yield from _list_rows(_decoded(path, "utf-8-sig"), name)
    elif start.rstrip() == b"{" or start.startswith((b"{\n", b"{\r\n")):
        yield from _one_object(path, name)
    else:
        yield from _line_rows(path, name)


def _decoded(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeError as error:
        raise UserError(f"the data set {path} is " + _NOT_UTF8.format(error=error, name=path.name)) from error


def _is_list(text: str) -> bool:
    return text.lstrip("\ufeff \t\r\n").startswith("[")


def _line_rows(path: Path, name: str) -> Iterator[Row]:
    """A row for every line that is not blank. Only a kept row's bytes are held."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and line.strip() != UTF8_MARK:
                parse = partial(_parse, line, name)
                if len(line) > KEPT_BYTES:
                    parse = partial(_parse_at, path, offset, len(line), name)
                yield Row(f"{name}:{number}", len(line), parse)
            offset += len(line)


def _parse(line: bytes, name: str) -> Any:
    try:
        # A mark inside the file: files joined one after the other.
        return json.loads(line.removeprefix(UTF8_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} of the line"
        raise UserError(_NOT_UTF8.format(error=reason, name=name)) from error


def _parse_at(path: Path, offset: int, num_bytes: int, name: str) -> Any:
    with open(path, "rb") as file:
        file.seek(offset)
        return _parse(file.read(num_bytes), name)


def _text_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip("\ufeff \t\r")
        if line:
            yield Row(f"{name}:{number}", len(line), partial(json.loads, line))


def _list_rows(text: str, name: str) -> Iterator[Row]:
    """The entries of a JSON list, counted from 1. The whole text lies in memory, and long entries as parsed."""
    decoder = json.JSONDecoder()
    try:
        at = _SPACE.match(text, text.index("[") + 1).end()
        number = 0
        ended = text.startswith("]", at)
        while not ended:
            number += 1
            start = at
            value, at = decoder.raw_decode(text, at)
            yield Row(f"{name} entry {number}", at - start, partial(_same, value))
            at = _SPACE.match(text, at).end()
            ended = text.startswith("]", at)
            if not ended:
                if not text.startswith(",", at):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = _SPACE.match(text, at + 1).end()
        rest = _SPACE.match(text, at + 1).end()
        if rest < len(text):
            raise json.JSONDecodeError("Extra data after the list", text, rest)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{name}: entry {number} is nested too deeply to be read") from error
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{name}: entry {number} cannot be read: {error}") from error


def _one_object(path: Path, name: str) -> Iterator[Row]:
    """A file that begins with a lone brace: one entry over several lines, or a list inside an object, or JSON Lines."""
    try:
        content = json.loads(_decoded(path, "utf-8-sig"))
    except (json.JSONDecodeError, RecursionError):
        yield from _line_rows(path, name)
        return
    if not any(key in content for key in TEXT_KEYS):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        hint = f"; its list {lists[0]!r} may be what is wanted: save that alone" if lists else ""
        raise UserError(f"{path}: wanted a JSON list of entries or JSON Lines, got one object without a question{hint}")
    yield Row(f"{name} entry 1", path.stat().st_size, partial(_same, content))


def _same(value: Any) -> Any:
    return value
