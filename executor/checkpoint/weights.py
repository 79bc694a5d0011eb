"""Weights from a local folder of safetensors into parameters: the model pulls, each rank reads only its slices.

Job: copy the slices a model asks for into place (`load_weights`), and prove that nothing of the model was left out
(`check_complete`; `poison` and `unwritten` for tests).
Invariants: every pull is checked before the first is copied; a slice is copied once, out of the file into its
place. Does not know models, ranks, devices or quantization: a `Pull` says where a slice goes, nothing else.
"""

import fnmatch
import logging
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from executor.checkpoint.headers import SAFETENSORS_DTYPES, Checkpoint, TensorInfo
from executor.checkpoint.pull import Pull, drained, swap_last_two
from executor.checkpoint.reading import SliceReader, takes_bytes
from executor.checkpoint.strangers import QUANTIZED_TYPES, no_scheme, refuse_unmerged, unread_names
from executor.errors import UserError

__all__ = ["Checkpoint", "LoadReport", "Pull", "TensorInfo", "check_complete", "load_weights", "poison", "unwritten"]

logger = logging.getLogger(__name__)

PROGRESS_MIN_BYTES = 256 << 20
PROGRESS_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. `bytes_read` counts the requested slices, as stored in the files."""

    bytes_read: int
    total_bytes: int  # of all tensors of the checkpoint
    seconds: float
    unread: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.bytes_read / self.total_bytes if self.total_bytes else 0.0

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes_read / max(self.seconds, 1e-9) / 1e9


@torch.no_grad()
def load_weights(
    pulls: Iterable[Pull],
    checkpoint: Checkpoint,
    *,
    ignore: Iterable[str] = (),
    progress: bool | None = None,
    filled: Callable[[Pull], None] | None = None,
) -> LoadReport:
    """Copies every pulled slice into its place, file by file in file order.

    ignore: shell patterns of canonical names that may stay unread without a warning.
    progress: None shows a bar for large loads on a terminal, and lines in the log elsewhere; False shows nothing.
    filled: told of every pull once its slice is in place; nothing here holds on to it after that.
    Raises UserError for missing tensors, wrong shapes and types that cannot be loaded, before anything is copied.
    """
    pulls = list(pulls)
    refuse_unmerged(checkpoint)
    unread = unread_names(pulls, checkpoint, ignore)
    start = time.perf_counter()
    planned_bytes = fill(drained(pulls), checkpoint, progress=progress, filled=filled)
    seconds = time.perf_counter() - start

    report = LoadReport(planned_bytes, checkpoint.total_bytes, seconds, unread)
    logger.info(
        "weights: this rank's %.2f of %.2f GB (%.0f %%) in %.1f s, %.2f GB/s",
        report.bytes_read / 1e9, report.total_bytes / 1e9, 100 * report.share, seconds, report.gigabytes_per_s,
    )  # fmt: skip
    if unread:
        shown = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        logger.warning("%s: %d tensors were not used: %s", checkpoint.folder, len(unread), shown)
    return report


def check_pulls(pulls: Iterable[Pull], checkpoint: Checkpoint) -> None:
    """UserError with all that `pull_faults` finds."""
    if faults := pull_faults(pulls, checkpoint):
        raise UserError("\n".join(faults))


@torch.no_grad()
def fill(
    pulls: Iterable[Pull],
    checkpoint: Checkpoint,
    *,
    progress: bool | None = False,
    filled: Callable[[Pull], None] | None = None,
) -> int:
    """Copies the slices of some layers into place; their bytes, of one that is read twice once.

    `load_weights` is for a whole model, and says what `filled` is.

    Raises UserError as it does.
    """
    by_file = _by_file(list(pulls), checkpoint)
    planned_bytes = sum(_slice_bytes(*wish) for wishes in by_file.values() for wish in wishes)
    once = {
        (wish[0].name, *((part.start, part.stop) for part in wish[0].file_index)): _slice_bytes(*wish)
        for wishes in by_file.values()
        for wish in wishes
    }
    with _Progress(planned_bytes, progress) as bar:
        for file in checkpoint.files:
            for pull, info in _read(file, by_file.pop(file, [])):
                bar.advance(_slice_bytes(pull, info))
                if filled is not None:
                    filled(pull)
    return sum(once.values())


def _by_file(pulls: list[Pull], checkpoint: Checkpoint) -> dict[Path, list[tuple[Pull, TensorInfo]]]:
    check_pulls(pulls, checkpoint)
    by_file: dict[Path, list[tuple[Pull, TensorInfo]]] = defaultdict(list)
    for pull in pulls:
        info = checkpoint.catalog[pull.name]
        _check_slice(pull)
        if pull.into.numel():
            by_file[info.file].append((pull, info))
    return by_file


def _read(file: Path, wishes: list[tuple[Pull, TensorInfo]]) -> Iterator[tuple[Pull, TensorInfo]]:
    """Each pull of a file once its slice is in place, in file order; `wishes` is empty in the end."""
    if not wishes:
        return
    wishes.sort(key=lambda wish: wish[1].offset, reverse=True)
    try:
        with SliceReader(file) as reader:
            while wishes:
                pull, info = wishes.pop()
                reader.read(pull, info, partial(_copy, pull=pull, info=info))
                if takes_bytes(pull, info):
                    converted(pull.into, pull, info)
                yield pull, info
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error}); download it again") from error


def converted(part: torch.Tensor, pull: Pull, info: TensorInfo) -> torch.Tensor:
    """What goes into place of `part`, a slice as the file has it. Raises UserError for values that cannot be."""
    if pull.convert is not None:
        part = pull.convert(part)
    if is_small_float(info) and part.is_floating_point() and not bool((finite := torch.isfinite(part)).all()):
        raise UserError(
            f"tensor '{pull.name}' must hold finite numbers, got {float(part[~finite][0]):g}; copy {info.file} again "
            "from where it came, or make it again"
        )
    return part


def is_small_float(info: TensorInfo) -> bool:
    """Norms, biases and the like, whose values are cheap to look at."""
    return len(info.shape) <= 1 and info.dtype is not None and info.dtype.is_floating_point


def _copy(part: torch.Tensor, pull: Pull, info: TensorInfo) -> None:
    """`part` is a view of the mapped file: this is the one copy."""
    into, part = pull.into, converted(part, pull, info)
    narrows = into.dtype is torch.float16 and part.dtype is not torch.float16
    if pull.transpose:
        # Sent and cast first: a transposing copy that also converts takes an element at a time.
        part = part.to(into.device, into.dtype).transpose(-1, -2)
    into.copy_(part)
    if narrows and not bool(torch.isfinite(into).all()):
        raise UserError(
            f"tensor '{pull.name}' has values that float16 cannot hold; set model_config.dtype to bfloat16 or float32"
        )


def pull_faults(pulls: Iterable[Pull], checkpoint: Checkpoint) -> list[str]:
    """What keeps the pulls from being read, by the headers alone: missing tensors, wrong shapes and types.

    Tensors that have the same fault are told in one line.
    """
    pulls, faults = list(pulls), []
    missing = sorted({pull.name for pull in pulls} - checkpoint.catalog.keys())
    if missing:
        faults.append(checkpoint.describe_missing(missing))
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for pull in pulls:
        info = checkpoint.catalog.get(pull.name)
        if info is not None and (reason := _fault(pull, info, checkpoint)):
            found[reason][pull.name] = info.file
    for reason, names in found.items():
        name, file = next(iter(names.items()))
        more = f" and {len(names) - 1} more, such as '{next(reversed(names))}'," if len(names) > 1 else ""
        faults.append(f"tensor '{name}' of {file}{more} {reason}")
    return faults


def _fault(pull: Pull, info: TensorInfo, checkpoint: Checkpoint) -> str | None:
    if info.dtype is None and re.match(QUANTIZED_TYPES, info.dtype_name):
        return f"has type {info.dtype_name}; {no_scheme(checkpoint)}"
    if info.dtype is None:
        return f"has type {info.dtype_name}, which is not supported; allowed: {', '.join(SAFETENSORS_DTYPES)}"
    if pull.file_shape != info.shape:
        return (
            f"has shape {list(info.shape)}, but the model expects {list(pull.file_shape)}; "
            "check that config.json belongs to these weights"
        )
    wanted = pull.into.dtype
    fits = not pull.accepts if pull.convert is not None else _converts(info.dtype, wanted)
    if fits or info.dtype in pull.accepts:
        return None
    if pull.accepts or wanted in _QUANTIZED:
        allowed = [name for name, dtype in SAFETENSORS_DTYPES.items() if dtype in (pull.accepts or (wanted,))]
        return (
            f"has type {info.dtype_name}; what the description calls it has {' or '.join(allowed)}. Take the "
            "description that was written with these weights, or quantize the model again"
        )
    into = str(wanted).removeprefix("torch.")
    return f"has type {info.dtype_name}, which does not convert to {into}; {no_scheme(checkpoint)}"


_QUANTIZED = (torch.int8, torch.int32)  # of parameters: quantized values and biases, stored as they are


def _check_slice(pull: Pull) -> None:
    assert len(pull.index) <= len(pull.shape), f"{pull.name}: {len(pull.index)} slices of {pull.shape}"
    assert all(part.step in (None, 1) for part in pull.index), f"{pull.name}: a slice with a step"
    if pull.convert is not None:
        return
    sizes = tuple(part.stop - part.start for part in pull.file_index)
    sizes = swap_last_two(sizes) if pull.transpose else sizes
    assert tuple(pull.into.shape) == sizes, f"{pull.name}: slice {sizes} into {tuple(pull.into.shape)}"


def _converts(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Between float types, and to wider integers: integers read as floats are quantized weights without a scheme."""
    if stored.is_floating_point or wanted.is_floating_point:
        return stored.is_floating_point and wanted.is_floating_point
    return torch.promote_types(stored, wanted) is wanted


