"""Small folders in the forms that data sets are published in, with pictures of our own."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.load import load_dataset
from dataset.sample import Sample
from executor.recipe.schema import DataSection
from tests.reference import REPO

CLIP = (REPO / "dataset" / "media" / "clip.mp4").read_bytes()
TEN = ["nokia"] * 8 + ["nokia phone", "unanswerable"]


def png(seed: int = 0, width: int = 64, height: int = 48) -> bytes:
    """A picture of noise: another for every seed."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture_file(path: Path, seed: int = 0, **size: int) -> bytes:
    """A picture under `path`, whose folders are made; its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = png(seed, **size)
    path.write_bytes(content)
    return content


def embedded(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    """A picture as the library `datasets` writes it into a column."""
    return {"bytes": content, "path": path}


def parquet(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """A Parquet file of these rows, whose folders are made."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    return path


def json_file(path: Path, content: Any) -> Path:
    """`content` as JSON, or, of a name that ends so, its items as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in content) if lines else json.dumps(content))
    return path


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A tab-separated table, as VLMEvalKit's are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def base64_of(content: bytes) -> str:
    """A picture as text."""
    return base64.b64encode(content).decode()


def load(name: str, path: Path, **fields: Any) -> list[Sample]:
    """The samples of a data set in `path`."""
    return list(load_dataset(DataSection(dataset=name, dataset_path=str(path), **fields)))


def content_of(sample: Sample) -> list[dict[str, Any]]:
    """The parts of its only message."""
    (message,) = sample.messages
    return message["content"]


def picture_of(sample: Sample, index: int = 0) -> bytes:
    """The bytes of one of its pictures, wherever they are."""
    source = sample.media_parts[index]["image"]
    return source if isinstance(source, bytes) else Path(source).read_bytes()
