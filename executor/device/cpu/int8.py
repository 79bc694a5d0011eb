"""Quantized linears on a CPU, by the formulas of executor/device/weights.py. Sums of products are exact.

Legend: T rows, n inputs, m outputs; values `[m, n]`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from executor.device.weights import (
    DynamicInt4,
    DynamicInt8,
    MixedInt8,
    QuantizedWeight,
    StaticInt8,
    WeightInt8,
    unpack_int4,
)
from executor.errors import UserError


def prepare(weight: QuantizedWeight, bias: Tensor | None, many_rows: bool) -> Callable[[Tensor], Tensor]:
    """The weight as a function of `x [T, n]`; the result has the type of `x`."""
    if isinstance(weight, StaticInt8):
        return Static(weight)
    if isinstance(weight, DynamicInt8):
        return Dynamic(weight, bias)
    if isinstance(weight, DynamicInt4):
        return Dynamic(DynamicInt8(unpack_int4(weight.packed), weight.scale), bias)
    if isinstance(weight, WeightInt8):
        return WeightOnly(weight, bias)
    if isinstance(weight, MixedInt8):
        return Dynamic(weight.dynamic, bias) if many_rows else Static(weight.static)
    raise UserError(f"model_config.device: the CPU has no product by {type(weight).__name__} weights")


def product(x: Tensor, values: Tensor) -> Tensor:
    """`x [T, n]` by `values [m, n]`, both whole numbers of int8: exact sums, int32 `[T, m]`."""
    return (x.double() @ values.double().t()).to(torch.int32)


def quantized(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`clamp(round(x / scale + offset), -128, 127)` as int8."""
    return (x.float() / scale + offset).round_().clamp_(-128, 127).to(torch.int8)


def quantized_by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(int8 [T, n], scale float32 [T, 1])`; a row of zeros stays zeros."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).div_(127)
    return (wide / scale.masked_fill(scale == 0, 1)).round_().to(torch.int8), scale


class Static:
    def __init__(self, weight: StaticInt8) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        w = self.weight
        sums = product(quantized(x, w.input_scale, w.input_offset), w.values) + w.quant_bias
        return (sums.float() * w.deq_scale).to(x.dtype)


class Dynamic:
    def __init__(self, weight: DynamicInt8, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        rows, scale = quantized_by_row(x)
        y = product(rows, self.weight.values).float() * scale * self.weight.scale
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class WeightOnly:
    def __init__(self, weight: WeightInt8, bias: Tensor | None) -> None:
        values = weight.values.float().unflatten(1, (weight.scale.shape[1], -1))
        if weight.offset is not None:
            values = values - weight.offset.unsqueeze(-1)
        self.weight, self.bias = (values * weight.scale.unsqueeze(-1)).flatten(1), bias

    def __call__(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return torch.nn.functional.linear(x.float(), self.weight, bias).to(x.dtype)
