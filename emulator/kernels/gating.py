"""Mixture of experts: which experts a row goes to, and with what weight.

Semantics and limits: the ops' docstrings in the torch_npu wheel; 310P's 1024 rows from public recipes. What an op
leaves undefined is filled with NaN, so that whoever reads it is found out.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.limits import (
    FLOATS,
    refuse,
    require,
    require_dtype,
    require_rank,
    require_same_dtype,
    require_shape,
)
from emulator.registry import kernel

_DUO_ROWS = 1024


def _check_rows(x: Tensor) -> None:
    if chips.current().soc == "atlas_300i_duo":
        rows = x.flatten(0, -2).shape[0]
        require(
            rows <= _DUO_ROWS, f"at most {_DUO_ROWS} rows are gated at once (public 310P recipes gate in chunks)", rows
        )


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the lower index first among equals."""
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids[..., :k]


def _check_gate_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> None:
    require_dtype("x", x, FLOATS)
    require_rank("x", x, 2, 3)
    require(0 < k <= min(x.shape[-1], 1024), f"k must be 1 to {min(x.shape[-1], 1024)}", k)
    require_shape("finished", finished, *x.shape[:-1])
    require(finished is None or finished.dtype == torch.bool, "finished must be bool", finished)
    _check_rows(x)


@kernel("npu_moe_gating_top_k_softmax", _check_gate_softmax)
def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = _best(torch.softmax(x.float(), dim=-1), k)
    if finished is not None:
        ids = ids.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    rows = x.flatten(0, -2).shape[0]
    row_idx = torch.arange(rows * k, dtype=torch.int32).view(k, rows).t().reshape(*x.shape[:-1], k)
    return weights.to(x.dtype), ids.to(torch.int32), row_idx.contiguous()


def _check_gate_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> None:
    _check_gate_softmax(x, finished, k)
    require(renorm in (0, 1), "renorm must be 0 or 1", renorm)


@kernel("npu_moe_gating_top_k_softmax_v2", _check_gate_softmax_v2)
def npu_moe_gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    softmax = torch.softmax(x.float(), dim=-1)
    if renorm:
        values, ids = _best(x.float(), k)
        weights = torch.softmax(values, dim=-1)
    else:
        weights, ids = _best(softmax, k)
    if finished is not None:
        ids = ids.masked_fill(finished.unsqueeze(-1), x.shape[-1])
    shown = softmax if output_softmax and not renorm else softmax.new_empty(0)
    return weights.to(x.dtype), ids.to(torch.int32), shown


def _check_gate(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> None:
    refuse(input_ids=input_ids, tid2eid=tid2eid)
    require_dtype("x", x, FLOATS)
    require_rank("x", x, 2)
    experts = x.shape[1]
    require(experts <= 2048, "there must be at most 2048 experts", experts)
    require(renorm == 0, "renorm must be 0", renorm)
    require(norm_type in (0, 1), "norm_type must be 0 (softmax) or 1 (sigmoid)", norm_type)
    require(group_select_mode in (0, 1), "group_select_mode must be 0 or 1", group_select_mode)
    require(
        group_count > 0 and experts % group_count == 0 and experts // group_count > 2,
        "group_count must divide the experts into groups of more than 2",
        [group_count, experts],
    )
    require(
        -(-(experts // group_count) // 32) * 32 * group_count <= 2048,
        "the groups, padded to 32 experts, must not exceed 2048",
        [group_count, experts],
    )
    require(1 <= k_group <= group_count, "k_group must be 1 to group_count", [k_group, group_count])
    require(1 <= k <= experts // group_count * k_group, f"k must be 1 to {experts // group_count * k_group}", k)
    require_shape("bias", bias, experts)
    require_same_dtype("x", x, bias=bias)
    _check_rows(x)


@kernel("npu_moe_gating_top_k", _check_gate)
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.sigmoid(x.float()) if norm_type == 1 else torch.softmax(x.float(), dim=-1)
    scores = norm if bias is None else norm + bias.float()
    if k_group < group_count:
        grouped = scores.unflatten(-1, (group_count, -1))
        marks = grouped.topk(2, dim=-1).values.sum(-1) if group_select_mode == 1 else grouped.amax(-1)
        kept = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, _best(marks, k_group)[1], True)
        scores = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = _best(scores, k)[1]
    y = norm.gather(-1, ids)
    if norm_type == 1:
        y = y / (y.sum(-1, keepdim=True) + eps)
    shown = norm if out_flag else torch.full_like(norm, float("nan"))
    return (y * routed_scaling_factor).to(x.dtype), ids.to(torch.int32), shown
