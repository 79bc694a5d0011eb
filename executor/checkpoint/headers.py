"""What a checkpoint folder holds: the catalog of its tensors, by canonical name, from the headers alone.

Invariant: every file's header is checked against the file's size, and an index against the headers, before a byte of
weights is read. Does not know what the tensors are for, and copies none (`weights.load_weights` does).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.checkpoint.files import find_weights, unreadable
from executor.checkpoint.names import canonical_name
from executor.errors import UserError, nearest

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What can be loaded. Others (float8, packed 4 bit) may lie in a file, but a pull of one is refused."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its file's header announces it. `dtype` is None for one we cannot load."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    original_name: str = ""
    offset: int = 0  # of its first byte in the file's data part
    num_bytes: int = 0
    dtype_name: str = ""  # as the file spells it


class Checkpoint:
    """A local folder of `*.safetensors`, with or without an index. Reads headers only.

    `catalog` maps canonical names (`model.visual.*`, `model.language_model.*`, `lm_head.*`) to `TensorInfo`, in the
    order of the files. `is_part`: it holds what one rank reads and no more (executor/checkpoint/parts.py).
    Raises UserError for a folder that is no complete safetensors checkpoint.
    """

    def __init__(self, folder: str | Path, is_part: bool = False):
        self.folder = Path(folder).expanduser()
        self.is_part = is_part
        found = find_weights(self.folder)
        index_file, weight_map = found.index_file, found.weight_map
        self.files: tuple[Path, ...] = found.files
        self.is_described = found.is_described
        self.ignored: tuple[Path, ...] = found.ignored
        self.catalog: dict[str, TensorInfo] = _merge_headers(self.files, weight_map)
        if weight_map is not None:
            _check_index_against_files(index_file, weight_map, self.catalog)

    @property
    def total_bytes(self) -> int:
        return sum(info.num_bytes for info in self.catalog.values())

    def find(self, name: str) -> TensorInfo:
        """The tensor of a canonical name; UserError names the nearest when it is not there."""
        if name in self.catalog:
            return self.catalog[name]
        raise UserError(self.describe_missing([name]))

    def describe_missing(self, names: list[str]) -> str:
        # Names that end alike are the plausible ones, and a large MoE has far too many to compare them all.
        ending = names[0].rsplit(".", 1)[-1]
        alike = [name for name in self.catalog if name.endswith(ending)][:4000]
        more = f" and {len(names) - 1} more, such as '{names[-1]}'" if len(names) > 1 else ""
        tied = "lm_head.weight" in names
        hint = ". Where the head is the embedding, write tie_word_embeddings: true in config.json" if tied else ""
        return (
            f"{self.folder}: tensor '{names[0]}' is missing{more}{nearest(names[0], alike)}; the checkpoint holds "
            f"{len(self.catalog)} tensors in {len(self.files)} file(s). Check that config.json belongs to these "
            f"weights and that the download is complete{hint}"
        )


def _merge_headers(files: Iterable[Path], weight_map: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    catalog: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            name = canonical_name(info.original_name)
            other = catalog.get(name)
            chosen = (weight_map or {}).get(info.original_name)
            resolved = other is not None and other.original_name == info.original_name and chosen is not None
            if resolved and chosen == other.file.name:
                continue  # a stale copy: the index says which file counts
            if other is not None and not resolved:
                raise UserError(
                    f"tensor '{name}' is there twice: as '{other.original_name}' in {other.file} and as "
                    f"'{info.original_name}' in {file}; remove the file that does not belong to this checkpoint"
                )
            catalog[name] = info
    return catalog


def _check_index_against_files(
    index_file: Path, weight_map: Mapping[str, str], catalog: Mapping[str, TensorInfo]
) -> None:
    for original, file in weight_map.items():
        info = catalog.get(canonical_name(original))
        if info is None or info.file.name != file:
            raise UserError(f"{index_file}: names tensor '{original}' in '{file}', which does not hold it")


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file in file order, after checking that the whole file is there.

    Format: 8 bytes little-endian header length, the header as JSON, the data without gaps.
    """
    try:
        return _read_header(file)
    except OSError as error:
        raise UserError(unreadable(file, error)) from error


def _read_header(file: Path) -> list[TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(len(LFS_POINTER) - 8)) == LFS_POINTER:
            raise UserError(f"{file}: a git-lfs pointer, not the weights; run 'git lfs pull' in its folder")
        if len(start) < 8:
            raise UserError(f"{file}: truncated, {size} bytes; download it again")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            reason = "truncated" if header_bytes <= MAX_HEADER_BYTES else "not a safetensors file"
            raise UserError(f"{file}: {reason}: a header of {header_bytes} bytes in {size} bytes; download it again")
        stream.seek(8)
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        infos = [_tensor_info(file, name, entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its header is damaged ({error!r}); download it again") from error
    infos.sort(key=lambda info: (info.offset, info.num_bytes))
    _check_extents(file, infos, size - 8 - header_bytes)
    return infos


def _tensor_info(file: Path, name: str, entry: Mapping) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor '{name}' of shape {shape} and type {entry['dtype']} in {end - begin} bytes")
    return TensorInfo(shape, dtype, file, name, begin, end - begin, entry["dtype"])


def _check_extents(file: Path, infos: list[TensorInfo], data_bytes: int) -> None:
    end = 0
    for info in infos:
        if info.offset != end:
            raise UserError(f"{file}: tensor '{info.original_name}' does not follow the one before; download it again")
        end += info.num_bytes
    if data_bytes != end:
        reason = "truncated" if data_bytes < end else "too long"
        raise UserError(
            f"{file}: {reason}: {data_bytes} bytes of weights where its header announces {end}; download it again"
        )
