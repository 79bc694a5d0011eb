"""npu_grouped_matmul: one product per expert, over rows that routing has sorted or over lists of inputs.

Semantics and limits: the op's docstring in the torch_npu wheel: plain, per-channel and per-token quantized, and int8
weights with scales per channel; group_list as a tensor or as a list. int4 weights and scales per group are
documented and not emulated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator import chips
from emulator.kernels.matmul import DTYPES, int_product
from emulator.kernels.quant import quantize, scale_of_param
from emulator.limits import FLOATS, HALF, refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel

_INNER = 65536
_ACTIVATIONS = {0: None, 1: F.relu, 2: lambda x: F.gelu(x, approximate="tanh"), 4: F.gelu, 5: F.silu}
Tensors = list[Tensor] | None


def group_sizes(values: list[int], list_type: int, rows: int) -> list[int]:
    """Rows per group. The page wants them to add up to all rows; after routing to some ranks' experts fewer do."""
    sizes = [b - a for a, b in zip([0, *values], values, strict=False)] if list_type == 0 else values
    kind = "cumulative (not decreasing)" if list_type == 0 else "the rows of each group (not negative)"
    require(all(n >= 0 for n in sizes), f"with group_list_type {list_type} group_list must be {kind}", values)
    require(sum(sizes) <= rows, f"group_list must add up to x's {rows} rows", values)
    return sizes


