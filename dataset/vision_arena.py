"""`dataset: vision-arena-bench-v0.1`: a folder as published (data/train-*.parquet, pictures inside), or one with
dataset.jsonl (or one JSON file of the same rows) and its pictures.

The usual place is dataset/vision_arena_bench. A row has its question under messages, conversations, question, prompt,
text or turns[0][0].content, and its pictures under images or image: paths from the folder, or bytes.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dataset.entries import read_entry
from dataset.files import open_rows
from dataset.parquet import ParquetRows
from dataset.place import picture_part, refuse_gaps
from dataset.sample import Dataset, Sample
from executor.errors import ODD_DATA_ERRORS, UserError, printable
from executor.host.env import REPO_ROOT, find_path
from executor.recipe.schema import DataSection

FOLDER = REPO_ROOT / "dataset" / "vision_arena_bench"
FILES = ("dataset.jsonl", "dataset.json")
PARQUET = "train-*.parquet"
QUESTIONS = ("turns", "conversations", "messages", "question", "prompt", "text")
PICTURES = ("images", "image")


def load(data: DataSection) -> Dataset:
    """The rows of the folder (or file) dataset_path, or of the usual place."""
    path = find_path(data.dataset_path) if data.dataset_path else FOLDER
    if path.suffix == ".parquet" and path.is_file():
        return _published(path.parent, [path])
    if path.is_file():
        return open_rows(path)
    files = sorted([*path.glob(PARQUET), *path.glob(f"data/{PARQUET}")])
    if files and not any((path / name).is_file() for name in FILES):
        refuse_gaps(files)
        return _published(path, files)
    return open_rows(_rows_file(path))


def _published(folder: Path, files: list[Path]) -> Dataset:
    """The rows of Parquet files, each read when it is asked for and not kept."""
    rows = ParquetRows(files, needed=(), optional=QUESTIONS, media=PICTURES)
    if not len(rows):
        raise UserError(f"vision-arena-bench-v0.1: {', '.join(path.name for path in files)} in {folder} hold no rows")
    return Dataset(folder, [partial(_sample, rows, index, folder) for index in range(len(rows))], tuple(files))


def _sample(rows: ParquetRows, index: int, folder: Path) -> Sample:
    """A row's question with its pictures before it."""
    where = rows.where(index)
    entry = {key: value for key, value in rows.values[index].items() if value is not None}
    (sample,) = read_entry(entry, where, folder)
    if sample.error:
        return sample
    try:
        pictures = [_picture(picture, folder) for picture in _listed(rows.media(index))]
    except UserError as error:
        return Sample(where, error=printable(f"{where}: {error}"))
    except ODD_DATA_ERRORS as error:  # a damaged page is an error of its rows
        return Sample(where, error=printable(f"{where}: the row cannot be read ({type(error).__name__}: {error})"))
    first = next(number for number, message in enumerate(sample.messages) if message["role"] == "user")
    messages = list(sample.messages)
    said = messages[first]["content"]
    words = [{"type": "text", "text": said}] if isinstance(said, str) else said
    messages[first] = messages[first] | {"content": [*pictures, *words]}
    return replace(sample, messages=tuple(messages))


def _listed(media: Mapping[str, Any]) -> list[Any]:
    value = next((media[name] for name in PICTURES if media.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _picture(stored: Any, folder: Path) -> dict[str, Any]:
    if isinstance(stored, Mapping):
        stored = stored.get("bytes") or stored.get("path")
    if isinstance(stored, bytes) and stored:
        return picture_part(stored)
    if isinstance(stored, str) and (folder / stored).is_file():
        return picture_part(str(folder / stored))
    raise UserError(f"a picture is neither in the file nor in {folder}")


def _rows_file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]) if folder.is_dir() else []
    if len(others) == 1:
        return others[0]
    found = f"it has {', '.join(path.name for path in others)}" if others else "it has neither"
    state = found if folder.is_dir() else "there is no such folder"
    raise UserError(
        f"vision-arena-bench-v0.1 needs {folder} with data/{PARQUET}, or with {' or '.join(FILES)} and its pictures: "
        f"{state}. Put the data set there, or name its folder: --set data_config.dataset_path=FOLDER"
    )
