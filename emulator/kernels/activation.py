"""npu_swiglu, and its fusion with dequantization before and quantization after it.

Semantics and limits: the docstrings of the ops in the torch_npu wheel; 310P's 32-element rule from public recipes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator import chips
from emulator.kernels.quant import dynamic_quantize, quantize
from emulator.limits import FLOATS, refuse, require, require_dtype, require_rank, require_same_dtype, require_shape
from emulator.registry import kernel


def _check_swiglu(input: Tensor, dim: int = -1) -> None:
    require_dtype("input", input, FLOATS)
    require_rank("input", input, 1, 8)
    require(-input.dim() <= dim < input.dim(), "dim must be a dimension of input", dim)
    size = input.shape[dim]
    require(size % 2 == 0, "the split dimension must be even", size)
    if chips.current().soc == "atlas_300i_duo":
        require(input.shape[-1] % 32 == 0, "the last dimension must be a multiple of 32", input.shape[-1])


@kernel("npu_swiglu", _check_swiglu)
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = input.float().chunk(2, dim=dim)
    return (F.silu(gate) * up).to(input.dtype)


def _check_fused(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> None:
    require_dtype("x", x, (torch.int32, torch.float16, torch.bfloat16))
    require(x.dim() > 1 and x.shape[-1] % 2 == 0, "x must have more than 1 dimension, the last one even", list(x.shape))
    require(quant_mode in (0, 1), "quant_mode must be 0 (static) or 1 (dynamic)", quant_mode)
    require(swiglu_mode in (0, 1), "swiglu_mode must be 0 or 1", swiglu_mode)
    require(activate_dim in (None, -1, x.dim() - 1), "activate_dim must be the last dimension", activate_dim)
    require(dst_type in (None, 1), "dst_type must be torch.int8", dst_type)
    require(round_mode in (None, 0), "round_mode must be 0", round_mode)
    groups = 1 if group_index is None else group_index.shape[0]
    if x.dtype == torch.int32:
        require(weight_scale is not None, "an int32 x needs weight_scale")
        require_dtype("weight_scale", weight_scale, (torch.float32,))
        require(
            weight_scale.numel() == groups * x.shape[-1],
            f"weight_scale must have shape [{groups}, {x.shape[-1]}]",
            list(weight_scale.shape),
        )
        if activation_scale is not None:
            require_dtype("activation_scale", activation_scale, (torch.float32,))
            require(
                activation_scale.numel() == x[..., 0].numel(),
                f"activation_scale must have one value per row of x {list(x.shape)}",
                list(activation_scale.shape),
            )
    else:
        refuse(weight_scale=weight_scale, activation_scale=activation_scale, bias=bias)
    if bias is not None:
        require_dtype("bias", bias, (torch.int32,))
        require(bias.numel() == x.shape[-1], f"bias must have {x.shape[-1]} values", list(bias.shape))
    if quant_scale is not None:
        require_dtype("quant_scale", quant_scale, FLOATS)
    if quant_mode == 0:
        given = quant_scale is not None and quant_offset is not None
        require(given, "static quantization needs quant_scale and quant_offset")
        require_same_dtype("quant_scale", quant_scale, quant_offset=quant_offset)
        require_shape("quant_offset", quant_offset, *quant_scale.shape)
    if group_index is not None:
        refuse(bias=bias, quant_offset=quant_offset)
        _check_groups(x, group_index, quant_scale, quant_mode)


def _check_groups(x: Tensor, group_index: Tensor, quant_scale: Tensor | None, quant_mode: int) -> None:
    require(quant_mode == 1, "group_index needs quant_mode=1", quant_mode)
    require_dtype("group_index", group_index, (torch.int64,))
    require_rank("group_index", group_index, 1)
    half = x.shape[-1] // 2
    require(
        half <= 10496 and half % 64 == 0,
        "with group_index half of x's last dimension must be at most 10496 and a multiple of 64",
        half,
    )
    require_shape("quant_scale", quant_scale, group_index.shape[0], half)


@kernel("npu_dequant_swiglu_quant", _check_fused)
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    rows = x.flatten(0, -2)
    groups = _group_of_row(group_index, rows.shape[0])
    wide = (rows if bias is None else rows + bias.view(1, -1)).float()
    if x.dtype == torch.int32:
        wide = wide * weight_scale.view(-1, x.shape[-1])[groups]
        wide = wide if activation_scale is None else wide * activation_scale.view(-1, 1)
    if swiglu_mode == 1:
        y = _clamped_swiglu(wide, clamp_limit, glu_alpha, glu_bias)
    else:
        left, right = wide.chunk(2, dim=-1)
        y = F.silu(left) * right if activate_left else F.silu(right) * left
    smooth = None if quant_scale is None else quant_scale.float().view(-1, quant_scale.shape[-1])
    if smooth is not None and smooth.shape[0] > 1:
        smooth = smooth[groups]
    if quant_mode == 1:
        out, scale = dynamic_quantize(y, smooth)
    else:
        out, scale = quantize(y, smooth, quant_offset, True), torch.zeros(rows.shape[0])
    if group_index is not None:  # rows beyond the groups are left as they were in memory: nothing may read them
        out[int(group_index.sum()) :], scale[int(group_index.sum()) :] = 99, float("nan")
    return out.view(*x.shape[:-1], -1), scale.view(x.shape[:-1])


def _clamped_swiglu(x: Tensor, limit: float, alpha: float, bias: float) -> Tensor:
    """The variant with interleaved halves: even columns are gated and clamped from above, odd ones from both sides."""
    gate, linear = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (linear + bias)


def _group_of_row(group_index: Tensor | None, rows: int) -> Tensor:
    """The group of each row, from the groups' row counts; rows beyond them belong to the last."""
    if group_index is None:
        return torch.zeros(rows, dtype=torch.int64)
    counts = group_index.tolist()
    require(
        min(counts, default=0) >= 0 and sum(counts) <= rows,
        f"group_index counts must be non-negative, together at most {rows}",
        counts,
    )
    groups = torch.full((rows,), len(counts) - 1)
    groups[: sum(counts)] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return groups
