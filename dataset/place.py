"""Where a published data set lies, in which of its forms, and what to say where it does not.

A loader asks its Place for files by the names they are published under, and builds samples of Rows. Knows no data set.
"""

import ast
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dataset.entries import refuse_half_characters
from dataset.parquet import ParquetRows
from dataset.published import PUBLISHED, VALIDATION, Published
from dataset.sample import Dataset, Sample
from dataset.tsv import TsvRows
from executor.errors import ODD_DATA_ERRORS, UserError, printable
from executor.host.env import REPO_ROOT, find_path
from executor.recipe.schema import DataSection

logger = logging.getLogger(__name__)

NAMES_SHOWN = 8
NAME_COLUMNS = ("question_id", "questionId", "id", "index")  # what sets call a question
_NUMBERED = re.compile(r"(?P<head>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


@dataclass(frozen=True)
class Row:
    """One row of a data set, whatever file it stands in. `picture(column)` is a path or the bytes themselves."""

    where: str
    values: Mapping[str, Any]
    picture: Callable[[str], str | bytes]

    def text(self, *names: str) -> str:
        """The value of the first of these columns that is there, as text. UserError where it is empty, or no text."""
        name = next((name for name in names if self.values.get(name) is not None), None)
        value = self.values.get(name)
        if value is None or str(value).strip() == "":
            raise UserError(f"there is no {' or '.join(names)}; the row has {', '.join(map(str, self.values))}")
        return _plain(name, value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """The values of the first of these columns that is there: of a list each, of one value that. UserError for what
        is neither a text nor a number."""
        name = next((name for name in names if self.values.get(name) is not None), None)
        value = self.values.get(name, ())
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple("" if item is None else _plain(name, item) for item in items)

    def answers(self, *names: str) -> tuple[str, ...]:
        """The same of accepted answers: one that is null or blank is none."""
        return tuple(text for text in self.texts(*names) if text.strip())

    def labels(self, **names: str) -> dict[str, str]:
        """What scores are broken down by: {label: value of the column named}, of those that the row has."""
        return {label: str(self.values[name]) for label, name in names.items() if self.values.get(name) is not None}


def _plain(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise UserError(f"{name} holds {str(value)[:80]!r}, which is neither a text nor a number")
    return str(value)


@dataclass(frozen=True)
class Place:
    """The folder of one data set. `file` is set where the recipe names a single file in it."""

    name: str
    published: Published
    split: str
    root: Path
    file: Path | None = None

    def parquet(self) -> list[Path]:
        """The Parquet files of the split: SPLIT-00000-of-00003.parquet and the like, below `root`, in their order.

        Raises UserError where some of those that belong together are not there.
        """
        if self.file is not None:
            return [self.file] if self.file.suffix == ".parquet" else []
        names = VALIDATION if self.split in VALIDATION else (self.split,)
        found = {
            path
            for name in names
            for pattern in (f"{name}-*.parquet", f"{name}_*.parquet", f"{name}.parquet")
            for path in self.root.rglob(pattern)
        }
        refuse_gaps(found)
        return sorted(found)

    def find(self, *names: str) -> Path | None:
        """The file of one of these names, in the folder or one below it; the one that the recipe names itself."""
        if self.file is not None:
            return self.file if any(self.file.match(name) for name in names) else None
        found = (path for name in names for pattern in (name, f"*/{name}") for path in sorted(self.root.glob(pattern)))
        return next((path for path in found if path.is_file()), None)

    def locate(self, name: str, *folders: str) -> str:
        """The path of a picture that a row names. UserError where it is not in the folder or one of these.

        A name that leads out of the folder (/etc/x, ../x) counts by its last part alone: a data set that a stranger
        made has no say in which files of this machine are looked at. Links in the folder are the user's own.
        """
        parts = (name, Path(name).name) if is_within(name) else (Path(name).name,)
        beside = [Path(folder) / part for folder in folders for part in parts]
        tried = [self.root / part for part in (parts[0], *beside)]
        found = next((path for path in tried if path.is_file()), None)
        if found is None:
            where = ", ".join(str(path) for path in dict.fromkeys(path.parent for path in tried))
            raise UserError(f"there is no file {Path(name).name} (looked in {where})")
        return str(found)

    def missing(self, *expected: str) -> UserError:
        """What to say where none of the forms is there. `expected`: the files of each form."""
        if not self.root.exists():
            there = "there is no such folder"
        else:
            names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in self.root.iterdir())
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            there = f"it has {', '.join(names[:NAMES_SHOWN]) or 'nothing'}{more}"
        got = f"{self.file} is none of these files" if self.file else f"{self.root}: {there}"
        return UserError(
            f"{self.published.title}, part {self.split}, needs one of: {'; '.join(expected)}. Got {got}. The set is "
            f"published as {self.published.published_as}. Name its folder: --set data_config.dataset_path=FOLDER"
        )


def is_within(name: str) -> bool:
    """Whether a relative name stays in the folder that it is looked for in, links aside."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir


def place_of(name: str, data: DataSection) -> Place:
    """Where the recipe says that the set lies, or its usual place, dataset/NAME."""
    published = PUBLISHED[name]
    path = find_path(data.dataset_path) if data.dataset_path else REPO_ROOT / "dataset" / name
    split = published.split(data.split)
    if path.is_file():
        return Place(name, published, split, path.parent, path)
    return Place(name, published, split, path)


def from_parquet(
    place: Place,
    files: Sequence[Path],
    build: Callable[[Row], Sample],
    *,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    media: Sequence[str] = ("image",),
    spread: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]] = lambda values: (values,),
) -> Dataset:
    """Samples of Parquet rows, each built when it is asked for and not kept. `spread` makes several rows of one."""
    rows = ParquetRows(files, needed=needed, optional=optional, media=media)
    samples: list[Callable[[], Sample]] = []
    for index, values in enumerate(rows.values):
        picture = partial(_embedded, place, rows, index)
        for part in spread(values):
            samples.append(partial(built, build, Row(rows.where(index), part, picture)))
    return _dataset(place, samples, files)


def from_tsv(
    place: Place, path: Path, build: Callable[[Row], Sample], *, needed: Sequence[str] = ("question", "answer")
) -> Dataset:
    """Samples of the rows of VLMEvalKit's table, each built when it is asked for and not kept."""
    rows = TsvRows(path, tuple(needed))
    samples = [
        partial(built, _of_table(build), Row(rows.where(number), values, partial(_picture_of, rows, number)))
        for number, values in enumerate(rows.values)
    ]
    return _dataset(place, samples, (path,))


def _of_table(build: Callable[[Row], Sample]) -> Callable[[Row], Sample]:
    return lambda row: build(replace(row, values=_with_list(row.values)))


def _picture_of(rows: TsvRows, number: int, column: str) -> bytes:
    return rows.picture(number)


def _with_list(values: Mapping[str, str]) -> Mapping[str, Any]:
    """A row whose accepted answers are a list: the tables write several as the text of one."""
    answer = values.get("answer", "").strip()
    answers = literal_list(answer, "answer") if answer[:1] == "[" and answer[-1:] == "]" else (answer,)
    return {**values, "answer": list(answers), "answers": list(answers)}


def literal_list(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a list, or of a list that is written as text, as in "['$6', '$7']". UserError for anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:  # the last two: thousands of brackets
            raise UserError(f"{name} is no list: {value[:80]!r}") from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{name} is no list: {str(value)[:80]!r}")
    return tuple("" if item is None else str(item) for item in value)


def from_rows(place: Place, rows: Iterable[Row], build: Callable[[Row], Sample], files: Sequence[Path]) -> Dataset:
    """Samples of rows whose media are files: all are built at once."""
    return _dataset(place, [built(build, row) for row in rows], files)


def built(build: Callable[[Row], Sample], row: Row) -> Sample:
    """The sample of a row, or one with its error: a bad row stops no other."""
    try:
        refuse_half_characters(row.values)
        sample = build(row)
        refuse_half_characters([*sample.references, *sample.choices])
        return sample
    except UserError as error:
        return Sample(row.where, error=printable(f"{row.where}: {error}"))
    except ODD_DATA_ERRORS as error:
        logger.debug("%s", row.where, exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        return Sample(row.where, error=printable(f"{row.where}: the row cannot be read ({reason})"))


def refuse_gaps(paths: Iterable[Path]) -> None:
    """UserError where a numbered file lacks one of those it belongs to: scores of a part of a part mislead."""
    there: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := _NUMBERED.match(path.name):
            group = (path.parent, match["head"], int(match["count"]))
            there.setdefault(group, set()).add(int(match["number"]))
    for (folder, head, count), numbers in there.items():
        if lacking := sorted(set(range(count)) - numbers):
            raise UserError(
                f"{folder}: {head} is {count} files, and number {', '.join(map(str, lacking))} is not there"
            )


def _dataset(place: Place, samples: Sequence[Sample | Callable[[], Sample]], files: Sequence[Path]) -> Dataset:
    if not samples:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{place.published.title}, part {place.split}: {names} in {place.root} hold no rows")
    return Dataset(place.root, samples, tuple(files))


def _embedded(place: Place, rows: ParquetRows, index: int, column: str) -> str | bytes:
    value = rows.media(index).get(column)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise UserError(f"the column {column} holds no picture")
    return value if isinstance(value, bytes) else place.locate(str(value))


def read_json(path: Path, key: str | None = None) -> list[Mapping[str, Any]]:
    """The entries of a JSON list, or of the list under `key`. UserError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON file: {error}") from error
    if key is not None and isinstance(content, Mapping):
        content = content.get(key)
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        within = f" under '{key}'" if key else ""
        raise UserError(f"{path}: wanted a list of objects{within}, got {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSON Lines file. UserError for a line that is none."""
    entries = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    entries.append(json.loads(line))
                    if not isinstance(entries[-1], Mapping):
                        raise UserError(f"{path.name}:{number}: wanted an object, got {type(entries[-1]).__name__}")
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON Lines file: {error}") from error
    return entries


def question(row: Row, text: str, media: Sequence[Mapping[str, Any]], **fields: Any) -> Sample:
    """A sample of one user message: media, then text."""
    name = next((row.values[key] for key in NAME_COLUMNS if row.values.get(key)), None)
    content = [*media, {"type": "text", "text": text}]
    where = row.where if name is None else f"{row.where} ({_one_line(name)[:80]})"
    return Sample(where, ({"role": "user", "content": content},), **fields)


def _one_line(name: Any) -> str:
    """What a set calls a row, without what would break a line or steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(name))


def picture_part(source: str | bytes) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image", "image": source}