def _slice_bytes(pull: Pull, info: TensorInfo) -> int:
    """Of the slice in its file; `into` may be wider, where one number is meant for every row."""
    return math.prod(part.stop - part.start for part in pull.file_index) * info.dtype.itemsize


class _Progress:
    """Bytes loaded so far: a bar on a terminal, a log line now and then where stderr is a file."""

    def __init__(self, total_bytes: int, wanted: bool | None):
        self.total_bytes = total_bytes
        show = total_bytes >= PROGRESS_MIN_BYTES if wanted is None else wanted
        on_terminal = sys.stderr.isatty()
        self.logs = show and not on_terminal
        self.done_bytes = 0
        self.last_log_s = time.perf_counter()
        self.bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            desc="weights",
            file=sys.stderr,
            disable=not (show and on_terminal),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        self.bar.update(num_bytes)
        now = time.perf_counter()
        if self.logs and now - self.last_log_s >= PROGRESS_LOG_EVERY_S:
            self.last_log_s = now
            logger.info("weights: %.2f of %.2f GB", self.done_bytes / 1e9, self.total_bytes / 1e9)


def check_complete(module: nn.Module, pulls: Iterable[Pull], *, partial: Iterable[str] = ()) -> None:
    """Asserts that the pulls fill every element of every parameter once; works on the meta device too.

    partial: shell patterns of parameters of which only a part is pulled (padding stays as initialised).
    Regions are compared by size and, where they are contiguous, by place. A parameter that two names share counts
    once; a pull into a tensor of another storage (a buffer, a staging tensor) counts for nothing.
    """
    partial = tuple(partial)
    regions: dict[int, list[torch.Tensor]] = defaultdict(list)
    for pull in pulls:
        regions[pull.into.untyped_storage()._cdata].append(pull.into)
    problems = []
    for name, parameter in module.named_parameters():
        first = parameter.storage_offset()
        last = first + _extent(parameter)
        mine = [
            into
            for into in regions[parameter.untyped_storage()._cdata]
            if first <= into.storage_offset() and into.storage_offset() + _extent(into) <= last
        ]
        filled = sum(into.numel() for into in mine)
        runs = sorted((into.storage_offset(), into.numel()) for into in mine if into.is_contiguous() and into.numel())
        overlaps = any(start + count > after for (start, count), (after, _) in zip(runs, runs[1:], strict=False))
        padded = any(fnmatch.fnmatchcase(name, pattern) for pattern in partial)
        least = min(1, parameter.numel()) if padded else parameter.numel()
        if overlaps or not least <= filled <= parameter.numel():
            problems.append(f"{name} {list(parameter.shape)}: {filled} of {parameter.numel()}")
    assert not problems, "parameters not filled exactly once by the pulls: " + "; ".join(problems)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to one past its last in its storage."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@torch.no_grad()
def poison(module: nn.Module) -> None:
    """For tests: fills every parameter with a sentinel (NaN, or the least integer) that `unwritten` recognises."""
    for parameter in module.parameters():
        parameter.fill_(_sentinel(parameter.dtype))


def unwritten(module: nn.Module) -> list[str]:
    """Names of parameters that still hold the sentinel: anywhere for floats, everywhere for integers."""
    names = []
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            kept = bool(parameter.isnan().any())
        else:
            kept = parameter.numel() > 0 and bool((parameter == _sentinel(parameter.dtype)).all())
        if kept:
            names.append(name)
    return names


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype is torch.bool else torch.iinfo(dtype).min