def _check(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    offset: Tensors = None,
    antiquant_scale: Tensors = None,
    antiquant_offset: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: Tensor | list[int] | None = None,
    activation_input: Tensors = None,
    activation_quant_scale: Tensors = None,
    activation_quant_offset: Tensors = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | torch.dtype | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> None:
    refuse(offset=offset or None, activation_input=activation_input or None, x_dtype=x_dtype)
    refuse(activation_quant_scale=activation_quant_scale or None, weight_dtype=weight_dtype)
    refuse(activation_quant_offset=activation_quant_offset or None, scale_dtype=scale_dtype)
    refuse(per_token_scale_dtype=per_token_scale_dtype)
    require(
        1 <= len(x) <= 128 and 1 <= len(weight) <= 128, "x and weight must be lists of 1 to 128 tensors", len(weight)
    )
    require(split_item in (0, 1, 2, 3), "split_item must be 0 to 3", split_item)
    require(act_type in _ACTIVATIONS, "act_type must be 0, 1, 2, 4 or 5", act_type)
    if group_type == 0:
        _check_rows(x, weight, group_list, split_item, group_list_type)
    else:
        _check_lists(x, weight, group_list, split_item, group_type)
    _check_shapes(x, weight)
    target = _dtype(output_dtype)
    if chips.current().soc == "atlas_300i_duo":
        _check_duo(x, weight, group_type, scale, per_token_scale, antiquant_scale, act_type)
    _check_dtypes(x[0], weight, bias or [], scale or [], per_token_scale or [], target, antiquant_scale or [])
    for part in antiquant_offset or []:
        require(
            bool(antiquant_scale) and part.dtype == antiquant_scale[0].dtype, "antiquant_offset needs antiquant_scale"
        )
    require(not act_type or bool(per_token_scale), "act_type is for the per-token quantized form only", act_type)


def _dtype(output_dtype: int | torch.dtype | None) -> torch.dtype | None:
    return DTYPES.get(output_dtype, output_dtype) if isinstance(output_dtype, int) else output_dtype


def _check_rows(
    x: list[Tensor], weight: list[Tensor], groups: Tensor | list[int] | None, split: int | None, kind: int | None
) -> None:
    """group_type 0: the rows of x are grouped by a group_list tensor."""
    require(split in (2, 3), "with group_type 0 split_item must be 2 or 3", split)
    require(isinstance(groups, Tensor) or len(x) > 1, "with group_type 0 group_list must be a tensor", groups)
    require(kind in (0, 1), "group_list_type must be 0 (cumulative) or 1 (count)", kind)
    if isinstance(groups, Tensor):
        require_dtype("group_list", groups, (torch.int64,))
        require_rank("group_list", groups, 1)
        matrices = weight[0].shape[0] if len(weight) == 1 else len(weight)
        require(
            groups.shape[0] == matrices, f"group_list must have one entry per weight, {matrices}", list(groups.shape)
        )
        require(groups.shape[0] <= 1024, "there must be at most 1024 groups", groups.shape[0])
    if len(weight) == 1:
        require_rank("weight", weight[0], 3)
    for part in x:
        require_rank("x", part, 2)


def _check_lists(
    x: list[Tensor], weight: list[Tensor], groups: Tensor | list[int] | None, split: int | None, group_type: int | None
) -> None:
    """Lists of inputs (group_type -1), or group_list as a list of ints (no group_type)."""
    require(group_type in (None, -1), "group_type must be 0 (rows) or -1 (lists)", group_type)
    if group_type == -1:
        require(groups is None, "with group_type -1 group_list must be None", groups)
        require(split in (0, 1), "with group_type -1 split_item must be 0 or 1", split)
    require(not isinstance(groups, Tensor), "a group_list tensor needs group_type", group_type)
    require(len(x) in (1, len(weight)), "x must be one tensor or as many as weight", [len(x), len(weight)])
    if len(x) == 1 and len(weight) > 1:
        require(groups is not None, "one x for many weights needs group_list")
    if groups is not None:
        require(len(groups) == len(weight), f"group_list must have one entry per weight, {len(weight)}", groups)
        require(len(groups) > 1, "group_list must have more than one entry", groups)
        require(
            all(part.dim() == 2 for part in x), "with group_list x must have 2 dimensions", [list(p.shape) for p in x]
        )
    for part in weight:
        require_rank("weight", part, 2)


def _check_shapes(x: list[Tensor], weight: list[Tensor]) -> None:
    for index, w in enumerate(weight):
        part = x[index if len(x) > 1 else 0]
        require(2 <= part.dim() <= 6, "x must have 2 to 6 dimensions", list(part.shape))
        require(part.is_contiguous(), "x must not be transposed", part.stride())
        require(
            w.shape[-2] == part.shape[-1],
            "x's columns must be the weights' rows",
            [list(part.shape), list(w.shape)],
        )
        inner = w.shape[-1] if w.is_contiguous() else w.shape[-2]
        require(
            inner < _INNER and part.shape[-1] < _INNER,
            f"the innermost dimensions must be below {_INNER}",
            [list(part.shape), list(w.shape)],
        )


def _check_duo(
    x: list[Tensor],
    weight: list[Tensor],
    group_type: int | None,
    scale: Tensors,
    tokens: Tensors,
    antiquant: Tensors,
    act: int | None,
) -> None:
    require(
        group_type == 0 and len(x) == len(weight) == 1, "x and weight must be one tensor each, group_type 0", group_type
    )
    for name, part in (("x", x[0]), ("weight", weight[0])):
        require(part.dtype == torch.float16, f"{name} must be float16", part.dtype)
    require(weight[0].shape[-1] % 16 == 0, "the output's columns must be a multiple of 16", weight[0].shape[-1])
    refuse(scale=scale or None, per_token_scale=tokens or None, antiquant_scale=antiquant or None)
    require(act == 0, "act_type must be 0", act)


def _check_dtypes(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    tokens: list[Tensor],
    target: torch.dtype | None,
    antiquant: list[Tensor],
) -> None:
    columns, groups = weight[0].shape[-1], weight[0].shape[0] if weight[0].dim() == 3 else len(weight)
    if x.dtype == torch.int8:
        _check_int8(x, weight, scale, tokens, target or torch.int8, groups * columns)
        require(all(b.dtype == torch.int32 for b in bias), "bias must be int32", [b.dtype for b in bias])
        return
    require_dtype("x", x, HALF if antiquant else FLOATS)
    wanted = torch.int8 if antiquant else x.dtype
    require(all(w.dtype == wanted for w in weight), f"weight must be {wanted}", [w.dtype for w in weight])
    require(target in (None, x.dtype), f"output_dtype must be {x.dtype}", target)
    require(not scale and not tokens, "scale and per_token_scale are for an int8 x")
    require(
        all(s.dtype == x.dtype for s in antiquant), "antiquant_scale must have x's dtype", [s.dtype for s in antiquant]
    )
    require(
        all(s.shape[-1] == columns and s.numel() in (columns, groups * columns) for s in antiquant),
        "antiquant_scale must have one value per column (per group is not emulated)",
        [list(s.shape) for s in antiquant],
    )
    wanted = torch.float16 if x.dtype == torch.float16 else torch.float32
    require(all(b.dtype == wanted for b in bias), f"bias must be {wanted}", [b.dtype for b in bias])


def _check_int8(
    x: Tensor, weight: list[Tensor], scale: list[Tensor], tokens: list[Tensor], target: torch.dtype, values: int
) -> None:
    require(all(w.dtype == torch.int8 for w in weight), "weight must be int8", [w.dtype for w in weight])
    wanted = {torch.int32: None, torch.int8: torch.int64, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
    require(target in wanted, "output_dtype must be int8, bfloat16, float16 or int32", target)
    got = scale[0].dtype if scale else None
    require(got == wanted[target], f"for an output of {target} scale must be {wanted[target]}", got)
    require(not scale or sum(s.numel() for s in scale) == values, f"scale must have {values} values in all")
    if tokens:
        require(target in HALF, "per_token_scale is for outputs of bfloat16 and float16", target)
        require_dtype("per_token_scale", tokens[0], (torch.float32,))
        require_shape("per_token_scale", tokens[0], x.shape[0])


def _run(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    antiquant_scale: Tensors = None,
    antiquant_offset: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: Tensor | list[int] | None = None,
    split_item: int | None = 0,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | torch.dtype | None = None,
    **_: object,
) -> list[Tensor]:
    matrices = list(weight[0]) if weight[0].dim() == 3 else list(weight)
    if antiquant_scale:
        shifts = _per_group(antiquant_offset, len(matrices))
        scales = _per_group(antiquant_scale, len(matrices))
        matrices = [_widened(w, s, o) for w, s, o in zip(matrices, scales, shifts, strict=True)]
    out = _dtype(output_dtype) or x[0].dtype
    parts, tokens = _parts(x, len(matrices), group_list, group_list_type or 0, per_token_scale)
    extras = zip(matrices, _per_group(bias, len(matrices)), _per_group(scale, len(matrices)), strict=True)
    ys = [_product(part, *extra, t, act_type or 0, out) for part, t, extra in zip(parts, tokens, extras, strict=True)]
    if split_item in (0, 1):
        return ys
    y = torch.cat(ys)
    missing = sum(len(part) for part in x) - len(y)
    if missing:  # rows of no group: the op does not write them, nothing may read them
        undefined = float("nan") if out.is_floating_point else 99
        y = torch.cat((y, y.new_full((missing, y.shape[1]), undefined)))
    return [y]


def _parts(
    x: list[Tensor], groups: int, group_list: Tensor | list[int] | None, kind: int, tokens: Tensors
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The rows of each group, with their per-token scales."""
    if len(x) > 1 or groups == 1 and group_list is None:
        return list(x), [None] * len(x) if not tokens else list(tokens)
    values = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
    sizes = group_sizes(values, kind, len(x[0]))
    used = sum(sizes)
    spread = [None] * groups if not tokens else list(tokens[0][:used].split(sizes))
    return list(x[0][:used].split(sizes)), spread


def _per_group(given: Tensors, groups: int) -> list[Tensor | None]:
    if not given:
        return [None] * groups
    return list(given) if len(given) == groups else list(given[0].view(groups, -1))


def _widened(w: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    wide = w.float() if offset is None else w.float() + offset.float()
    return (wide * scale.float()).to(scale.dtype)


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


kernel("npu_grouped_matmul", _check)(_run)
kernel("npu_grouped_matmul.List", _check)(_run)
