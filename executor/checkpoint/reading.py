"""A file's slices into memory: straight into their places where these have the file's own form, else by way of a map.

A place that takes bytes as they stand is filled by plain reads, at the speed of the disk or of the cache; a map would
bring every page by a fault of its own. Does not know why a slice is wanted.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from executor.checkpoint.headers import TensorInfo
from executor.checkpoint.pull import Pull

READ_BYTES = 64 << 20  # of one call; the kernel takes 2 GiB at most


class SliceReader:
    """An open safetensors file. Use it as a context manager. Raises OSError and SafetensorError."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> "SliceReader":
        self._mapped = safe_open(self._file, framework="pt").__enter__()
        self._descriptor = os.open(self._file, os.O_RDONLY)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
        self._data_start = 8 + int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)
        self._mapped.__exit__(*exception)

    def read(self, pull: Pull, info: TensorInfo, place: Callable[[Tensor], None]) -> None:
        """The slice that `pull` asks for: read into its place, or a view of the file handed to `place`."""
        if takes_bytes(pull, info):
            self._fill(pull, info)
        elif info.shape:
            place(self._mapped.get_slice(info.original_name)[pull.file_index])
        else:  # a scalar has nothing to slice
            place(self._mapped.get_tensor(info.original_name))

    def _fill(self, pull: Pull, info: TensorInfo) -> None:
        row_bytes = info.num_bytes // info.shape[0]
        at = self._data_start + info.offset + pull.file_index[0].start * row_bytes
        into = memoryview(pull.into.detach().view(-1).view(torch.uint8).numpy())
        while into:
            count = os.preadv(self._descriptor, [into[:READ_BYTES]], at)
            if not count:
                raise OSError("it ends before its last tensor")
            into, at = into[count:], at + count


def takes_bytes(pull: Pull, info: TensorInfo) -> bool:
    """Whether the slice is one run of bytes in the file, and its place one run of memory of the same type."""
    into, whole = pull.into, info.shape[1:]
    return (
        bool(info.shape)
        and pull.convert is None
        and not pull.transpose
        and into.device.type == "cpu"
        and into.dtype is info.dtype
        and into.is_contiguous()
        and all((part.start, part.stop) == (0, size) for part, size in zip(pull.file_index[1:], whole, strict=True))
    )
