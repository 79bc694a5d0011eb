"""Linears on a CPU: one class for each form in which a weight is kept. Each is a function of `x [T, n]`.

Every class gives its result in the type of `x`. Which form is for which CPU says capability.py.
Legend: T rows, n inputs, m outputs; weights `[m, n]`.
"""

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_ELEMENTS = 1 << 26  # of the fp32 copy that packing makes: 256 MiB
EXPAND_ELEMENTS = 1 << 24  # of the fp32 block that a product is made from: 64 MiB; by 8 MiB it takes 1.3 times as long


class Plain:
    """The weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Reordered:
    """oneDNN's blocked layout: batch-1 steps read it about 1.5 times as fast as a plain weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, None), bias
        self.run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias, "none", [], "")


class Shared:
    """A weight that stays where others read it, for few rows: weights times `xᵀ` reads it at the speed of memory.

    Source: measured with AMX, 151936 x 2048 in bfloat16: as fast as oneDNN's own layout at 2 to 8 rows, where
    F.linear takes 1.3 times as long.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return torch.mv(self.weight, x[0]).unsqueeze(0)
        return torch.mm(self.weight, x.t()).t()


class PackedFp16:
    """16-bit weights in FBGEMM's panels, products and sums in fp32: what is fast for few rows without AVX-512.

    bfloat16 has a wider range than fp16. Where that matters the weight is packed times a power of two, which is exact,
    and products are divided by it: `scale`. No value is then off by more than 2^-39 of the largest weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        num_out, num_in = weight.shape
        self.scale, self.inverse = (
            scale,
            torch.tensor(1 / scale, dtype=torch.float32),
        )  # a tensor: a number is made one at every call
        self.scales_input = num_in < num_out
        bias = None if bias is None else bias.float() * (1.0 if self.scales_input else scale)
        rows = max(1, PACK_ELEMENTS // num_in)
        pack = torch.ops.quantized.linear_prepack_fp16
        self.parts = [
            pack(weight[start : start + rows].float().mul_(scale), None if bias is None else bias[start : start + rows])
            for start in range(0, num_out, rows)
        ]
        self.num_out = num_out
        self.run = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if not len(x):
            return x.new_empty(0, self.num_out)
        x = x.float()
        if self.scale != 1 and self.scales_input:
            x = x * self.inverse
        y = self.run(x, self.parts[0]) if len(self.parts) == 1 else torch.cat([self.run(x, p) for p in self.parts], -1)
        if self.scale != 1 and not self.scales_input:
            y.mul_(self.inverse)
        return y.to(dtype)


def exact_scale(weight: Tensor) -> float | None:
    """The power of two that `weight` is multiplied with to lie in fp16's range; None where it is not finite.

    1.0 where fp16 holds every value as it is.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not math.isfinite(largest):
        return None
    if weight.dtype is torch.float16 or all(
        torch.equal(part.half().to(part.dtype), part) for part in weight.split(max(1, PACK_ELEMENTS // weight.shape[1]))
    ):
        return 1.0
    # The largest becomes 16384 to 32768; the bound keeps the scale itself, and inputs divided by it, within fp32.
    return 2.0 ** min(15 - math.frexp(largest)[1], 60)


class Scratch(threading.local):
    """One fp32 buffer that all `Expanded` linears of a device use in turn. Every thread has one of its own, as engines
    may step beside each other."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def take(self, num_rows: int, num_columns: int) -> Tensor:
        if self.buffer.numel() < num_rows * num_columns:
            self.buffer = torch.empty(num_rows * num_columns, dtype=torch.float32)
        return self.buffer[: num_rows * num_columns].view(num_rows, num_columns)


class Expanded:
    """A plain 16-bit weight, made fp32 block by block when it is used: fp32's speed for many rows, in half its memory.

    For linears that never see few rows, such as those of a vision encoder; and for weights that are not finite.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self.weight, self.scratch = weight, scratch
        self.bias = None if bias is None else bias.float()
        self.rows = min(len(weight), max(1, EXPAND_ELEMENTS // weight.shape[1]))

    def __call__(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        y = torch.empty(len(x), len(self.weight), dtype=torch.float32)
        for start in range(0, len(self.weight), self.rows):
            part = self.weight[start : start + self.rows]
            block = self.scratch.take(*part.shape).copy_(part).t()
            into = y[:, start : start + len(part)]
            if self.bias is None:
                torch.mm(x, block, out=into)
            else:
                torch.addmm(self.bias[start : start + len(part)], x, block, out=into)
        return y.to(dtype)
