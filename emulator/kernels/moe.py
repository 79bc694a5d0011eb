"""Mixture of experts: routing rows to experts, and the way back.

Semantics and limits: the ops' docstrings in the torch_npu wheel, for finalize_routing's modes the page of
aclnnMoeFinalizeRoutingV2, and for routing on 300I DUO the page of aclnnMoeInitRoutingV2, which
npu_moe_init_routing_v2 takes there. What an op leaves undefined is filled with NaN (or an index far out of range), so
that whoever reads it is found out. N rows, k experts of a row, E experts, n row size.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.kernels.quant import dynamic_quantize
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

_UNDEFINED_INDEX = 2**30


def _duo() -> bool:
    return chips.current().soc == "atlas_300i_duo"


def _check_init_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> None:
    refuse(offset=offset, x_dtype=x_dtype)
    require_rank("x", x, 2)
    require_dtype("expert_idx", expert_idx, (torch.int32,))
    require_rank("expert_idx", expert_idx, 2)
    require(
        x.shape[0] == expert_idx.shape[0],
        "expert_idx must have one row per row of x",
        [list(x.shape), list(expert_idx.shape)],
    )
    if _duo():
        _check_duo_routing(
            x, active_num, expert_num, drop_pad_mode, expert_tokens_num_type, quant_mode, active_expert_range,
            row_idx_type, scale,
        )  # fmt: skip
        return
    require_dtype("x", x, (*FLOATS, torch.int8))
    require(drop_pad_mode == 0, "drop_pad_mode must be 0", drop_pad_mode)
    require(
        expert_tokens_num_type in (1, 2),
        "expert_tokens_num_type must be 1 (count) or 2 (key and value)",
        expert_tokens_num_type,
    )
    require(expert_tokens_num_flag, "expert_tokens_num_flag must be True", expert_tokens_num_flag)
    require(quant_mode in (-1, 1), "quant_mode must be -1 or 1", quant_mode)
    require(x.dtype != torch.int8 or quant_mode == -1, "an int8 x cannot be quantized again", quant_mode)
    limit = 5120 if expert_tokens_num_type == 2 else 10240
    require(0 < expert_num <= limit, f"expert_num must be 1 to {limit}", expert_num)
    require(active_num >= -1, "active_num must be -1 or more", active_num)
    require(row_idx_type in (0, 1), "row_idx_type must be 0 or 1", row_idx_type)
    start, end = active_expert_range or (0, expert_num)
    require(0 <= start < end <= expert_num, f"active_expert_range must lie in [0, {expert_num}]", [start, end])
    if scale is not None:
        require_dtype("scale", scale, (torch.float32,))
        require_shape("scale", scale, *((x.shape[0],) if quant_mode == -1 else (end - start, x.shape[1])))


def _check_duo_routing(
    x: Tensor, active_num: int, expert_num: int, drop_pad_mode: int, expert_tokens_num_type: int, quant_mode: int,
    active_expert_range: list[int] | None, row_idx_type: int, scale: Tensor | None,
) -> None:  # fmt: skip
    """300I DUO: what its kernel is not told must not be asked for, else it silently computes something else."""
    require_dtype("x", x, FLOATS)
    require(
        list(active_expert_range or (0, expert_num)) == [0, expert_num],
        f"active_expert_range is not handed on here: it must be [0, {expert_num}] or left out, and ids must be local",
        active_expert_range,
    )
    require(row_idx_type == 0, "row_idx_type is not handed on here and must be 0", row_idx_type)
    require(quant_mode == -1, "quant_mode is not handed on here and must be -1", quant_mode)
    refuse(scale=scale)
    require(drop_pad_mode == 0, "drop_pad_mode is not handed on here and must be 0", drop_pad_mode)
    require(
        expert_tokens_num_type in (0, 1),
        "expert_tokens_num_type must be 0 (running totals, which come whatever is asked)",
        expert_tokens_num_type,
    )
    require(expert_num > 0, "expert_num must be positive", expert_num)
    require(active_num >= 0, "active_num must be 0 (all rows) or more", active_num)


@kernel("npu_moe_init_routing_v2", _check_init_routing)
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start, end = active_expert_range or (0, expert_num)
    flat = expert_idx.flatten().long()
    require(
        not len(flat) or (int(flat.min()) >= 0 and int(flat.max()) < expert_num),
        f"expert ids must lie in [0, {expert_num})",
        flat.tolist()[:32],
    )
    if _duo():
        return _duo_routing(x, flat, active_num, expert_num)
    mine = (flat >= start) & (flat < end)
    order = torch.where(mine, flat, expert_num).argsort(stable=True)[: int(mine.sum())]
    total = len(flat) if active_num <= 0 else min(active_num, len(flat))
    order = order[:total]
    used, experts, rows = len(order), flat[order], order // expert_idx.shape[1]
    counts = torch.bincount(flat[mine] - start, minlength=end - start)
    expanded_scale = torch.full((total,), float("nan"))
    if quant_mode == 1:
        smooth = None if scale is None else scale[experts - start]
        expanded = torch.full((total, x.shape[1]), 99, dtype=torch.int8)
        expanded[:used], expanded_scale[:used] = dynamic_quantize(x[rows], smooth)
    else:
        expanded = x.new_full((total, x.shape[1]), float("nan") if x.is_floating_point() else 99)
        expanded[:used] = x[rows]
        if scale is not None:
            expanded_scale[:used] = scale[rows]
    if row_idx_type == 0:
        row_idx = torch.full((len(flat),), -1, dtype=torch.int32)
        row_idx[order] = torch.arange(used, dtype=torch.int32)
    else:
        row_idx = torch.full((len(flat),), _UNDEFINED_INDEX, dtype=torch.int32)
        row_idx[:used] = order.to(torch.int32)
    if expert_tokens_num_type == 2:
        busy = counts.nonzero().flatten()
        pairs = torch.zeros(expert_num, 2, dtype=torch.int64)
        pairs[: len(busy)] = torch.stack((busy + start, counts[busy]), dim=1)
        counts = pairs
    return expanded, row_idx, counts, expanded_scale


def _duo_routing(x: Tensor, flat: Tensor, active_num: int, expert_num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """300I DUO: the counts are int32 running totals over all experts; what stands in the fourth output is undefined."""
    order = flat.argsort(stable=True)
    places = torch.empty(len(flat), dtype=torch.int32)
    places[order] = torch.arange(len(flat), dtype=torch.int32)
    kept = order[: active_num or len(flat)]
    totals = torch.bincount(flat, minlength=expert_num).cumsum(0).to(torch.int32)
    per_row = len(flat) // max(len(x), 1) or 1
    return x[kept // per_row], places, totals, torch.full((expert_num,), _UNDEFINED_INDEX, dtype=torch.int32)


def _check_finalize(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> None:
    x = expanded_permuted_rows
    require(drop_pad_mode in (0, 1, 2, 3), "drop_pad_mode must be 0 to 3", drop_pad_mode)
    drops = drop_pad_mode in (1, 3)
    require_dtype("expanded_permuted_rows", x, FLOATS)
    require_rank("expanded_permuted_rows", x, 3 if drops else 2)
    require_same_dtype("expanded_permuted_rows", x, skip1=skip1, skip2=skip2, bias=bias, scales=scales)
    require_dtype("expanded_src_to_dst_row", expanded_src_to_dst_row, (torch.int32,))
    require_rank("expanded_src_to_dst_row", expanded_src_to_dst_row, 1)
    total = expanded_src_to_dst_row.shape[0]
    per_row = scales.shape[1] if scales is not None else k
    require(total % per_row == 0, f"expanded_src_to_dst_row must have {per_row} entries per row", total)
    rows = total // per_row
    if drops:
        require(x.shape[0] >= per_row, "expanded_permuted_rows must have as many experts as a row has", list(x.shape))
    else:
        require_shape("expanded_permuted_rows", x, total, x.shape[1])
    require_shape("scales", scales, rows, per_row)
    require_shape("skip1", skip1, rows, x.shape[-1])
    require_shape("skip2", skip2, rows, x.shape[-1])
    require(skip1 is not None or skip2 is None, "skip2 needs skip1")
    require_shape("export_for_source_row", export_for_source_row, rows, per_row)
    require(bias is None or export_for_source_row is not None, "bias needs export_for_source_row")
    if _duo():
        require(drop_pad_mode == 2, "drop_pad_mode must be 2", drop_pad_mode)
        refuse(skip1=skip1, skip2=skip2, bias=bias, export_for_source_row=export_for_source_row)
        require(x.shape[1] % 32 == 0, "the row size must be a multiple of 32", x.shape[1])


@kernel("npu_moe_finalize_routing", _check_finalize)
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    # Modes 1 and 3 have experts padded to one capacity, [E, C, n], and places of -1 for what was dropped.
    drops, index = drop_pad_mode in (1, 3), expanded_src_to_dst_row.long()
    x = expanded_permuted_rows.flatten(0, 1) if drops else expanded_permuted_rows
    lowest = -1 if drops else 0
    require(
        not len(index) or (int(index.min()) >= lowest and int(index.max()) < len(x)),
        f"expanded_src_to_dst_row must lie in [{lowest}, {len(x)})",
        index.tolist()[:32],
    )
    per_row = scales.shape[1] if scales is not None else k
    # Modes 0 and 1 count experts first (i + k * rows), 2 and 3 rows first (i * k + j).
    index = index.view(per_row, -1).t() if drop_pad_mode in (0, 1) else index.view(-1, per_row)
    parts = x[index].float().masked_fill_((index < 0).unsqueeze(-1), 0)
    if bias is not None:
        parts = parts + bias[export_for_source_row.long()].float()
    if scales is not None:
        parts = parts * scales.float().unsqueeze(-1)
    out = parts.sum(1)
    for skip in (skip1, skip2):
        out = out if skip is None else out + skip.float()
    return out.to(x.dtype)


def _check_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> None:
    require_dtype("tokens", tokens, FLOATS)
    require_rank("tokens", tokens, 2)
    require_rank("indices", indices, 1, 2)
    require_dtype("indices", indices, (torch.int32, torch.int64))
    require(
        indices.shape[0] == tokens.shape[0],
        "indices must have one row per token",
        [list(tokens.shape), list(indices.shape)],
    )
    require(indices.numel() < 16777215, "there must be fewer than 16777215 indices", indices.numel())
    require(not padded_mode, "padded_mode must be False", padded_mode)


@kernel("npu_moe_token_permute", _check_permute)
def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    per_row = indices.shape[1] if indices.dim() == 2 else 1
    order = indices.flatten().argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    kept = order[: num_out_tokens if num_out_tokens else len(order)]
    return tokens[kept // per_row], position.to(torch.int32)


def _check_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> None:
    require_dtype("permuted_tokens", permuted_tokens, FLOATS)
    require_rank("permuted_tokens", permuted_tokens, 2)
    require_dtype("sorted_indices", sorted_indices, (torch.int32,))
    require_rank("sorted_indices", sorted_indices, 1)
    require(not padded_mode, "padded_mode must be False", padded_mode)
    refuse(restore_shape=restore_shape)
    require_shape("permuted_tokens", permuted_tokens, sorted_indices.shape[0], permuted_tokens.shape[1])
    if probs is not None:
        require_dtype("probs", probs, FLOATS)
        require_rank("probs", probs, 2)
        require(probs.numel() == sorted_indices.numel(), "probs must have one value per index", list(probs.shape))
        require(probs.shape[1] <= 512, "there must be at most 512 experts per token", probs.shape[1])


@kernel("npu_moe_token_unpermute", _check_unpermute)
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    index = sorted_indices.long()
    require(
        not len(index) or (int(index.min()) >= 0 and int(index.max()) < len(permuted_tokens)),
        f"sorted_indices must lie in [0, {len(permuted_tokens)})",
        index.tolist()[:32],
    )
    parts = permuted_tokens[index].float()
    if probs is None:
        return parts.to(permuted_tokens.dtype)
    return (parts.unflatten(0, probs.shape) * probs.float().unsqueeze(-1)).sum(1).to(permuted_tokens.dtype)
