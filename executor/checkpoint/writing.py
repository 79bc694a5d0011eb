"""Writes checkpoint folders: safetensors files piece by piece, and folders that appear whole or not at all.

Memory stays bounded by the largest piece of a tensor. Does not know models or schemes.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.checkpoint.files import DESCRIPTIONS
from executor.checkpoint.headers import SAFETENSORS_DTYPES, TensorInfo
from executor.checkpoint.parts import part_folders
from executor.errors import UserError

STAGING = ".unfinished"
"""Below the folder that is being written: everything lies there until all of it is written."""
CONFIG = "config.json"
PIECE_BYTES = 64 << 20
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_Pieces = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to write. `data` gives its bytes when its turn comes; `dtype_name` as the files spell it."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    num_bytes: int
    data: Callable[[], _Pieces]


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """A tensor that is in memory."""
    return computed_entry(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def computed_entry(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Callable[[], Iterable[Tensor]]
) -> Entry:
    """A tensor whose values are made when it is written, in parts that follow one another in memory."""

    def data() -> Iterator[memoryview]:
        for part in parts():
            assert part.dtype is dtype, f"{name}: {part.dtype} where {dtype} was announced"
            flat = part.contiguous().as_strided((part.numel(),), (1,))  # a single element may have any stride
            yield memoryview(flat.view(torch.uint8).numpy())

    return Entry(name, _NAMES[dtype], shape, prod(shape) * dtype.itemsize, data)


def copied_entry(info: TensorInfo) -> Entry:
    """A tensor as another file has it, byte for byte."""

    def data() -> Iterator[bytes]:
        with info.file.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            file.seek(8 + header_bytes + info.offset)
            left = info.num_bytes
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise UserError(f"{info.file}: it has become shorter while it was read; copy it again")
                left -= len(piece)
                yield piece

    return Entry(info.original_name, info.dtype_name, info.shape, info.num_bytes, data)


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """One file, on the disk when this returns. Wide types come first, so that every tensor lies on its own boundary."""
    widths = {name: dtype.itemsize for name, dtype in SAFETENSORS_DTYPES.items()}
    entries = sorted(entries, key=lambda entry: -widths.get(entry.dtype_name, 0))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype_name, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for entry in entries:
            written = sum(file.write(piece) for piece in entry.data())
            assert written == entry.num_bytes, f"{entry.name}: {written} bytes instead of {entry.num_bytes}"
        _to_disk(file)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(size)).get("__metadata__", {})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        _to_disk(file)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json whose weights have `dtype`: under both spellings of the key, and in the parts that name one."""
    changed = dict(config)
    for key in ("text_config", "vision_config"):
        if isinstance(changed.get(key), Mapping):
            held = changed[key]
            changed[key] = {name: dtype if name in ("dtype", "torch_dtype") else held[name] for name in held}
    keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]
    return changed | dict.fromkeys(keys, dtype)


def copy_files(source: Path, target: Path, is_wanted: Callable[[Path], bool]) -> None:
    """The files of `files_below` into `target`; links become files."""
    for name in files_below(source, is_wanted):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def files_below(source: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """Paths, relative to `source`, of the files of this checkpoint that `is_wanted`.

    What a download leaves in folders whose names begin with a dot is no part of a checkpoint, nor is a folder that is
    a checkpoint itself: it holds a config.json, a quantizer's description or weights, and is no rank's part of this.
    """
    names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    signs = (CONFIG, DESCRIPTIONS, "*.safetensors")
    parts = [folder.relative_to(source) for folder in part_folders(source)]
    others = {name.parent for name in names if any(name.match(sign) for sign in signs)} - {Path(), *parts}
    return [
        name
        for name in names
        if not any(part.startswith(".") for part in name.parts) and others.isdisjoint(name.parents) and is_wanted(name)
    ]


def check_apart(source: Path, target: Path) -> None:
    """UserError where one of the two folders lies in the other, or both are one."""
    held, new = source.resolve(), target.resolve()
    if held == new or held in new.parents or new in held.parents:
        where = "is" if held == new else "lies in" if held in new.parents else "holds"
        raise UserError(
            f"--save_directory: {target} {where} the checkpoint that is read, {source}; give a folder beside it"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write a checkpoint to, whose content becomes `folder`'s at the end; after an error there is nothing.

    Raises UserError for a folder that holds something, RuntimeError where it cannot be written.
    """
    check_empty(folder)
    was_there = folder.exists()
    try:
        yield begin_folder(folder)
        finish_folder(folder)
    except OSError as error:
        raise not_written(folder, error) from error
    finally:
        abandon_folder(folder, keep=was_there)


def check_empty(folder: Path) -> None:
    """UserError for a folder to be written that holds something. What an interrupted run left does not count."""
    try:
        held = sorted(path.name for path in folder.iterdir() if path.name != STAGING) if folder.exists() else []
    except NotADirectoryError:
        raise UserError(f"--save_directory: {folder} is a file; give a folder that does not exist yet") from None
    if held:
        shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        raise UserError(
            f"--save_directory: {folder} is not empty: it holds {shown}; give a folder that does not exist yet, or "
            "remove what is in it"
        )


def begin_folder(folder: Path) -> Path:
    """Where to write, empty; what an interrupted run left there is removed."""
    staging = folder / STAGING
    if staging.exists():
        shutil.rmtree(staging)
    make_folder(staging)
    return staging


def make_folder(folder: Path) -> None:
    """UserError where there can be none; OSError where the disk is full or broken."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        why = f"{file} is a file" if file else f"{folder} cannot be made ({error.strerror or error})"
        raise UserError(f"--save_directory: {why}; give a place where a folder can be made") from error


def finish_folder(folder: Path) -> None:
    """Move everything into place, config.json last: a folder without one is no checkpoint."""
    staging = folder / STAGING
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
        path.rename(folder / path.name)
    staging.rmdir()


def abandon_folder(folder: Path, keep: bool) -> None:
    """Remove what was not finished, and the folder too where nothing is in it, unless it is to be kept."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    if not keep and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def not_written(folder: Path, error: OSError) -> RuntimeError:
    """What to say of a disk that is full, and the like."""
    where = f" ({error.filename})" if error.filename else ""
    return RuntimeError(
        f"{folder} cannot be written: {error.strerror or error}{where}; what was written of it has been removed"
    )


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
