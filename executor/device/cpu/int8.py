"""Quantized linears on a CPU, by the formulas of executor/device/weights.py. Sums of products are exact.

Each is a function of `x [T, n]`, of any float type, and gives that type; `compute` gives another. What multiplies the
whole numbers is a Product (int8_products.py); nothing here touches weights after they are packed.
Legend: T rows, n inputs, m outputs; values `[m, n]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from executor.device.cpu.int8_products import (
    EXACT_SUM,
    PRODUCTS,
    OneCall,
    Product,
    rounded_in_place,
)
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

SMALLEST = 2.0**-149  # above zero in fp32: a row of zeros is divided by it and stays zeros
_RESULT_BYTES = 24 << 20  # of a tile's results: above 32 MiB the C library gives memory back after every call
_ADDED_ROWS = 128  # from which arithmetic, not reading the weight, is what takes time
_EXPONENT = 0x7F800000  # in the bits of a number of fp32; alone, the power of two that is at most the number
_SMALLEST_BFLOAT16 = 2.0**-133
_NEAR_ELEMENTS = 1 << 20  # of what is rounded or scaled in several passes: 4 MiB in fp32 stay near two cores
_WOKEN_ELEMENTS = 1 << 18  # of all that is: for fewer it takes longer to wake other threads, once for every pass
_ONE_THREAD_ELEMENTS = (1 << 15) - 1  # of a tile that torch leaves to one thread


class Rows(NamedTuple):
    """Activations as whole numbers: `numbers [d, T, n]`, d digits of each, int8 or as Product.digits has them, and what
    they stand for, fp32 `[T, 1]`; no scale where one that the linear has holds for all rows.
    """

    numbers: Tensor
    scale: Tensor | None

    def at(self, index: Tensor) -> "Rows":
        """Rows `index [t]`, int64."""
        return Rows(self.numbers[:, index], None if self.scale is None else self.scale[index])

    def part(self, start: int, end: int) -> "Rows":
        return Rows(self.numbers[:, start:end], None if self.scale is None else self.scale[start:end])


class Int8Linear(ABC):
    """Rounding and multiplying are two steps: both in tiles of rows, which for the one is small and for the other not
    (an int8 product of 256 rows and less takes twice as long by row as one of 512).
    """

    product: Product

    @property
    def num_in(self) -> int:
        return self.product.num_in

    def __call__(self, x: Tensor) -> Tensor:
        return self.compute(x, x.dtype)

    def compute(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of `x [T, n]` in `dtype`."""
        return self.multiply(self.rounded(x), dtype)

    def rounded(self, x: Tensor) -> Rows:
        return self.collected(x.split(pass_rows(len(x), self.num_in)), len(x), x.dtype)

    def collected(self, tiles: Iterable[Tensor], num_rows: int, dtype: torch.dtype) -> Rows:
        """Of `num_rows` rows, of which `tiles` are some after the other, each made when it is wanted."""
        num_digits, numbers, scales, start = self.num_digits(num_rows, dtype), None, [], 0
        for tile in tiles:
            some = self.round(tile, num_digits)
            held = torch.int8 if some.numbers.is_floating_point() else some.numbers.dtype
            if len(tile) == num_rows:
                return Rows(some.numbers.to(held), some.scale)
            if numbers is None:
                numbers = torch.empty(num_digits, num_rows, self.num_in, dtype=held)
            numbers[:, start : start + len(tile)] = some.numbers
            scales.append(some.scale)
            start += len(tile)
        return Rows(numbers, None if scales[0] is None else torch.cat(scales))

    def multiply(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        out, start = torch.empty(rows.numbers.shape[1], self.product.num_out, dtype=dtype), 0
        for some in self.results(rows, dtype):
            if len(some) == len(out):
                return some
            out[start : start + len(some)] = some
            start += len(some)
        return out

    def results(self, rows: Rows, dtype: torch.dtype) -> Iterator[Tensor]:
        """The product of some rows after that of others, each made when it is wanted."""
        for tile in self.tiles(rows, self.product.result_bytes):
            yield self.multiply_tile(tile, dtype)

    def tiles(self, rows: Rows, result_bytes: int) -> Iterator[Rows]:
        """Rows that are multiplied at a time, about equally many. A number of the result takes `result_bytes`."""
        num_rows = rows.numbers.shape[1]
        most = max(64, _RESULT_BYTES // (result_bytes * self.product.num_out))
        size = -(-num_rows // max(1, -(-num_rows // most)))
        for start in range(0, num_rows, max(1, size)):
            yield rows.part(start, min(start + size, num_rows))

    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        """How many digits numbers of `dtype` are made of where there are so many rows of them."""
        return 1

    @abstractmethod
    def round(self, x: Tensor, num_digits: int) -> Rows:
        """A tile of `x`, one row or more; its whole numbers still in fp32."""

    @abstractmethod
    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Of one row or more."""


class Static(Int8Linear):
    """`(sums + quant_bias) * deq_scale`, where the library has no place for the whole numbers of quant_bias.

    They are added in fp32 where that is exact for every input there can be, else in float64: nothing wraps, also where
    quant_bias stands at the end of int32.
    """

    def __init__(self, weight: StaticInt8, product: Product) -> None:
        self.product, self.scale = product, weight.deq_scale
        self.input_scale, self.input_offset = weight.input_scale, weight.input_offset
        sums = largest_sums(weight.values)
        # A row of zero weights may stand at the end of int32: nothing is added to it, so fp32 rounds it once as well.
        is_exact = (sums == 0) | (sums + weight.quant_bias.double().abs() <= EXACT_SUM)
        self.added = weight.quant_bias.to(torch.float32 if bool(is_exact.all()) else torch.float64)

    def round(self, x: Tensor, num_digits: int) -> Rows:
        whole = torch.div(x, self.input_scale).add_(self.input_offset).clamp_(-128, 127)
        return Rows(rounded_in_place(whole, 128).unsqueeze(0), None)

    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        sums = self.product.sums(rows.numbers[0])
        if self.added.dtype is torch.float64:
            return (sums + self.added).float().mul_(self.scale).to(dtype)
        return sums.add_(self.added).mul_(self.scale).to(dtype)


class StaticOneCall(Static):
    """The same in one call: int32 sums without the offset's part, in fp32 times deq_scale, plus what is left of
    quant_bias times deq_scale. The large numbers that the offset makes never meet fp32, so nothing cancels there.
    """

    product: OneCall

    def __init__(self, weight: StaticInt8, product: OneCall) -> None:
        self.product, self.scale = product, weight.deq_scale.contiguous()
        self.input_scale, self.input_offset = weight.input_scale, weight.input_offset
        self.zero_point = int(weight.input_offset)
        row_sums = product.sums(torch.ones(1, product.num_in, dtype=torch.int8))[0]
        left = weight.quant_bias.double() + self.zero_point * row_sums.double()
        self.left, self.bias = left.float(), (left * weight.deq_scale.double()).float()

    def results(self, rows: Rows, dtype: torch.dtype) -> Iterator[Tensor]:
        for tile in self.tiles(rows, dtype.itemsize):
            yield self.multiply_tile(tile, dtype)

    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        whole = rows.numbers[0]
        if dtype is torch.float32:  # added as whole numbers: no digit is lost that the formula has
            ones = self.product.ones
            return self.product.scaled(whole, ones, self.left, dtype, self.zero_point).mul_(self.scale)
        return self.product.scaled(whole, self.scale, self.bias, dtype, self.zero_point)


class Dynamic(Int8Linear):
    def __init__(self, scale: Tensor, bias: Tensor | None, product: Product) -> None:
        self.product = product
        self.scale, self.bias = scale.contiguous(), None if bias is None else bias.float()

    def round(self, x: Tensor, num_digits: int) -> Rows:
        scale = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(SMALLEST)
        return Rows(rounded_in_place(torch.div(x, scale), 127).unsqueeze(0), scale)

    def results(self, rows: Rows, dtype: torch.dtype) -> Iterator[Tensor]:
        near = pass_rows(rows.numbers.shape[1], self.product.num_out)
        for tile in self.tiles(rows, self.product.result_bytes):
            if len(tile.scale) == 1 and isinstance(self.product, OneCall):
                yield self.multiply_tile(tile, dtype)
                continue
            for y, scale in zip(self.products(tile).split(near), tile.scale.split(near), strict=True):
                yield self.scaled(y, scale, dtype)

    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        if len(rows.scale) == 1 and isinstance(self.product, OneCall):
            return self.product.scaled(rows.numbers[0], self.scale, self.bias, dtype, x_scale=rows.scale.item())
        return self.scaled(self.products(rows), rows.scale, dtype)

    def products(self, rows: Rows) -> Tensor:
        """Scaled by output, not yet by row: fp32."""
        if isinstance(self.product, OneCall):
            return self.product.scaled(rows.numbers[0], self.scale)
        return self.product.sums(rows.numbers[0]).mul_(self.scale)

    def scaled(self, y: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`y` is overwritten."""
        y.mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(dtype)


class Mixed(Int8Linear):
    """Static for steps of at most `decode_rows` rows, dynamic for more, over one packed weight."""

    def __init__(self, static: Static, dynamic: Dynamic, decode_rows: int) -> None:
        self.product, self.static, self.dynamic, self.decode_rows = static.product, static, dynamic, decode_rows

    def collected(self, tiles: Iterable[Tensor], num_rows: int, dtype: torch.dtype) -> Rows:
        return (self.static if num_rows <= self.decode_rows else self.dynamic).collected(tiles, num_rows, dtype)

    def round(self, x: Tensor, num_digits: int) -> Rows:
        raise AssertionError("collected chooses")

    def results(self, rows: Rows, dtype: torch.dtype) -> Iterator[Tensor]:
        return (self.static if rows.scale is None else self.dynamic).results(rows, dtype)

    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        raise AssertionError("results chooses")


class WeightOnly(Int8Linear):
    """`x` by `(values - offset) * scale`, `x` as numbers of several digits. Products of groups of inputs are scaled
    apart and added up.

    Few rows read the weight once, for both digits. Many rows of bfloat16 read it twice, and the digits' sums are added
    and rounded in the product: the scale of a row is a power of two, by which bfloat16 is multiplied exactly.
    """

    def __init__(self, weight: WeightInt8, bias: Tensor | None, products: list[Product]) -> None:
        self.product, self.products = products[0], products
        self.widths = [product.num_in for product in products]
        self.scales = [scale.contiguous() for scale in weight.scale.t()]
        self.shifts = None
        if weight.offset is not None and bool(weight.offset.any()):
            self.shifts = [(offset * scale).neg() for offset, scale in zip(weight.offset.t(), self.scales, strict=True)]
        self.bias = None if bias is None else bias.float()
        adds_nothing = self.shifts is None and bias is None
        self.is_plain = isinstance(self.product, OneCall) and len(products) == 1 and adds_nothing

    @property
    def num_in(self) -> int:
        return sum(self.widths)

    def results(self, rows: Rows, dtype: torch.dtype) -> Iterator[Tensor]:
        num_rows = rows.numbers.shape[1]
        if self.is_plain and len(rows.numbers) == 2 and dtype is torch.bfloat16 and num_rows >= _ADDED_ROWS:
            near = pass_rows(num_rows, self.product.num_out)
            for tile in self.tiles(rows, dtype.itemsize):
                y = self.product.two_digits(tile.numbers, self.scales[0], dtype)
                for some, scale in zip(y.split(near), tile.scale.to(dtype).split(near), strict=True):
                    yield some.mul_(scale)
            return
        for tile in self.tiles(rows, 4 * len(rows.numbers)):
            yield self.multiply_tile(tile, dtype)

    def num_digits(self, num_rows: int, dtype: torch.dtype) -> int:
        return self.product.num_digits(num_rows, dtype)

    def round(self, x: Tensor, num_digits: int) -> Rows:
        scale = x.abs().amax(-1, keepdim=True).float().div_(self.product.largest(num_digits))
        if self.is_plain and x.dtype is torch.bfloat16:
            scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32).mul_(2).clamp_min_(_SMALLEST_BFLOAT16)
        else:
            scale.clamp_min_(SMALLEST)
        return Rows(self.product.digits(torch.div(x, scale), num_digits), scale)

    def multiply_tile(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        y = None
        for index, numbers in enumerate(rows.numbers.split(self.widths, 2)):
            some = self.products[index].sums_of_digits(numbers, self.scales[index])
            if self.shifts is not None:
                some.addcmul_(self.products[index].totals(numbers), self.shifts[index])
            y = some if y is None else y.add_(some)
        y.mul_(rows.scale)
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


def _static(weight: StaticInt8, product: Product) -> Static:
    return StaticOneCall(weight, product) if isinstance(product, OneCall) else Static(weight, product)


def pass_rows(num_rows: int, width: int) -> int:
    """How many of `num_rows` rows of `width` numbers go through all passes over them at a time."""
    elements = _ONE_THREAD_ELEMENTS if num_rows * width <= _WOKEN_ELEMENTS else _NEAR_ELEMENTS
    return max(1, elements // width)


def largest_sums(values: Tensor) -> Tensor:
    """The largest magnitude of a sum of products that int8 activations can give, by row: float64 `[m]`."""
    rows = max(1, (1 << 24) // values.shape[1])
    # As unsigned, what abs makes of -128 is right.
    parts = [part.abs().view(torch.uint8).sum(1) for part in values.split(rows)]
    return torch.cat(parts).double() * 128
