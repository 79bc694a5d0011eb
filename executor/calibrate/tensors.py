"""The tensors of one quantized linear as msmodelslim's v1 files have them, by suffix.

Legend: n outputs, k inputs. Formulas: those of executor/device/weights.py, from the other side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor.calibrate.rounding import LEAST_SCALE

_INT32 = torch.iinfo(torch.int32)
LOAD_SPLITS = 16
"""W4A8: a linear that is split by its inputs has the sums of so many parts of each row, for as many ranks."""


@dataclass(frozen=True)
class InputRange:
    """Least and largest value of the activations that a linear reads; zero lies between them."""

    low: float
    high: float

    @property
    def scale(self) -> Tensor:
        """float32 [1]."""
        low, high = torch.tensor([min(self.low, 0.0)]), torch.tensor([max(self.high, 0.0)])
        return ((high - low) / 255).clamp_(min=LEAST_SCALE)

    @property
    def offset(self) -> Tensor:
        """float32 [1], a whole number: what zero becomes."""
        return torch.round(-torch.tensor([min(self.low, 0.0)]) / self.scale) - 128


def static_tensors(
    values: Tensor, scale: Tensor, bias: Tensor | None, inputs: InputRange, int64_scale: bool
) -> dict[str, Tensor]:
    """W8A8 and W8A8S: `values` int8 [n, k], `scale` float32 [n, 1], `bias` float [n].

    `int64_scale`: deq_scale as the bits of a float32 in an int64, as float16 models have it.
    """
    deq_scale = inputs.scale * scale.squeeze(1)
    return {
        "weight": values,
        "quant_bias": integer_bias(values, deq_scale, bias, inputs.offset),
        "input_scale": inputs.scale,
        "input_offset": inputs.offset,
        "deq_scale": _as_int64(deq_scale) if int64_scale else deq_scale,
    }


def integer_bias(values: Tensor, deq_scale: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """The linear's bias and the offset's part of every output, int32 [n]; it saturates."""
    float_part = torch.zeros_like(deq_scale) if bias is None else bias.float() / deq_scale
    # The offset's part is a product of whole numbers beyond float32's; in float64 it is exact.
    whole = torch.round(float_part.double() - offset.double() * values.to(torch.int64).sum(1))
    return whole.clamp_(_INT32.min, _INT32.max).to(torch.int32)


def _as_int64(scale: Tensor) -> Tensor:
    return scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def row_tensors(values: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """W8A8_DYNAMIC and W8A16: `values` int8 [n, k], `scale` float32 [n, 1]; the offsets are zeros."""
    return {"weight": values, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def mixed_tensors(
    values: Tensor, scale: Tensor, bias: Tensor | None, inputs: InputRange, int64_scale: bool
) -> dict[str, Tensor]:
    """W8A8_MIX: both sets over the same values."""
    return {**static_tensors(values, scale, bias, inputs, int64_scale), **row_tensors(values, scale)}


def four_bit_tensors(values: Tensor, scale: Tensor, is_split_by_inputs: bool) -> dict[str, Tensor]:
    """W4A8_DYNAMIC: `values` int8 [n, k] of -8 to 7, two rows to a byte: row 2i in the low four bits.

    scale_bias: 8 · scale · Σ values, [n, 1]; [n, 16] of sixteen parts of the inputs where ranks split these. It makes
    up for kernels that read four bits as 0 to 15.
    """
    low, high = values[0::2].to(torch.int16), values[1::2].to(torch.int16)
    packed = ((low & 0xF) | (high << 4)).to(torch.int8)
    splits = LOAD_SPLITS if is_split_by_inputs and values.shape[1] % LOAD_SPLITS == 0 else 1
    sums = (values * scale).unflatten(1, (splits, -1)).sum(-1)  # in float32 and in this order, as msmodelslim has it
    return {**row_tensors(packed, scale), "scale_bias": 8 * sums}
