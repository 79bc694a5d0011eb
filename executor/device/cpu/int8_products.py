"""Products of int8 values on a CPU: the weight is packed once, sums are exact. Which form is for which CPU says
capability.py.

One multiplication of int8 pairs is exact where the CPU adds them up in 32 bits (VNNI, AMX). Elsewhere the libraries add
two products in 16 bits, with saturation, and activations go in as two rows of small digits.
Legend: T rows, n inputs, m outputs; values `[m, n]`, whole numbers -128 to 127.
"""

import warnings
from abc import ABC, abstractmethod

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
        digits, scale = two_digits(x, self.base)
        high, low = self.scaled(digits.flatten(0, 1).to(torch.int8), self.ones).chunk(2)
        return low.add_(high, alpha=self.base).mul_(scale)


class Digits(Product):
    """FBGEMM's panels. A number goes in as two rows, `x = base * high + low`, both so small that no pair of products
    leaves 16 bits: unsigned, up to 127 times 128 twice is 32512.

    High and low digits of int8 numbers are -8 to 8. Sums of those are exact in fp32, and so is `16 * high`: what is
    rounded, once, is the sum of both.
    """

    base, float_base = 16, 126  # the second of float_sums, whose digits are -63 to 63
    zero_point = 64

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        # With weights of 128 everywhere, sums of so many digits of 8 are still below EXACT_SUM.
        width = EXACT_SUM // (128 * self.base // 2)
        self.packed = [fbgemm_packed(part) for part in values.split(width, 1)]
        self.widths = [part.shape[1] for part in values.split(width, 1)]
        self.run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def sums(self, x: Tensor) -> Tensor:
        digits = torch.empty(2, *x.shape)
        torch.mul(x, 1 / self.base, out=digits[0]).round_()
        torch.sub(x, digits[0], alpha=self.base, out=digits[1])
        rows = digits.flatten(0, 1)
        if len(self.packed) == 1:
            high, low = self.run(rows, 1.0, self.zero_point, self.packed[0]).chunk(2)
            return low.add_(high, alpha=self.base)
        total = torch.zeros(len(x), self.num_out, dtype=torch.float64)
        for part, packed in zip(rows.split(self.widths, 1), self.packed, strict=True):
            high, low = self.run(part.contiguous(), 1.0, self.zero_point, packed).chunk(2)
            total.add_(low).add_(high, alpha=self.base)
        return total.float()

    def float_sums(self, x: Tensor) -> Tensor:
        digits, scale = two_digits(x, self.float_base)
        rows, y = digits.flatten(0, 1), None
        for part, packed in zip(rows.split(self.widths, 1), self.packed, strict=True):
            high, low = self.run(part.contiguous(), 1.0, self.zero_point, packed).chunk(2)
            low.add_(high, alpha=self.float_base)
            y = low if y is None else y.add_(low)
        return y.mul_(scale)


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


def two_digits(x: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """`x [T, n]` as whole numbers `base * d[0] + d[1]` times a scale: d fp32 `[2, T, n]`, the scale fp32 `[T, 1]`.

    `base` is even; digits are up to half of it either way.
    """
    largest = (base // 2) * (base + 1) - 1  # one more would be halfway to a high digit above half of the base
    scale = x.abs().amax(-1, keepdim=True).float().div_(largest).clamp_min_(SMALLEST)
    whole = torch.div(x, scale).round_()
    digits = torch.empty(2, *x.shape)
    torch.mul(whole, 1 / base, out=digits[0]).round_()
    torch.sub(whole, digits[0], alpha=base, out=digits[1])
    return digits, scale


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
