"""Linear layers: replicated, split by outputs, split by inputs, and several in one multiplication.

One class: the split is a label on a dim ("out", "in" or None), collectives are the identity at degree 1.
Legend: T tokens, n inputs, m outputs of this rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, elsewhere, empty
from executor.device import ops
from executor.parallel.groups import Group
from executor.parallel.partition import part

_ALONE = Group()


@dataclass(frozen=True)
class Part:
    """`rows` of tensor `name` (beside the fused layer; None: the layer's own name), `num_rows` of the whole tensor."""

    name: str | None
    num_rows: int
    rows: slice

    @property
    def num_local(self) -> int:
        return self.rows.stop - self.rows.start


class Linear(nn.Module):
    """`y = x Wᵀ + b`, `x [T, n] -> [T, m]`.

    shard "out": this rank holds a part of the outputs. shard "in": it holds a part of the inputs, and the results
    are summed over the group; the bias is then added on rank 0 only. `parts` fuses tensors that share their input.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        bias: bool = False,
        shard: Literal["out", "in"] | None = None,
        group: Group = _ALONE,
        parts: tuple[Part, ...] = (),
        file_shape: tuple[int, ...] | None = None,
    ) -> None:
        """`file_shape`: the checkpoint's shape of the same weight where it is not [num_out, num_in] (a convolution)."""
        super().__init__()
        self.group = group if shard else _ALONE
        self.shard = shard
        self.num_in = num_in
        self.columns = part(num_in, group, "linear inputs") if shard == "in" else slice(0, num_in)
        out = part(num_out, group, "linear outputs") if shard == "out" and not parts else slice(0, num_out)
        self.parts = parts or (Part(None, num_out, out),)
        self.file_shape = file_shape
        num_rows = sum(p.num_local for p in self.parts)
        self.weight = empty(num_rows, self.columns.stop - self.columns.start)
        self.has_bias = bias
        adds_bias = bias and not (shard == "in" and group.rank)
        self.bias = empty(num_rows) if adds_bias else None
        self._multiply: Callable[[Tensor], Tensor] | None = None

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        start = 0
        for p in self.parts:
            name = f"{prefix.rsplit('.', 1)[0]}.{p.name}" if p.name else prefix
            end = start + p.num_local
            if self.file_shape:
                weight, index = self.weight.view(self.file_shape), (slice(None),) * len(self.file_shape)
                yield Pull(f"{name}.weight", self.file_shape, index, weight)
            else:
                shape = (p.num_rows, self.num_in)
                yield Pull(f"{name}.weight", shape, (p.rows, self.columns), self.weight[start:end])
            if self.bias is not None:
                yield Pull(f"{name}.bias", (p.num_rows,), (p.rows,), self.bias[start:end])
            elif self.has_bias:
                yield elsewhere(f"{name}.bias", (p.num_rows,))
            start = end

    def prepare(self) -> None:
        """Hand the weight to the backend in its own layout and drop the plain copy."""
        bias = None if self.bias is None else self.bias.data
        if self.shard == "in" and self.group.size > 1:
            self._multiply = ops.bound().prepare_summed_linear(self.weight.data, bias, self.group)
        else:
            self._multiply = ops.bound().prepare_linear(self.weight.data, bias)
        del self.weight
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x)


def fused(names: tuple[str, ...], num_out: int, group: Group) -> tuple[Part, ...]:
    """Equal tensors side by side, each split by its outputs: gate and up."""
    return tuple(Part(name, num_out, part(num_out, group, name)) for name in names)
