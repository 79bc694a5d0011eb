"""safetensors files written piece by piece: tensors that were made, and bytes that are copied as they stand.

A file is there whole or not at all. Readers take tensors out of a mapped file as they lie, so wider types come first:
then each stands at a multiple of its own size.
Format: 8 bytes little-endian header length, the header as JSON, the data without gaps.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.checkpoint.headers import SAFETENSORS_DTYPES, TensorInfo, read_header

CHUNK_BYTES = 16 << 20
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Stored:
    """Bytes of another file, to be copied as they stand."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype_name(self) -> str:
        return self.info.dtype_name

    @property
    def num_bytes(self) -> int:
        return self.info.num_bytes

    def chunks(self) -> Iterator[bytes]:
        with open(self.info.file, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_bytes + self.info.offset)
            left = self.num_bytes
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise RuntimeError(f"{self.info.file} ends before its tensors do: was it changed meanwhile?")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        return _NAMES[self.tensor.dtype]

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[bytes]:
        yield self.tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


Entry = Stored | Made


def write_tensors(path: Path, entries: Mapping[str, Entry], *, is_lasting: bool = True) -> None:
    """The tensors by name as one file, atomically. is_lasting: wait until it is on the disk."""
    names = sorted(entries, key=lambda name: -entries[name].num_bytes // max(_count(entries[name]), 1))  # stable
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry = entries[name]
        place = [offset, offset + entry.num_bytes]
        header[name] = {"dtype": entry.dtype_name, "shape": list(entry.shape), "data_offsets": place}
        offset += entry.num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data = (chunk for name in names for chunk in entries[name].chunks())
    write_atomically(path, (struct.pack("<Q", len(raw)), raw), data, is_lasting=is_lasting)


def _count(entry: Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count


def write_atomically(path: Path, *parts: Iterable[bytes], is_lasting: bool = True) -> None:
    """A file of these bytes, which is there whole or not at all; with is_lasting also after a loss of power."""
    scratch = path.with_name(f".{path.name}.part")
    with open(scratch, "wb") as file:
        for part in parts:
            for chunk in part:
                file.write(chunk)
        if is_lasting:
            file.flush()
            os.fsync(file.fileno())
    os.replace(scratch, path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, [json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"])


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, in the file's order."""
    return {info.original_name: Stored(info) for info in read_header(path)}


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
