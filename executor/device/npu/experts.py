"""Mixture of experts on a chip: rows sorted by expert, multiplied group by group, summed back to their tokens.

Weights are modules, so that a graph takes them for what they are: parameters, constant in it.
Legend: T tokens, n hidden size, E experts of this rank, I intermediate size, k experts per token, R = T * k rows.
"""

from collections.abc import Callable

import torch
import torch_npu
from torch import Tensor, nn

from executor.device.npu.linear import frozen

_TOTALS, _COUNTS = 0, 1  # group_list_type: running totals of the groups' rows, or each group's rows


class Experts(nn.Module):
    """A2 and A3: `x [T, n], ids [T, k], weights [T, k] -> [T, n]`; rows of other ranks' experts are left out.

    Weights `[E, n, 2I]` and `[E, I, n]` are experts `first` to `first + E` of `num_experts`.

    Before CANN 8.5.0 all of exactly 128 experts of width 2048 are routed by another kernel, which knows no row_idx_type
    but 0; some releases give its counts as int32. The call below is right for either.
    """

    def __init__(
        self, gate_up: Tensor, down: Tensor, swiglu: Callable[[Tensor], Tensor], first: int, num_experts: int
    ) -> None:
        super().__init__()
        self.gate_up, self.down = frozen(gate_up), frozen(down)
        self.swiglu = swiglu
        self.first, self.num_experts = first, num_experts

    @property
    def is_whole(self) -> bool:
        return self.gate_up.shape[0] == self.num_experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            ids,
            active_num=ids.numel(),
            expert_num=self.num_experts,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=-1,
            active_expert_range=[self.first, self.first + self.gate_up.shape[0]],
            row_idx_type=0,
        )
        # A list of counts must be longer than one; a single count is its own running total.
        y = self._multiply(rows, counts.to(torch.int64), _COUNTS if self.gate_up.shape[0] > 1 else _TOTALS)
        if self.is_whole:
            return _summed(y, places, weights, drop_pad_mode=2)
        # Each routed row is an expert of capacity 1, and -1 is the place of another rank's.
        return _summed(y.unsqueeze(1), places, weights, drop_pad_mode=3)

    def _multiply(self, rows: Tensor, groups: Tensor, kind: int) -> Tensor:
        """`rows [R, n]` sorted by expert -> `[R, n]`; rows of no group are undefined."""
        return _grouped(self.swiglu(_grouped(rows, self.gate_up, groups, kind)), self.down, groups, kind)


class LocalExperts(Experts):
    """300I DUO, whose routing kernel knows no range of experts and gives int32 running totals, whatever is asked.

    A rank that holds some of the experts counts them from 0; all others are one more expert, which comes last and is
    multiplied by nothing. Its rows are 0 in the sum: npu_moe_finalize_routing cannot leave rows out on this chip.
    """

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        count = self.gate_up.shape[0]
        others = None
        if not self.is_whole:
            ids = ids - self.first
            others = (ids < 0) | (ids >= count)
            ids, weights = ids.masked_fill(others, count), weights.masked_fill(others, 0)
        rows, places, totals, _ = torch_npu.npu_moe_init_routing_v2(
            x,
            ids,
            active_num=ids.numel(),
            expert_num=count if self.is_whole else count + 1,
            expert_tokens_num_type=0,  # running totals
            expert_tokens_num_flag=True,
        )
        totals = totals[:count].to(torch.int64)
        y = self._multiply(rows, totals, _TOTALS)
        if others is not None:
            behind = torch.arange(len(y), device=y.device) >= totals[-1]
            y = y.masked_fill(behind.unsqueeze(-1), 0)
        return _summed(y, places, weights, drop_pad_mode=2)


def _grouped(x: Tensor, w: Tensor, groups: Tensor, kind: int) -> Tensor:
    return torch_npu.npu_grouped_matmul([x], [w], group_list=groups, split_item=2, group_type=0, group_list_type=kind)[
        0
    ]


def _summed(y: Tensor, places: Tensor, weights: Tensor, drop_pad_mode: int) -> Tensor:
    """Each token's rows, weighted; modes 2 and 3 find a token's experts side by side in `places`."""
    return torch_npu.npu_moe_finalize_routing(
        y,
        skip1=None,
        skip2=None,
        bias=None,
        scales=weights,
        expanded_src_to_dst_row=places,
        export_for_source_row=None,
        drop_pad_mode=drop_pad_mode,
    )
