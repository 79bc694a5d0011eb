"""Weights in the chip's layout as modules, so that a graph takes them for what they are: parameters, constant in it.

Legend: T tokens, n inputs, m outputs, E experts of this rank, I intermediate, k experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch import Tensor, nn


def _frozen(x: Tensor | None) -> nn.Parameter | None:
    return None if x is None else nn.Parameter(x, requires_grad=False)


class Linear(nn.Module):
    """`x [T, n] -> [T, m]`, weight `[n, m]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class SummedLinear(nn.Module):
    """The product, then the sum over the ranks of `group`."""

    def __init__(self, product: Linear, group: Any) -> None:
        super().__init__()
        self.product, self.group = product, group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.product(x))


class FusedSummedLinear(Linear):
    """Both in one kernel, where a tile is sent while the next is multiplied."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Any) -> None:
        super().__init__(weight, bias)
        self.communicator = communicator(group, weight.device)
        self.traffic = group.traffic

    def forward(self, x: Tensor) -> Tensor:
        self.traffic.add(x)
        return torch_npu.npu_mm_all_reduce_base(x, self.weight, self.communicator, reduce_op="sum", bias=self.bias)


def communicator(group: Any, device: torch.device) -> str:
    """The name by which fused ops find the group: HCCL's own on a chip, torch's where it is emulated."""
    if device.type != "npu":
        return group.handle.group_name
    return group.handle._get_backend(device).get_hccl_comm_name(torch.distributed.get_rank())


class Experts(nn.Module):
    """`x [T, n], ids [T, k], weights [T, k] -> [T, n]`: rows sorted by expert, multiplied group by group, summed back.

    Weights `[E, n, 2I]` and `[E, I, n]` are experts `first` to `first + E` of `num_experts`.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        swiglu: Callable[[Tensor], Tensor],
        first: int,
        num_experts: int,
        drops_rows: bool,
    ) -> None:
        super().__init__()
        self.gate_up, self.down = _frozen(gate_up), _frozen(down)
        self.swiglu = swiglu
        self.first, self.num_experts = first, num_experts
        self.drops_rows = drops_rows and not self.is_whole

    @property
    def is_whole(self) -> bool:
        return self.gate_up.shape[0] == self.num_experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            ids,
            active_num=ids.numel(),
            expert_num=self.num_experts,
            expert_tokens_num_type=1,  # counts, as group_list_type 1 wants them
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=[self.first, self.first + self.gate_up.shape[0]],
            row_idx_type=0,
        )
        y = _grouped(self.swiglu(_grouped(rows, self.gate_up, counts)), self.down, counts)
        if self.drops_rows:
            y = y.unsqueeze(1)  # each routed row is an expert of capacity 1, and -1 is the place of another rank's
        elif not self.is_whole:
            y, places, weights = _without_others(y, places, counts, weights)
        return torch_npu.npu_moe_finalize_routing(
            y,
            skip1=None,
            skip2=None,
            bias=None,
            scales=weights,
            expanded_src_to_dst_row=places,
            export_for_source_row=None,
            drop_pad_mode=3 if self.drops_rows else 2,  # the places count a token's experts side by side
        )


def _grouped(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return torch_npu.npu_grouped_matmul([x], [w], group_list=counts, split_item=2, group_type=0, group_list_type=1)[0]


def _without_others(y: Tensor, places: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of other ranks' experts have place -1, and what stands behind the own rows is undefined: both become 0."""
    others = torch.arange(len(y), device=y.device) >= counts.sum()
    y = y.masked_fill(others.unsqueeze(-1), 0)
    missing = places < 0
    return y, places.masked_fill(missing, 0), weights.masked_fill(missing.view_as(weights), 0)
