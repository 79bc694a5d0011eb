"""Rows of a tensor where they lie in the checkpoint's file: only what is looked up comes into memory."""

import numpy as np
import torch
from torch import Tensor

from executor.checkpoint.headers import TensorInfo


def mapped_rows(info: TensorInfo, rows: slice) -> Tensor:
    """`rows` of a 2-d tensor of a safetensors file as a view of the file.

    The file may be removed or replaced by another while it is in use (the view keeps the old one), not written over.
    """
    with open(info.file, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    num_rows, num_columns = rows.stop - rows.start, info.shape[1]
    row_bytes = num_columns * info.dtype.itemsize
    start = 8 + header_bytes + info.offset + rows.start * row_bytes
    # "c": a private mapping, as torch asks for memory that could be written to.
    view = np.memmap(info.file, dtype=np.uint8, mode="c", offset=start, shape=(num_rows * row_bytes,))
    return torch.from_numpy(view).view(info.dtype).view(num_rows, num_columns)
