"""What the inputs of linears are like: looked at while the calibration set runs through a layer.

Legend: T tokens, k inputs of a linear.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from executor.calibrate.tensors import InputRange

_DROPPED_BITS = 14
"""Of a float32's 23 bits behind the point: what is left of it, with its exponent, is the number of its bin."""
_NO_SIGN = 0x7FFFFFFF
MAGNITUDES = 1 << 31 - _DROPPED_BITS
PIECE = 1 << 20
"""Values that are counted at a time: their places take some 20 MB."""


class ChannelRange:
    """Least and largest value of each input, float32 `[k]`."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        low, high = (torch.stack(x.aminmax(dim=0)).float().cpu()).unbind(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def largest(self) -> Tensor:
        """`max |x|` of each input, `[k]`."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def over(self, factors: Tensor | None) -> InputRange:
        """Of all inputs together, each divided by its factor `[k]`."""
        low, high = self.low, self.high
        if factors is not None:
            low, high = low / factors, high / factors
        return InputRange(float(low.min()), float(high.max()))


class Histogram:
    """How often values occur, by sign and magnitude: 512 bins between a power of two and the next, whatever is beside.

    A bound that is read from it lies at most 1/512 of itself outside the value that it stands for. Counts are whole
    numbers of 64 bits.
    """

    def __init__(self, bounds: InputRange) -> None:
        """`bounds`: least and largest of the values, which nothing lies beyond."""
        self.low, self.high = min(bounds.low, 0.0), max(bounds.high, 0.0)
        self.counts = torch.zeros(2, MAGNITUDES, dtype=torch.int64)  # of positive and of negative values

    def see(self, x: Tensor) -> None:
        """Count the values of a tensor of any shape, a piece of it at a time."""
        for piece in x.flatten().split(PIECE):
            bits = piece.float().cpu().view(torch.int32)
            places = ((bits & _NO_SIGN) >> _DROPPED_BITS) + (bits < 0) * MAGNITUDES
            self.counts += torch.bincount(places, minlength=2 * MAGNITUDES).view(2, -1)

    def within(self, percentile: float) -> InputRange:
        """The range that holds `percentile` % of the values, as many left out below as above."""
        ordered = torch.cat((self.counts[1].flip(0), self.counts[0])).cumsum(0)  # from least to largest
        total = int(ordered[-1])
        left_out = int((1 - percentile / 100) / 2 * total)
        first, last = (int(torch.searchsorted(ordered, rank, right=True)) for rank in (left_out, total - 1 - left_out))
        return InputRange(max(self._edges(first)[0], self.low), min(self._edges(last)[1], self.high))

    @staticmethod
    def _edges(place: int) -> tuple[float, float]:
        """Of a bin, counted from the least."""
        magnitude = place - MAGNITUDES if place >= MAGNITUDES else MAGNITUDES - 1 - place
        bits = torch.tensor([magnitude, magnitude + 1], dtype=torch.int32) << _DROPPED_BITS
        near, far = bits.view(torch.float32).tolist()
        return (near, far) if place >= MAGNITUDES else (-far, -near)


class Products:
    """The sum of x xᵀ, float32 `[k, k]`, for GPTQ."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None

    def see(self, x: Tensor) -> None:
        x = x.float()
        product = (x.t() @ x).cpu()
        self.sum = product if self.sum is None else self.sum.add_(product)


class Observed:
    """A linear's product that shows its inputs to `look` first."""

    def __init__(self, product: Callable[[Any], Tensor], look: Callable[[Tensor], None]) -> None:
        self.product, self.look = product, look

    def __call__(self, x: Tensor) -> Tensor:
        if len(x):
            self.look(x)
        return self.product(x)
