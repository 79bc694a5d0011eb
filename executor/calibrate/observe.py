"""What the inputs of linears are like: looked at while the calibration set runs through a layer.

Legend: T tokens, k inputs of a linear.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from executor.calibrate.tensors import InputRange

BINS = 4096


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
    """How often values occur between two bounds that nothing lies beyond."""

    def __init__(self, bounds: InputRange) -> None:
        self.low, self.high = min(bounds.low, 0.0), max(bounds.high, 0.0)
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        self.counts += torch.histc(x.float(), BINS, self.low, self.high).cpu().double()

    def within(self, percentile: float) -> InputRange:
        """The range that holds `percentile` % of the values, as many left out below as above."""
        below = self.counts.cumsum(0) / self.counts.sum()
        left_out = (1 - percentile / 100) / 2
        width = (self.high - self.low) / BINS
        first = int((below <= left_out).sum())
        last = int((below < 1 - left_out).sum())
        return InputRange(self.low + first * width, min(self.low + (last + 1) * width, self.high))


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
