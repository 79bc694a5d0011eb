"""Quantized linears on a CPU, by the formulas of executor/device/weights.py. Sums of products are exact.

Each is a function of `x [T, n]`, of any float type, and gives that type; `compute` gives another. What multiplies the
whole numbers is a Product (int8_products.py); nothing here touches weights after they are packed.
Legend: T rows, n inputs, m outputs; values `[m, n]`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from executor.device.cpu.int8_products import EXACT_SUM, PRODUCTS, SMALLEST, OneCall, Product
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

_TILE_BYTES = 8 << 20  # of a tile's fp32 results
_LEAST_TILE_ROWS = 64


class Int8Linear(ABC):
    num_out: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.compute(x, x.dtype)

    def compute(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of `x [T, n]` in `dtype`. Many rows go in tiles, whose fp32 results stay near the CPU."""
        tile = self.tile_rows
        if 0 < len(x) <= tile:
            return self.rows(x, dtype)
        out = x.new_empty(len(x), self.num_out, dtype=dtype)
        for start in range(0, len(x), tile):
            out[start : start + tile] = self.rows(x[start : start + tile], dtype)
        return out

    @property
    def tile_rows(self) -> int:
        return max(_LEAST_TILE_ROWS, _TILE_BYTES // (4 * self.num_out))

    @abstractmethod
    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`compute` of a tile of one row or more."""


class Static(Int8Linear):
    """`(sums + quant_bias) * deq_scale`, where the library has no place for the whole numbers of quant_bias.

    They are added in fp32 where that is exact for every input there can be, else in float64: nothing wraps, also where
    quant_bias stands at the end of int32.
    """

    def __init__(self, weight: StaticInt8, product: Product) -> None:
        self.num_out, self.product = product.num_out, product
        self.input_scale, self.input_offset = weight.input_scale, weight.input_offset
        self.scale = weight.deq_scale
        sums = largest_sums(weight.values)
        # A row of zero weights may stand at the end of int32: nothing is added to it, so fp32 rounds it once as well.
        is_exact = (sums == 0) | (sums + weight.quant_bias.double().abs() <= EXACT_SUM)
        self.added = weight.quant_bias.to(torch.float32 if bool(is_exact.all()) else torch.float64)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        sums = self.product.sums(quantized(x, self.input_scale, self.input_offset))
        if self.added.dtype is torch.float64:
            return (sums + self.added).float().mul_(self.scale).to(dtype)
        return sums.add_(self.added).mul_(self.scale).to(dtype)


class StaticOneCall(Int8Linear):
    """The same in one call: int32 sums without the offset's part, in fp32 times deq_scale, plus what is left of
    quant_bias times deq_scale. The large numbers that the offset makes never meet fp32, so nothing cancels there.
    """

    def __init__(self, weight: StaticInt8, product: OneCall) -> None:
        self.num_out, self.product = product.num_out, product
        self.input_scale, self.input_offset = weight.input_scale, weight.input_offset
        self.scale, self.zero_point = weight.deq_scale.contiguous(), int(weight.input_offset)
        row_sums = product.sums(torch.ones(1, product.num_in))[0]
        left = weight.quant_bias.double() + self.zero_point * row_sums.double()
        self.left, self.bias = left.float(), (left * weight.deq_scale.double()).float()

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        whole = quantized(x, self.input_scale, self.input_offset).to(torch.int8)
        if dtype is torch.float32:  # added as whole numbers: no digit is lost that the formula has
            ones = self.product.ones
            return self.product.scaled(whole, ones, self.left, dtype, self.zero_point).mul_(self.scale)
        return self.product.scaled(whole, self.scale, self.bias, dtype, self.zero_point)


class Dynamic(Int8Linear):
    def __init__(self, scale: Tensor, bias: Tensor | None, product: Product) -> None:
        self.num_out, self.product = product.num_out, product
        self.scale, self.bias = scale.contiguous(), None if bias is None else bias.float()

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        whole, x_scale = quantized_by_row(x)
        if isinstance(self.product, OneCall):
            whole = whole.to(torch.int8)
            if len(x) == 1:
                return self.product.scaled(whole, self.scale, self.bias, dtype, x_scale=x_scale.item())
            y = self.product.scaled(whole, self.scale).mul_(x_scale)
        else:
            y = self.product.sums(whole).mul_(x_scale).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)


class Mixed(Int8Linear):
    """Static for steps of at most `decode_rows` rows, dynamic for more, over one packed weight."""

    def __init__(self, static: Int8Linear, dynamic: Int8Linear, decode_rows: int) -> None:
        self.num_out, self.static, self.dynamic, self.decode_rows = static.num_out, static, dynamic, decode_rows

    def compute(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.static if len(x) <= self.decode_rows else self.dynamic).compute(x, dtype)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        raise AssertionError("compute chooses")


class WeightOnly(Int8Linear):
    """`x` by `(values - offset) * scale`; products of groups of inputs are scaled apart and added up."""

    def __init__(self, weight: WeightInt8, bias: Tensor | None, products: list[Product]) -> None:
        self.num_out, self.products = products[0].num_out, products
        self.widths = [product.num_in for product in products]
        self.scales = [scale.contiguous() for scale in weight.scale.t()]
        self.shifts = None
        if weight.offset is not None and bool(weight.offset.any()):
            self.shifts = [(offset * scale).neg() for offset, scale in zip(weight.offset.t(), self.scales, strict=True)]
        self.bias = None if bias is None else bias.float()

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = None
        for index, part in enumerate(x.split(self.widths, 1)):
            some = self.products[index].float_sums(part).mul_(self.scales[index])
            if self.shifts is not None:
                some.addcmul_(part.sum(-1, keepdim=True, dtype=torch.float32), self.shifts[index])
            y = some if y is None else y.add_(some)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)


class Summed:
    """A linear whose results are added up over `group`: in fp32, as a rank's part has the offset's part still in it."""

    def __init__(self, linear: Int8Linear, group: Any) -> None:
        self.linear, self.group = linear, group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.linear.compute(x, torch.float32)).to(x.dtype)


def prepare(
    weight: QuantizedWeight, bias: Tensor | None, form: str, decode_rows: int, many_rows: bool
) -> Int8Linear:  # fmt: skip
    """The weight as a function of `x [T, n]`. `form`: which Product; `decode_rows`: the most rows of a decode step;
    `many_rows`: no call is one of those.
    """
    make = PRODUCTS[form]
    if isinstance(weight, StaticInt8):
        return _static(weight, make(weight.values))
    if isinstance(weight, DynamicInt8):
        return Dynamic(weight.scale, bias, make(weight.values))
    if isinstance(weight, DynamicInt4):
        return Dynamic(weight.scale, bias, make(unpack_int4(weight.packed)))
    if isinstance(weight, MixedInt8):
        product = make(weight.static.values)
        dynamic = Dynamic(weight.dynamic.scale, bias, product)
        return dynamic if many_rows else Mixed(_static(weight.static, product), dynamic, decode_rows)
    if isinstance(weight, WeightInt8):
        groups = weight.values.chunk(weight.scale.shape[1], 1)
        return WeightOnly(weight, bias, [make(group.contiguous()) for group in groups])
    raise UserError(
        f"model_config.device: the CPU has no product by {type(weight).__name__} weights; decompress them, or run the "
        "checkpoint on the NPU that they were compressed for"
    )


def _static(weight: StaticInt8, product: Product) -> Int8Linear:
    return StaticOneCall(weight, product) if isinstance(product, OneCall) else Static(weight, product)


def largest_sums(values: Tensor) -> Tensor:
    """The largest magnitude of a sum of products that int8 activations can give, by row: float64 `[m]`."""
    rows = max(1, (1 << 24) // values.shape[1])
    # As unsigned, what abs makes of -128 is right.
    parts = [part.abs().view(torch.uint8).sum(1) for part in values.split(rows)]
    return torch.cat(parts).double() * 128


def quantized(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`clamp(round(x / scale + offset), -128, 127)`, fp32; `scale` and `offset` fp32 `[1]`."""
    return torch.div(x, scale).add_(offset).round_().clamp_(-128, 127)


def quantized_by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(round(x / scale) fp32 [T, n], scale fp32 [T, 1])`; a row of zeros stays zeros."""
    scale = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(SMALLEST)
    return torch.div(x, scale).round_(), scale
