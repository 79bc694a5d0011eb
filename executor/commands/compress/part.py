"""One rank's part: its weights compressed, written beside what it reads of all others, and read back."""

import logging
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from executor.checkpoint.description import FLOAT_TYPE, read_description
from executor.checkpoint.headers import Checkpoint, TensorInfo
from executor.checkpoint.part_pulls import Bounds
from executor.checkpoint.parts import part_name
from executor.checkpoint.writing import Entry, computed_entry, tensor_entry, write_json, write_safetensors
from executor.commands.compress.job import DTYPE, Job, Share, share_of
from executor.errors import UserError
from executor.quant.choose import COMPRESSED_TYPE
from executor.quant.compressor import Packed, Running, compress, work_folder
from executor.quant.fields import scale_of_bits

logger = logging.getLogger(__name__)

WEIGHTS = "quant_model_weight_w8a8sc.safetensors"
DESCRIPTION = "quant_model_description.json"
_Dims = tuple[tuple[Bounds, ...], ...]


@dataclass(frozen=True)
class Compressor:
    """The executable, and how many of it run at a time."""

    executable: Path
    num_processes: int


def write_part(job: Job, share: Share, compressor: Compressor, staging: Path) -> dict[str, list[int]]:
    """Write and check `part{rank}-of-{size}` below `staging`: [plain, compressed] bytes by the weight's linear.

    Raises RuntimeError where the executable fails, or what was written does not read back.
    """
    folder = staging / part_name(share.rank, job.size)
    folder.mkdir()
    packed = _compressed(job, share, compressor)
    types: dict[str, str] = {}
    entries = list(_entries(job, share, packed, types))
    write_safetensors(folder / WEIGHTS, entries)
    write_json(folder / DESCRIPTION, {**job.described, "model_quant_type": COMPRESSED_TYPE, **types})
    _read_back(job, share, packed, folder)
    return {name: [n * k, packed[name].num_bytes] for name, (n, k) in share.linears.items()}


def _compressed(job: Job, share: Share, compressor: Compressor) -> dict[str, Packed]:
    """Every weight to compress, several at a time, held in memory; the first failure ends it."""
    running = Running()
    with work_folder() as root, ThreadPoolExecutor(compressor.num_processes) as pool:

        def one(name: str) -> Packed:
            place = Path(root) / str(names.index(name))
            place.mkdir(mode=0o700)
            info = job.checkpoint.catalog[f"{name}.weight"]
            weight = _read(info, share.taken[f"{name}.weight"])
            return compress(compressor.executable, weight, name, place, running)

        names = list(share.linears)
        waiting = [pool.submit(one, name) for name in names]
        bar = tqdm(waiting, f"rank {share.rank}", unit="weight", file=sys.stderr, disable=not sys.stderr.isatty())
        try:
            return {name: future.result() for name, future in zip(names, bar, strict=True)}
        except BaseException:  # a signal, too: the executables would go on for minutes
            running.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _entries(job: Job, share: Share, packed: Mapping[str, Packed], types: dict[str, str]) -> Iterator[Entry]:
    """All tensors of the part, and their types into `types`, under the names that the checkpoint gives them."""
    catalog = job.checkpoint.catalog
    for name, dims in share.taken.items():
        info = catalog[name]
        linear, suffix = name.rpartition(".")[::2]
        original = info.original_name.rpartition(".")[0]
        if linear not in share.linears:
            types[info.original_name] = job.description.type_of(name)
            yield _kept(info, dims, types[info.original_name])
            continue
        made = _of_compressed(info, dims, suffix, packed[linear], share.linears[linear][0])
        if suffix == "weight" and f"{linear}.quant_bias" not in share.taken:
            made["quant_bias"] = torch.zeros(share.linears[linear][0], dtype=torch.int32)  # another rank adds it
        for each, tensor in made.items():
            types[f"{original}.{each}"] = COMPRESSED_TYPE
            yield tensor_entry(f"{original}.{each}", tensor)


def _of_compressed(info: TensorInfo, dims: _Dims, suffix: str, packed: Packed, n: int) -> dict[str, Tensor]:
    """What a compressed linear has in place of one of its tensors."""
    if suffix == "weight":
        return {"weight": packed.values, "index": packed.index, "info": packed.info}
    x = _read(info, dims)
    if suffix == "deq_scale":
        if x.dtype is not torch.int64:  # as models in float16 have it: the 32 bits of the number
            x = scale_of_bits(x).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        x = x.reshape(-1).expand(n).clone()
    return {suffix: x}


def _kept(info: TensorInfo, dims: _Dims, kind: str) -> Entry:
    """A tensor that is not compressed: this rank's slice, float weights in the chip's type."""
    narrows = kind == FLOAT_TYPE and info.dtype.is_floating_point and info.dtype is not DTYPE

    def parts() -> tuple[Tensor]:
        x = _read(info, dims)
        if not narrows:
            return (x,)
        narrow = x.to(DTYPE)
        if not bool(torch.isfinite(narrow).all()):
            raise UserError(f"'{info.original_name}' of {info.file} has values that float16 cannot hold")
        return (narrow,)

    shape = tuple(sum(stop - start for start, stop in bounds) for bounds in dims)
    return computed_entry(info.original_name, DTYPE if narrows else info.dtype, shape, parts)


def _read(info: TensorInfo, dims: _Dims) -> Tensor:
    with safe_open(info.file, framework="pt") as file:
        if not dims:  # a scalar has nothing to slice
            return file.get_tensor(info.original_name)
        return _sliced(file.get_slice(info.original_name), dims)


def _sliced(view: Any, dims: _Dims) -> Tensor:
    for place, bounds in enumerate(dims):
        if len(bounds) > 1:
            return torch.cat([_sliced(view, (*dims[:place], (each,), *dims[place + 1 :])) for each in bounds], place)
    return view[tuple(slice(*bounds[0]) for bounds in dims)]


def _read_back(job: Job, share: Share, packed: Mapping[str, Packed], folder: Path) -> None:
    """Open the part as loading does, and compare what was compressed. Raises RuntimeError where something differs."""
    try:
        checkpoint = Checkpoint(folder, is_part=True)
        found = share_of(job, share.rank, checkpoint, read_description(folder))
    except UserError as error:
        raise RuntimeError(f"{folder.name} does not read back: {error}") from error
    wrong = [name for name in share.linears if not _is_stored(checkpoint, name, packed[name])]
    if found.linears != share.linears or wrong:
        raise RuntimeError(
            f"{folder.name} does not read back as it was written: {', '.join(wrong[:3])}; is the disk sound?"
        )


def _is_stored(checkpoint: Checkpoint, name: str, packed: Packed) -> bool:
    for suffix, tensor in (("weight", packed.values), ("index", packed.index), ("info", packed.info)):
        info = checkpoint.catalog[f"{name}.{suffix}"]
        if not torch.equal(_read(info, tuple(((0, size),) for size in info.shape)), tensor):
            return False
    return True
