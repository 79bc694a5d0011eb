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
import torch.nn.functional as F
from torch import Tensor

ONE_CALL, DIGITS, EXPANDED = "one call", "digits", "expanded"
"""oneDNN's int8 product; FBGEMM's, over activations in two digits; float32 products over whole numbers."""

SMALL_RESULT = 256
"""A result of at most so many numbers, and one row by exactly so many inputs, oneDNN computes by its reference code: a
hundred times as long as more rows take, about 30 ns a product. Measured with torch 2.13.0 on a CPU with AMX."""
UNSIGNED_ZERO = 128  # what int8 numbers are higher by as unsigned ones
EXACT_SUM = 1 << 24  # float32 holds every whole number up to it
_HALF_OF_WHOLE = 1 << 23  # from here to twice that, fp32 has whole numbers only
EXPAND_ELEMENTS = 1 << 21  # of the fp32 block that a product is made from: 8 MiB


class Product(ABC):
    """Weights as something to multiply whole numbers with. Takes the weights' values and keeps none of them plain.

    digit_base: of numbers in several digits.
    result_bytes: what `sums` holds for a number of its result, at the most.
    """

    num_out: int
    num_in: int
    digit_base: int
    result_bytes = 4

    @abstractmethod
    def sums(self, x: Tensor) -> Tensor:
        """`x [T, n]` int8 times the values: exact sums, rounded once to fp32 `[T, m]`."""

    @abstractmethod
    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        """In how many digits float activations are multiplied, so that products are as exact as those of `dtype`."""

    def largest(self, count: int) -> int:
        """Whole number that so many digits can be, either way."""
        return self.digit_base // 2 * self.digit_base ** (count - 1)

    def digits(self, x: Tensor, count: int) -> Tensor:
        """fp32 `x [T, n]`, which is overwritten, rounded to whole numbers of `count` digits: `[count, T, n]`, highest
        first, in the type that `sums_of_digits` takes or in fp32."""
        return float_digits(rounded_in_place(x, self.largest(count)), self.digit_base, count)

    def totals(self, x: Tensor) -> Tensor:
        """Digits `x [d, T, n]` as numbers, added up: fp32 `[T, 1]`."""
        return added_up(x.sum(-1, keepdim=True).float(), self.digit_base)

    @abstractmethod
    def sums_of_digits(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`x [d, T, n]`, highest digits first, times the values (times `scale [m]`): fp32 `[T, m]`."""


class OneCall(Product):
    """oneDNN multiplies bytes by int8 into int32, takes the activations' zero point off there, and scales in fp32.

    Activations go in unsigned, 128 higher, and so does their zero point: of signed ones oneDNN has a fast product for
    CPUs with AMX only, and elsewhere takes its reference code without a word, a thousand times as long.
    Only for a CPU where a tried call says that it does not saturate (capability.py).
    Digits are the bytes of a number, 128 higher each: they are read out of its bits, and go in as they are.
    """

    digit_base = 256

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        self.packed = torch.ops.onednn.qlinear_prepack(values, None)
        self.zeros, self.ones = (
            torch.zeros(self.num_out, dtype=torch.int32),
            torch.ones(self.num_out, dtype=torch.float32),
        )
        self.run = torch.ops.onednn.qlinear_pointwise.default
        self.run_added = torch.ops.onednn.qlinear_pointwise.binary
        self.least_rows = max(SMALL_RESULT // self.num_out + 1, 2 if self.num_in == SMALL_RESULT else 1)

    def scaled(
        self,
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        zero_point: int = 0,
        x_scale: float = 1.0,
    ) -> Tensor:
        """`(Σ (x - zero_point) W) * x_scale * scale + bias` in `dtype` (float32 or a 16-bit float), `x [T, n]` int8, or
        digits as `digits` gives them."""
        num_rows = len(x)
        if num_rows < self.least_rows:
            x = F.pad(x, (0, 0, 0, self.least_rows - num_rows))
        head = unsigned(x), x_scale, zero_point + UNSIGNED_ZERO, self.packed, scale, self.zeros
        y = self.run(*head, bias, 1.0, 0, dtype, "none", [], "")
        return y[:num_rows]

    def sums(self, x: Tensor) -> Tensor:
        return self.scaled(x, self.ones)

    def two_digits(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`x [2, T, n]` uint8, highest digits first, times the values and `scale`: `[T, m]` in `dtype`.

        The low digits' part is rounded to `dtype` first: a 256th of the result, and so is what that loses.
        """
        y, high = self.scaled(x[1], scale, None, dtype), scale * self.digit_base
        head = unsigned(x[0]), 1.0, UNSIGNED_ZERO, self.packed, high, self.zeros, y, None, 1.0, 0, dtype
        return self.run_added(*head, 1.0, 0, "sum", 1.0, "none", [], "")

    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        """Two are as exact as 14 bits of the row's largest, three as fp32's own 24."""
        return 3 if dtype is torch.float32 else 2

    def largest(self, count: int) -> int:
        return 127 * self.digit_base ** (count - 1)  # by division fp32 comes out above it by one at the most

    def digits(self, x: Tensor, count: int) -> Tensor:
        """uint8. fp32 of 2^23 to 2^24 is a whole number, and its low bits are that number's: adding rounds x to one."""
        higher = sum(UNSIGNED_ZERO * self.digit_base**place for place in range(count))
        # Three digits are 24 bits, and one of those is not among a number's own there.
        whole = x.add_(_HALF_OF_WHOLE + higher) if count < 3 else x.round_().to(torch.int32).add_(higher)
        places = whole.view(torch.uint8).unflatten(-1, (-1, 4)).permute(2, 0, 1)
        return torch.stack([places[place] for place in reversed(range(count))])

    def totals(self, x: Tensor) -> Tensor:
        sums = x.sum(-1, keepdim=True) - UNSIGNED_ZERO * x.shape[-1]
        return added_up(sums.float(), self.digit_base)

    def sums_of_digits(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.scaled(x.flatten(0, 1), self.ones if scale is None else scale)
        return added_up(y.unflatten(0, x.shape[:2]), self.digit_base)


class Digits(Product):
    """FBGEMM's panels. A number goes in as rows of digits, so small that no pair of products leaves 16 bits: unsigned,
    up to 127 times 128 twice is 32512.

    High and low digits of int8 numbers are -8 to 8. Sums of those are exact in fp32, and so is `16 * high`: what is
    rounded, once, is the sum of both.
    """

    base, digit_base, result_bytes = 16, 126, 8
    zero_point = 64
    few_rows = 64  # up to which a product waits for memory

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        # With weights of 128 everywhere, sums of so many digits of 8 are still below EXACT_SUM.
        parts = values.split(EXACT_SUM // (128 * self.base // 2), 1)
        self.packed, self.widths = [fbgemm_packed(part) for part in parts], [part.shape[1] for part in parts]
        self.run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def sums(self, x: Tensor) -> Tensor:
        rows = float_digits(x.float(), self.base, 2)
        if len(self.packed) == 1:
            return added_up(next(self._products(rows)), self.base)
        total = torch.zeros(len(x), self.num_out, dtype=torch.float64)
        for high, low in self._products(rows):
            total.add_(low).add_(high, alpha=self.base)
        return total.float()

    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        """Three are as exact as 20 bits of the row's largest; two, where arithmetic costs, as 13."""
        return 3 if num_rows <= self.few_rows else 2

    def sums_of_digits(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = None
        for some in self._products(x.float()):
            some = added_up(some, self.digit_base)
            y = some if y is None else y.add_(some)
        return y if scale is None else y.mul_(scale)

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

    digit_base = 254
    width = EXACT_SUM // (128 * 128)

    def __init__(self, values: Tensor) -> None:
        self.num_out, self.num_in = values.shape
        self.values = values

    def sums(self, x: Tensor) -> Tensor:
        y = torch.empty(len(x), self.num_out, dtype=torch.float32)
        rows = max(1, EXPAND_ELEMENTS // self.width)
        for start in range(0, self.num_out, rows):
            block = self.values[start : start + rows]
            total = torch.zeros(len(x), len(block), dtype=torch.float64)
            for part, some in zip(x.split(self.width, 1), block.split(self.width, 1), strict=True):
                total.add_(part.float() @ some.float().t())
            y[:, start : start + len(block)] = total
        return y

    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        return 3

    def sums_of_digits(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The digits as one number of 24 bits each, which fp32 holds."""
        whole = added_up(x.float(), self.digit_base)
        y = torch.empty(len(whole), self.num_out, dtype=torch.float32)
        rows = max(1, EXPAND_ELEMENTS // self.num_in)
        for start in range(0, self.num_out, rows):
            block = self.values[start : start + rows]
            torch.mm(whole, block.float().t(), out=y[:, start : start + len(block)])
        return y if scale is None else y.mul_(scale)


PRODUCTS: dict[str, type[Product]] = {ONE_CALL: OneCall, DIGITS: Digits, EXPANDED: Expanded}


def unsigned(x: Tensor) -> Tensor:
    """int8 `x` plus 128, as uint8; what is unsigned already stays."""
    return x if x.dtype is torch.uint8 else x.view(torch.uint8).bitwise_xor(UNSIGNED_ZERO)


def float_digits(whole: Tensor, base: int, count: int) -> Tensor:
    """Whole numbers `[T, n]`, fp32, as digits `[count, T, n]`, highest first; `base` is even.

    Digits are up to half of it either way where numbers are up to `base / 2 * base ** (count - 1)`.
    """
    rows = torch.empty(count, *whole.shape, dtype=torch.float32)
    for index in range(count - 1):
        weight = base ** (count - 1 - index)
        rounded_in_place(torch.div(whole, weight, out=rows[index]), base * base)
        rest = rows[-1] if index == count - 2 else torch.empty_like(whole)
        whole = torch.sub(whole, rows[index], alpha=weight, out=rest)
    return rows


def rounded_in_place(x: Tensor, largest: int) -> Tensor:
    """fp32 `x`, of magnitudes up to about `largest`, to the nearest whole numbers, halves to even.

    What fp32 loses of a sum of 2^23 and more is what lies behind the point. torch's round wakes other threads from 2048
    numbers on, where these sums do from 32768 on: at one row of 11008 it takes ten times as long.
    """
    if largest >= _HALF_OF_WHOLE >> 1:
        return x.round_()
    return x.add_(1.5 * _HALF_OF_WHOLE).sub_(1.5 * _HALF_OF_WHOLE)


def added_up(y: Tensor, base: int) -> Tensor:
    """What belongs to digits `[count, T, m]` as what belongs to the numbers `[T, m]`; `y` is overwritten."""
    total = y[0]
    for part in y[1:]:
        total = part.add_(total, alpha=base)
    return total


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
