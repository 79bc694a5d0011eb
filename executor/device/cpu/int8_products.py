"""Products of int8 values on a CPU: the weight is packed once, sums are exact. Which form is for which CPU says
capability.py.

One multiplication of int8 pairs is exact where the CPU adds them up in 32 bits (VNNI, AMX). Elsewhere the libraries add
two products in 16 bits, with saturation, and activations go in as two rows of small digits.
Legend: T rows, n inputs, m outputs; values `[m, n]`, whole numbers -128 to 127.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

ONE_CALL, DIGITS, EXPANDED = "one call", "digits", "expanded"
"""oneDNN's int8 product; FBGEMM's, over activations in two digits; float32 products over whole numbers."""

EXACT_SUM = 1 << 24  # float32 holds every whole number up to it
EXPAND_ELEMENTS = 1 << 21  # of the fp32 block that a product is made from: 8 MiB


class Product(ABC):
    """Weights as something to multiply whole numbers with. Takes the weights' values and keeps none of them plain."""

    num_out: int
    num_in: int

    @abstractmethod
    def sums(self, x: Tensor) -> Tensor:
        """`x [T, n]`, fp32, whole numbers -128 to 127, times the values: exact sums, rounded once to fp32 `[T, m]`."""

    @abstractmethod
    def float_sums(self, x: Tensor) -> Tensor:
        """`x [T, n]`, any numbers, times the values: fp32 `[T, m]`, more exact than with `x` in bfloat16."""


class OneCall(Product):
    """oneDNN multiplies int8 by int8 into int32, takes the activations' zero point off there, and scales in fp32.

    Only for a CPU where a tried call says that it does not saturate: see capability.exact_in_one_call.
    """

    base = 254  # of the digits of float_sums, each -127 to 127

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        self.packed = torch.ops.onednn.qlinear_prepack(values, None)
        self.zeros, self.ones = torch.zeros(self.num_out, dtype=torch.int32), torch.ones(self.num_out)
        self.run = torch.ops.onednn.qlinear_pointwise.default

    def scaled(
        self,
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        zero_point: int = 0,
        x_scale: float = 1.0,
    ) -> Tensor:
        """`(Σ (x - zero_point) W) * x_scale * scale + bias` in `dtype` (float32 or a 16-bit float), `x [T, n]` int8."""
        return self.run(
            x, x_scale, zero_point, self.packed, scale, self.zeros, bias, 1.0, 0, dtype, "none", [], ""
        )  # fmt: skip

    def sums(self, x: Tensor) -> Tensor:
        return self.scaled(x.to(torch.int8), self.ones)

    def float_sums(self, x: Tensor) -> Tensor:
        """In two digits numbers are as exact as 15 bits of the row's largest, in three as fp32's own 24."""
        rows, scale = digits(x, self.base, 3 if x.dtype is torch.float32 else 2)
        y = self.scaled(rows.flatten(0, 1).to(torch.int8), self.ones)
        return added_up(y.unflatten(0, rows.shape[:2]), self.base).mul_(scale)


