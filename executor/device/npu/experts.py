"""Mixture of experts on a chip: rows sorted by expert, multiplied group by group, summed back to their tokens.

Sorting and summing are the same whatever the weights are; the products of quantized ones are in quant_experts.py.
Weights are modules, so that a graph takes them for what they are: parameters, constant in it.
Legend: T tokens, n hidden size, E experts of this rank, I intermediate size, k experts per token, R = T * k rows.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch_npu
from torch import Tensor, nn

from executor.device.npu.linear import frozen

TOTALS, COUNTS = 0, 1  # group_list_type: running totals of the groups' rows, or each group's rows


class Product(Protocol):
    """Both products of all experts of this rank and the activation between them."""

    num_experts: int
    takes_int8: bool  # rows come quantized, each by its own largest value

    def __call__(self, rows: Tensor, scales: Tensor | None, groups: Tensor, kind: int) -> Tensor:
        """`rows [R, n]` sorted by expert -> `[R, n]` of the model's type; rows of no group are undefined.

        scales: float32 [R] of quantized rows. groups: int64 [E], counts or running totals by `kind`.
        """


class Experts(nn.Module):
    """A2 and A3: `x [T, n], ids [T, k], weights [T, k] -> [T, n]`; rows of other ranks' experts are left out.

    The product's experts are `first` to `first + E` of `num_experts`.

    Before CANN 8.5.0 float rows of all of exactly 128 experts of width 2048 are routed by another kernel, which knows
    no row_idx_type but 0; some releases give its counts as int32. The call below is right for either.
    """

    def __init__(self, product: Product, first: int, num_experts: int) -> None:
        super().__init__()
        self.product, self.first, self.num_experts = product, first, num_experts

    @property
    def is_whole(self) -> bool:
        return self.product.num_experts == self.num_experts

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not len(x):
            return torch.zeros_like(x)
        count = self.product.num_experts
        rows, places, counts, scales = torch_npu.npu_moe_init_routing_v2(
            x,
            ids,
            active_num=ids.numel(),
            expert_num=self.num_experts,
            expert_tokens_num_type=1,  # counts
            expert_tokens_num_flag=True,
            quant_mode=1 if self.product.takes_int8 else -1,
            active_expert_range=[self.first, self.first + count],
            row_idx_type=0,
        )
        # A list of counts must be longer than one; a single count is its own running total.
        kind = COUNTS if count > 1 else TOTALS
        y = self.product(rows, scales if self.product.takes_int8 else None, counts.to(torch.int64), kind)
        if self.is_whole:
            return _summed(y, places, weights, drop_pad_mode=2)
        # Each routed row is an expert of capacity 1, and -1 is the place of another rank's.
        return _summed(y.unsqueeze(1), places, weights, drop_pad_mode=3)


class LocalExperts(Experts):
    """300I DUO, whose routing kernel knows no range of experts and gives int32 running totals, whatever is asked.

    A rank that holds some of the experts counts them from 0; all others are one more expert, which comes last and is
    multiplied by nothing. Its rows are 0 in the sum: npu_moe_finalize_routing cannot leave rows out on this chip.
    """

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not len(x):
            return torch.zeros_like(x)
        count = self.product.num_experts
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
        y = self.product(rows, None, totals, TOTALS)
        if others is not None:
            behind = torch.arange(len(y), device=y.device) >= totals[-1]
            y = y.masked_fill(behind.unsqueeze(-1), 0)
        return _summed(y, places, weights, drop_pad_mode=2)


class FloatProduct(nn.Module):
    """Weights `[E, n, 2I]` and `[E, I, n]`, of the activations' type."""

    takes_int8 = False

    def __init__(self, gate_up: Tensor, down: Tensor, swiglu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down = frozen(gate_up), frozen(down)
        self.swiglu = swiglu
        self.num_experts = len(gate_up)

    def forward(self, rows: Tensor, scales: None, groups: Tensor, kind: int) -> Tensor:
        y = grouped(rows, self.gate_up, groups, kind)
        return grouped(self.swiglu(y), self.down, groups, kind)


def grouped(x: Tensor, w: Tensor, groups: Tensor, kind: int, **quantized: list[Tensor] | torch.dtype) -> Tensor:
    """The rows of each group by its own matrix of `w [E, in, out]`."""
    return torch_npu.npu_grouped_matmul(
        [x], [w], group_list=groups, split_item=2, group_type=0, group_list_type=kind, **quantized
    )[0]


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
