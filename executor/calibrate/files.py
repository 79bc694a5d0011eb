"""Files of an unfinished quantization: there whole or not at all, whenever it is stopped."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from executor.checkpoint.writing import Entry, write_json, write_safetensors


def put_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """The tensors as one safetensors file, instead of one that may be there."""
    _put(path, lambda scratch: write_safetensors(scratch, entries))


def put_json(path: Path, content: dict[str, Any]) -> None:
    _put(path, lambda scratch: write_json(scratch, content))


def _put(path: Path, write: Callable[[Path], None]) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.unlink(missing_ok=True)
    write(scratch)
    os.replace(scratch, path)


def shards(sizes: Sequence[int], most_bytes: int) -> list[list[int]]:
    """Numbers of parts of these sizes, one after another, in groups of at most `most_bytes` or of a single part."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(number)
        room -= size
    return groups