class Digits(Product):
    """FBGEMM's panels. A number goes in as rows of digits, so small that no pair of products leaves 16 bits: unsigned,
    up to 127 times 128 twice is 32512.

    High and low digits of int8 numbers are -8 to 8. Sums of those are exact in fp32, and so is `16 * high`: what is
    rounded, once, is the sum of both.
    """

    base, float_base = 16, 126  # the second of float_sums, whose digits are -63 to 63
    zero_point = 64
    few_rows = 64  # up to which memory is what float_sums waits for

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        # With weights of 128 everywhere, sums of so many digits of 8 are still below EXACT_SUM.
        parts = values.split(EXACT_SUM // (128 * self.base // 2), 1)
        self.packed, self.widths = [fbgemm_packed(part) for part in parts], [part.shape[1] for part in parts]
        self.run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def sums(self, x: Tensor) -> Tensor:
        rows = torch.empty(2, *x.shape)
        torch.mul(x, 1 / self.base, out=rows[0]).round_()
        torch.sub(x, rows[0], alpha=self.base, out=rows[1])
        if len(self.packed) == 1:
            return added_up(next(self._products(rows)), self.base)
        total = torch.zeros(len(x), self.num_out, dtype=torch.float64)
        for high, low in self._products(rows):
            total.add_(low).add_(high, alpha=self.base)
        return total.float()

    def float_sums(self, x: Tensor) -> Tensor:
        """Numbers are as exact as 20 bits of the row's largest; with many rows, where arithmetic costs, as 13."""
        rows, scale = digits(x, self.float_base, 3 if len(x) <= self.few_rows else 2)
        y = None
        for some in self._products(rows):
            some = added_up(some, self.float_base)
            y = some if y is None else y.add_(some)
        return y.mul_(scale)

    def _products(self, rows: Tensor) -> Iterator[Tensor]:
        """Of digits `[d, T, n]` by every part of the inputs: fp32 `[d, T, m]`."""
        flat = rows.flatten(0, 1)
        parts = [flat] if len(self.packed) == 1 else [part.contiguous() for part in flat.split(self.widths, 1)]
        for part, packed in zip(parts, self.packed, strict=True):
            yield self.run(part, 1.0, self.zero_point, packed).unflatten(0, rows.shape[:2])


class Expanded(Product):
    """The values as they are, made fp32 block by block when used: for a CPU that no library multiplies int8 on rightly.

    A thousand products of int8 pairs stay below EXACT_SUM, so fp32 adds them up exactly in any order.
    """

    width = EXACT_SUM // (128 * 128)

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        self.values = values

    def sums(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.num_out)
        rows = max(1, EXPAND_ELEMENTS // self.width)
        for start in range(0, self.num_out, rows):
            block = self.values[start : start + rows]
            total = torch.zeros(len(x), len(block), dtype=torch.float64)
            for part, some in zip(x.split(self.width, 1), block.split(self.width, 1), strict=True):
                total.add_(part @ some.float().t())
            y[:, start : start + len(block)] = total
        return y

    def float_sums(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.num_out)
        rows = max(1, EXPAND_ELEMENTS // self.num_in)
        for start in range(0, self.num_out, rows):
            block = self.values[start : start + rows]
            torch.mm(x.float(), block.float().t(), out=y[:, start : start + len(block)])
        return y


PRODUCTS: dict[str, type[Product]] = {ONE_CALL: OneCall, DIGITS: Digits, EXPANDED: Expanded}


def digits(x: Tensor, base: int, count: int) -> tuple[Tensor, Tensor]:
    """`x [T, n]` by row as whole numbers of `count` digits times a scale: fp32 `[count, T, n]` and `[T, 1]`.

    Highest digits first. `base` is even; digits are up to half of it either way.
    """
    largest = (base // 2) * base ** (count - 1)
    scale = x.abs().amax(-1, keepdim=True).float().div_(largest).clamp_min_(SMALLEST)
    rows = torch.empty(count, *x.shape)
    rest = torch.div(x, scale).round_()
    for index in range(count - 1):
        weight = base ** (count - 1 - index)
        torch.div(rest, weight, out=rows[index]).round_()
        torch.sub(rest, rows[index], alpha=weight, out=rest)
    rows[-1] = rest
    return rows, scale


def added_up(y: Tensor, base: int) -> Tensor:
    """Products of digits `[count, T, m]` as products of the numbers; `y` is overwritten."""
    total = y[0]
    for part in y[1:]:
        total = part.add_(total, alpha=base)
    return total


SMALLEST = 2.0**-149  # above zero in fp32: a row of zeros is divided by it and stays zeros


def fbgemm_packed(values: Tensor) -> object:
    """int8 values in FBGEMM's panels, at a scale of one."""
    num_out, engine = len(values), torch.backends.quantized.engine
    scales, zeros = torch.ones(num_out, dtype=torch.float64), torch.zeros(num_out, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to move quantized tensors elsewhere; this release has them
        quantized = torch._make_per_channel_quantized_tensor(values.contiguous(), scales, zeros, 0)
    try:
        torch.backends.quantized.engine = "fbgemm"
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine
