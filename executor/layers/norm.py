"""Normalisations. The residual stream is added inside the norm that follows it, so that a device may fuse both."""

from collections.abc import Iterator

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, empty, whole
from executor.device import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty(size)
        self.eps = eps

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        yield whole(f"{prefix}.weight", self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.bound().rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(norm(x + residual), x + residual)`; `residual` is None before the first layer."""
        return ops.bound().add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias over the last dim."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = empty(size), empty(size)
        self.eps = eps

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        yield whole(f"{prefix}.weight", self.weight)
        yield whole(f"{prefix}.bias", self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.bound().layer_norm(x, self.weight, self.bias, self.eps)
