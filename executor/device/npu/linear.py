"""Weights in the chip's layout as modules, so that a graph takes them for what they are: parameters, constant in it.

Legend: T tokens, n inputs, m outputs.
"""

from typing import Any

import torch
import torch_npu
from torch import Tensor, nn


def frozen(x: Tensor | None) -> nn.Parameter | None:
    """A weight that a graph may keep as a constant."""
    return None if x is None else nn.Parameter(x, requires_grad=False)


class Linear(nn.Module):
    """`x [T, n] -> [T, m]`, weight `[n, m]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = frozen(weight), frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class SummedLinear(nn.Module):
    """The product, then the sum over the ranks of `group`."""

    def __init__(self, product: nn.Module, group: Any) -> None:
        super().__init__()
        self.product, self.group = product, group

    def forward(self, x: Any) -> Tensor:
        return self.group.all_reduce(self.product(x))


class FusedSummedLinear(Linear):
    """Both in one kernel where x has more rows than a decode step: a tile is sent while the next is multiplied.

    The kernel is documented for prefill only ("not in the incremental phase"), between at most 8 ranks of one node, and
    over one communication domain in a model.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Any, decode_rows: int) -> None:
        super().__init__(weight, bias)
        self.group, self.decode_rows = group, decode_rows
        self.communicator = communicator(group, weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) <= self.decode_rows:
            return self.group.all_reduce(super().forward(x))
        self.group.traffic.add(x)
        return torch_npu.npu_mm_all_reduce_base(x, self.weight, self.communicator, reduce_op="sum", bias=self.bias)


def communicator(group: Any, device: torch.device) -> str:
    """The name by which fused ops find the group: HCCL's own on a chip, torch's where it is emulated."""
    if device.type != "npu":
        return group.handle.group_name
    return group.handle._get_backend(device).get_hccl_comm_name(torch.distributed.get_rank())
