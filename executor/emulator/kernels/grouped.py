"""npu_grouped_matmul: one product per expert over rows that routing has sorted.

Semantics and limits: the op's docstring in the torch_npu wheel, the single-x single-weight and many-weights forms
with a group_list tensor along the rows (group_type 0). Weight-only quantization, group_type -1 and lists of inputs
are documented and not emulated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from executor.emulator import chips
from executor.emulator.kernels.matmul import DTYPES, int_product
from executor.emulator.kernels.quant import dynamic_quantize, quantize, scale_of_param
from executor.emulator.limits import FLOATS, refuse, require, require_dtype, require_rank, require_shape
from executor.emulator.registry import kernel

_INNER = 65536
_ACTIVATIONS = {0: None, 1: F.relu, 2: lambda x: F.gelu(x, approximate="tanh"), 4: F.gelu, 5: F.silu}


def group_sizes(group_list: Tensor, list_type: int, rows: int, exact: bool = True) -> list[int]:
    """Rows per group; the list must add up to the rows."""
    values = group_list.tolist()
    sizes = [b - a for a, b in zip([0, *values], values, strict=False)] if list_type == 0 else values
    kind = "cumulative (not decreasing)" if list_type == 0 else "the rows of each group (not negative)"
    require(all(n >= 0 for n in sizes), f"with group_list_type {list_type} group_list must be {kind}", values)
    total = sum(sizes)
    require(total == rows if exact else total <= rows, f"group_list must add up to x's {rows} rows", values)
    return sizes


def _weights(weight: list[Tensor]) -> list[Tensor]:
    return list(weight[0]) if len(weight) == 1 and weight[0].dim() == 3 else list(weight)


def _check_grouped(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    offset: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: list[Tensor] | None = None,
    activation_quant_scale: list[Tensor] | None = None,
    activation_quant_offset: list[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> None:
    refuse(offset=offset or None, antiquant_scale=antiquant_scale or None, antiquant_offset=antiquant_offset or None)
    refuse(activation_input=activation_input or None, activation_quant_scale=activation_quant_scale or None)
    refuse(activation_quant_offset=activation_quant_offset or None, x_dtype=x_dtype, weight_dtype=weight_dtype)
    refuse(scale_dtype=scale_dtype, per_token_scale_dtype=per_token_scale_dtype)
    require(len(x) == 1, "x must be a list of one tensor (lists of inputs are not emulated)", len(x))
    require(group_type == 0, "group_type must be 0 (rows)", group_type)
    require(split_item in (2, 3), "with group_type 0 split_item must be 2 or 3", split_item)
    require(group_list is not None, "group_list must be given")
    require_dtype("group_list", group_list, (torch.int64,))
    require_rank("group_list", group_list, 1)
    require(group_list_type in (0, 1), "group_list_type must be 0 (cumulative) or 1 (count)", group_list_type)
    require_rank("x", x[0], 2)
    require(x[0].is_contiguous(), "x must not be transposed", x[0].stride())
    _check_weight(x[0], weight, group_list)
    require(act_type in _ACTIVATIONS, "act_type must be 0, 1, 2, 4 or 5", act_type)
    out = DTYPES.get(output_dtype, output_dtype) if output_dtype is not None else None
    if chips.current().soc == "atlas_300i_duo":
        require(
            x[0].dtype == weight[0].dtype == torch.float16,
            "x and weight must be float16",
            [x[0].dtype, weight[0].dtype],
        )
        require(len(weight) == 1, "weight must be one tensor", len(weight))
        require(weight[0].shape[-1] % 16 == 0, "the output's columns must be a multiple of 16", weight[0].shape[-1])
        refuse(scale=scale or None, per_token_scale=per_token_scale or None)
        require(act_type == 0, "act_type must be 0", act_type)
    _check_grouped_dtypes(x[0], weight, bias or [], scale or [], per_token_scale or [], act_type, out)


def _check_weight(x: Tensor, weight: list[Tensor], group_list: Tensor) -> None:
    require(1 <= len(weight) <= 128, "there must be 1 to 128 weights", len(weight))
    if len(weight) == 1:
        require_rank("weight", weight[0], 3)
        require(weight[0].shape[0] <= 1024, "there must be at most 1024 groups", weight[0].shape[0])
    matrices = weight[0].shape[0] if len(weight) == 1 else len(weight)
    require(
        group_list.shape[0] == matrices,
        f"group_list must have one entry per weight, {matrices}",
        list(group_list.shape),
    )
    for w in weight:
        require_rank("weight", w, 3 if len(weight) == 1 else 2)
        require(w.shape[-2] == x.shape[1], "x's columns must be the weights' rows", [list(x.shape), list(w.shape)])
        require(w.shape[-1] == weight[0].shape[-1], "the weights must have the same columns", list(w.shape))
        inner = w.shape[-1] if w.is_contiguous() else w.shape[-2]
        require(
            inner < _INNER and x.shape[1] < _INNER,
            f"the innermost dimensions must be below {_INNER}",
            [list(x.shape), list(w.shape)],
        )


def _check_grouped_dtypes(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    tokens: list[Tensor],
    act: int | None,
    out: torch.dtype | None,
) -> None:
    require(
        all(w.dtype == x.dtype for w in weight),
        "weight must have x's dtype (weight-only quantization is not emulated)",
        [x.dtype, weight[0].dtype],
    )
    columns, groups = weight[0].shape[-1], weight[0].shape[0] if len(weight) == 1 else len(weight)
    if x.dtype == torch.int8:
        wanted = {
            torch.int32: (None,),
            torch.int8: (torch.int64,),
            torch.bfloat16: (torch.bfloat16,),
            torch.float16: (torch.float32,),
        }
        target = out or torch.int8
        require(target in wanted, "output_dtype must be int8, bfloat16, float16 or int32", target)
        got = scale[0].dtype if scale else None
        require(got in wanted[target], f"for an output of {target} scale must be {wanted[target][0]}", got)
        for s in scale:
            require(
                s.numel() == (groups * columns if len(weight) == 1 else columns),
                f"scale must have {columns} values per group",
                list(s.shape),
            )
        if tokens:
            require(
                target in (torch.bfloat16, torch.float16),
                "per_token_scale is for outputs of bfloat16 and float16",
                target,
            )
            require_dtype("per_token_scale", tokens[0], (torch.float32,))
            require_shape("per_token_scale", tokens[0], x.shape[0])
        require(all(b.dtype == torch.int32 for b in bias), "bias must be int32", [b.dtype for b in bias])
    else:
        require_dtype("x", x, FLOATS)
        require(out in (None, x.dtype), f"output_dtype must be {x.dtype}", out)
        require(not scale and not tokens, "scale and per_token_scale are for an int8 x")
        wanted_bias = torch.float16 if x.dtype == torch.float16 else torch.float32
        require(all(b.dtype == wanted_bias for b in bias), f"bias must be {wanted_bias}", [b.dtype for b in bias])
    require(
        not act or (x.dtype == torch.int8 and bool(tokens)), "act_type is for the per-token quantized form only", act
    )


@kernel("npu_grouped_matmul", _check_grouped)
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | None = None,
    **_: object,
) -> list[Tensor]:
    rows, matrices = x[0], _weights(weight)
    out = (DTYPES[output_dtype] if output_dtype is not None else None) or rows.dtype
    # Rows beyond the last group are allowed in practice (padding after routing) and come out undefined.
    sizes = group_sizes(group_list, group_list_type or 0, len(rows), exact=False)
    y = torch.full((len(rows), matrices[0].shape[-1]), float("nan") if out.is_floating_point else 99, dtype=out)
    biases = _per_group(bias, len(matrices))
    scales = _per_group(scale, len(matrices))
    start = 0
    for index, size in enumerate(sizes):
        mine = slice(start, start + size)
        tokens = per_token_scale[0][mine] if per_token_scale else None
        y[mine] = _product(rows[mine], matrices[index], biases[index], scales[index], tokens, act_type or 0, out)
        start += size
    return [y]


def _per_group(given: list[Tensor] | None, groups: int) -> list[Tensor | None]:
    if not given:
        return [None] * groups
    return list(given) if len(given) == groups else list(given[0].view(groups, -1))


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, scale: Tensor | None, tokens: Tensor | None, act: int, out: torch.dtype
) -> Tensor:
    if x.dtype != torch.int8:
        y = x.float() @ w.float()
        return (y if bias is None else y + bias.float()).to(out)
    y = int_product(x, w)
    y = y if bias is None else y + bias
    if out == torch.int32:
        return y
    if out == torch.int8:
        return quantize(y, scale_of_param(scale)[0], None, False)
    wide = y.float() * scale.float()
    wide = wide if tokens is None else wide * tokens.unsqueeze(-1)
    activation = _ACTIVATIONS[act]
    return (wide if activation is None else activation(wide)).to(out)


def _check_swiglu_quant(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: list[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    **others: object,
) -> None:
    refuse(smooth_scale=smooth_scale, weight_assist_matrix=weight_assist_matrix or None, bias=bias, **others)
    require_dtype("x", x, (torch.int8,))
    require_rank("x", x, 2)
    require(
        len(weight) == len(weight_scale) == 1,
        "weight and weight_scale must be lists of one tensor",
        [len(weight), len(weight_scale)],
    )
    require_dtype("weight", weight[0], (torch.int8,))
    require_rank("weight", weight[0], 3)
    groups, rows, columns = weight[0].shape
    require(
        rows == x.shape[1] and columns % 2 == 0,
        "weight must have shape [groups, x's columns, an even number]",
        list(weight[0].shape),
    )
    require_dtype("weight_scale", weight_scale[0], (torch.float32,))
    require_shape("weight_scale", weight_scale[0], groups, columns)
    require_dtype("x_scale", x_scale, (torch.float32,))
    require_shape("x_scale", x_scale, x.shape[0])
    require_dtype("group_list", group_list, (torch.int64,))
    require_shape("group_list", group_list, groups)
    require(dequant_mode == 0 and quant_mode == 0, "dequant_mode and quant_mode must be 0", [dequant_mode, quant_mode])
    require(group_list_type in (0, 1), "group_list_type must be 0 or 1", group_list_type)


@kernel("npu_grouped_matmul_swiglu_quant_v2", _check_swiglu_quant)
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    group_list_type: int | None = 0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    half = weight[0].shape[2] // 2
    out, scales = torch.full((len(x), half), 99, dtype=torch.int8), torch.full((len(x),), float("nan"))
    start = 0
    for index, size in enumerate(group_sizes(group_list, group_list_type or 0, len(x), exact=False)):
        mine = slice(start, start + size)
        wide = int_product(x[mine], weight[0][index]).float() * weight_scale[0][index] * x_scale[mine, None]
        out[mine], scales[mine] = dynamic_quantize(F.silu(wide[:, :half]) * wide[:, half:])
        start += size
    return out, scales
