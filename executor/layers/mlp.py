"""Feed-forward layers: gated (SwiGLU, Shazeer 2020) and plain (GELU).

Legend: T tokens, n hidden size, I intermediate size of this rank.
"""

from typing import Any

from torch import Tensor, nn

from executor.device import ops
from executor.layers.linear import Linear, fused
from executor.parallel.groups import Group


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one multiplication."""

    def __init__(self, hidden_size: int, intermediate_size: int, group: Group, *, bias: bool = False) -> None:
        super().__init__()
        parts = fused(("gate_proj", "up_proj"), intermediate_size, group)
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias, shard="out", group=group, parts=parts)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, shard="in", group=group)

    def forward(self, x: Any) -> Tensor:
        return ops.bound().gated_mlp(x, self.gate_up_proj.product, self.down_proj.product)


class PlainMLP(nn.Module):
    """`fc2(gelu(fc1(x)))`; `tanh` chooses GELU's tanh approximation."""

    def __init__(self, num_in: int, num_hidden: int, num_out: int, group: Group, *, tanh: bool) -> None:
        super().__init__()
        self.linear_fc1 = Linear(num_in, num_hidden, bias=True, shard="out", group=group)
        self.linear_fc2 = Linear(num_hidden, num_out, bias=True, shard="in", group=group)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(ops.bound().gelu(self.linear_fc1(x), self.tanh))
