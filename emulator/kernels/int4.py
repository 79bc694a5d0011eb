"""int4 weights, eight to an int32: npu_convert_weight_to_int4pack and how the products read them.

Sources: the op's docstring in the torch_npu wheel, and for the order of the eight (the first in the lowest bits)
aclnnConvertWeightToINT4Pack beneath it. k rows, n columns of a weight.
"""

import torch
from torch import Tensor

from emulator.kernels.quant import pack_int4
from emulator.limits import require, require_contiguous, require_dtype, require_rank
from emulator.registry import kernel

PER_WORD = 8
_SHIFTS = torch.arange(0, 4 * PER_WORD, 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 `[..., n / 8]` as the int4 values it holds, int8 `[..., n]`."""
    nibbles = (packed.unsqueeze(-1) >> _SHIFTS) & 0xF
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


def is_transposed(x: Tensor) -> bool:
    """Whether the last two dimensions are a view of a contiguous tensor that has them the other way round."""
    return not x.is_contiguous() and x.transpose(-1, -2).is_contiguous()


def rows_of(w: Tensor) -> int:
    """k of a weight `[..., k, n]`; int32 holds eight to a word, along n, or along k where it is a transposed view."""
    return w.shape[-2] * (PER_WORD if w.dtype == torch.int32 and is_transposed(w) else 1)


def columns_of(w: Tensor) -> int:
    """n of such a weight."""
    return w.shape[-1] * (PER_WORD if w.dtype == torch.int32 and not is_transposed(w) else 1)


def unpack_matrix(w: Tensor) -> Tensor:
    """A packed weight as int8 `[..., k, n]`."""
    if is_transposed(w):
        return unpack_int4(w.transpose(-1, -2).contiguous()).transpose(-1, -2)
    return unpack_int4(w)


def _check_pack(weight: Tensor, inner_k_tiles: int = 0) -> None:
    require_dtype("weight", weight, (torch.int32,))
    require_rank("weight", weight, 2, 3)
    require_contiguous(weight=weight)
    require(
        weight.shape[-1] % PER_WORD == 0,
        f"weight's last dimension must be a multiple of {PER_WORD}",
        list(weight.shape),
    )
    require(inner_k_tiles == 0, "inner_k_tiles must be 0 (it is reserved)", inner_k_tiles)


def _pack_shape(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    return weight.new_empty(*weight.shape[:-1], weight.shape[-1] // PER_WORD)


@kernel("npu_convert_weight_to_int4pack", _check_pack, _pack_shape)
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    inside = bool(((weight >= -8) & (weight <= 7)).all())
    require(
        inside, "weight's values must lie in [-8, 7]", [int(weight.min()), int(weight.max())] if not inside else None
    )
    return pack_int4(weight)
