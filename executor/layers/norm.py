"""Normalisations. The residual stream is added inside the norm that follows it, so that a device may fuse both."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, empty, whole
from executor.device import ops
from executor.layers.linear import Linear


def computed(x: nn.Parameter) -> nn.Parameter:
    """A small weight in the type that the device computes in."""
    return nn.Parameter(x.to(ops.bound().compute_dtype(x.dtype)), requires_grad=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dim.

    The architectures have no bias: `bias` is there where a quantizer shifted the norm's output to fit its steps.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty(size)
        self.register_parameter("bias", None)
        self.eps = eps

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        self.prefix = prefix
        yield whole(f"{prefix}.weight", self.weight)
        if self.bias is not None:
            yield whole(f"{prefix}.bias", self.bias)

    def add_bias(self) -> None:
        """The checkpoint has one."""
        self.bias = empty(len(self.weight), dtype=self.weight.dtype)

    def prepare(self) -> None:
        self.weight = computed(self.weight)
        if self.bias is not None:
            self.bias = computed(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.bound().rms_norm(x, self.weight, self.eps)
        return y if self.bias is None else y + self.bias

    def add(self, x: Tensor, residual: Tensor | None, reader: Linear | None = None) -> tuple[Any, Tensor]:
        """`(norm(x + residual), x + residual)`; `residual` is None before the first layer.

        `reader`: the one linear that reads the first, which a device may give in that linear's own form.
        """
        product = None if reader is None else reader.product
        return ops.bound().add_rms_norm(x, residual, self.weight, self.eps, self.bias, product)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = empty(size), empty(size)
        self.eps = eps

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        yield whole(f"{prefix}.weight", self.weight)
        yield whole(f"{prefix}.bias", self.bias)

    def prepare(self) -> None:
        self.weight, self.bias = computed(self.weight), computed(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.bound().layer_norm(x, self.weight, self.bias, self.eps)
