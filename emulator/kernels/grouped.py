"""npu_grouped_matmul: one product per expert, over rows that routing has sorted or over lists of inputs.

Semantics and limits: the op's docstring in the torch_npu wheel: plain, per-channel and per-token quantized, and int8
weights with scales per channel, int4 ones also per group; group_list as a tensor or as a list. int8 rows by int4
weights: the page of aclnnGroupedMatmulV4 beneath it, symmetric; scales by groups of 256 rows, or one group as in public
serving code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator import chips
from emulator.kernels.int4 import PER_WORD, columns_of, is_transposed, rows_of, unpack_matrix
from emulator.kernels.matmul import DTYPES, int_product
from emulator.kernels.quant import quantize, scale_of_param
from emulator.limits import FLOATS, HALF, refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel

_INNER = 65536
_GROUP_INT4, _INNER_INT4 = 256, 18432
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
    split_item, group_list_type, act_type = split_item or 0, group_list_type or 0, act_type or 0  # None is 0
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
    if x[0].dtype == torch.int8 and weight[0].dtype == torch.int32:
        _check_int8_by_int4(x, weight, bias, scale, per_token_scale, group_list, group_list_type, target)
        require(act_type == 0, "act_type must be 0 for an int4 weight", act_type)
        refuse(antiquant_scale=antiquant_scale or None, antiquant_offset=antiquant_offset or None)
        return
    _check_dtypes(x, weight, bias or [], scale or [], per_token_scale or [], target, antiquant_scale or [])
    for part, of in zip(antiquant_offset or [], antiquant_scale or [None] * 128, strict=False):
        fits = of is not None and (part.dtype, part.shape) == (of.dtype, of.shape)
        require(fits, "antiquant_offset must be as its antiquant_scale", list(part.shape))
    require(not act_type or bool(per_token_scale), "act_type is for the per-token quantized form only", act_type)


def _dtype(output_dtype: int | torch.dtype | None) -> torch.dtype | None:
    return DTYPES.get(output_dtype, output_dtype) if isinstance(output_dtype, int) else output_dtype


def _check_rows(
    x: list[Tensor], weight: list[Tensor], groups: Tensor | list[int] | None, split: int, kind: int
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
        require(
            kind == 0 or groups.shape[0] > 1,
            "with group_list_type 1 group_list must have more than one entry (a single count is its own running total)",
            list(groups.shape),
        )
    if len(weight) == 1:
        require_rank("weight", weight[0], 3)
    for part in x:
        require_rank("x", part, 2)


def _check_lists(
    x: list[Tensor], weight: list[Tensor], groups: Tensor | list[int] | None, split: int, group_type: int | None
) -> None:
    """Lists of inputs (group_type -1), or group_list as a list of ints (no group_type)."""
    require(group_type in (None, -1), "group_type must be 0 (rows) or -1 (lists)", group_type)
    require(group_type is not None or groups is not None, "group_type is needed where there is no group_list")
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
            rows_of(w) == part.shape[-1],
            "x's columns must be the weights' rows",
            [list(part.shape), list(w.shape)],
        )
        inner = columns_of(w) if w.is_contiguous() else rows_of(w)
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
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
    scale: list[Tensor],
    tokens: list[Tensor],
    target: torch.dtype | None,
    antiquant: list[Tensor],
) -> None:
    """Which types go together; what belongs to a weight is held against that weight."""
    first = x[0].dtype
    require(all(part.dtype == first for part in x), f"x must be {first} throughout", [part.dtype for part in x])
    for name, parts in (("bias", bias), ("scale", scale), ("antiquant_scale", antiquant)):
        require(
            len(parts) in (0, len(weight)), f"{name} must have one tensor for each weight, {len(weight)}", len(parts)
        )
    require(len(tokens) in (0, len(x)), f"per_token_scale must have one tensor for each x, {len(x)}", len(tokens))
    if first == torch.int8:
        _check_int8(x, weight, scale, tokens, target or torch.int8)
        require(all(b.dtype == torch.int32 for b in bias), "bias must be int32", [b.dtype for b in bias])
    else:
        require_dtype("x", x[0], HALF if antiquant else FLOATS)
        wanted = (torch.int8, torch.int32) if antiquant else (first,)
        require(all(w.dtype in wanted for w in weight), f"weight must be {wanted[0]}", [w.dtype for w in weight])
        require(target in (None, first), f"output_dtype must be {first}", target)
        require(not scale and not tokens, "scale and per_token_scale are for an int8 x")
        for s, w in zip(antiquant, weight, strict=False):
            _check_antiquant(s, w, first)
        kind = torch.float16 if first == torch.float16 else torch.float32
        require(all(b.dtype == kind for b in bias), f"bias must be {kind}", [b.dtype for b in bias])
    for b, w in zip(bias, weight, strict=False):
        _require_per_column("bias", b, w)


def _require_per_column(name: str, values: Tensor, w: Tensor) -> None:
    """`[n]` for a weight `[k, n]`, `[g, n]` for `[g, k, n]`."""
    shape = (*w.shape[:-2], columns_of(w))
    require(tuple(values.shape) == shape, f"{name} must have shape {list(shape)} for its weight", list(values.shape))


def _check_antiquant(scale: Tensor, w: Tensor, dtype: torch.dtype) -> None:
    """One value per column; for int4 also one per column of each group of rows."""
    require(scale.dtype == dtype, "antiquant_scale must have x's dtype", scale.dtype)
    if w.dtype == torch.int32 and scale.dim() == w.dim():
        groups, rows = scale.shape[-2], rows_of(w)
        fits = (*scale.shape[:-2], scale.shape[-1]) == (*w.shape[:-2], columns_of(w))
        require(fits and rows % groups == 0, "antiquant_scale must have groups that divide the rows", list(scale.shape))
        return
    _require_per_column("antiquant_scale", scale, w)


def _check_int8(
    x: list[Tensor], weight: list[Tensor], scale: list[Tensor], tokens: list[Tensor], target: torch.dtype
) -> None:
    require(all(w.dtype == torch.int8 for w in weight), "weight must be int8", [w.dtype for w in weight])
    wanted = {torch.int32: None, torch.int8: torch.int64, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
    require(target in wanted, "output_dtype must be int8, bfloat16, float16 or int32", target)
    for got in [s.dtype for s in scale] or [None]:
        require(got == wanted[target], f"for an output of {target} scale must be {wanted[target]}", got)
    for s, w in zip(scale, weight, strict=False):
        _require_per_column("scale", s, w)
    for t, part in zip(tokens, x, strict=False):
        require(target in HALF, "per_token_scale is for outputs of bfloat16 and float16", target)
        require_dtype("per_token_scale", t, (torch.float32,))
        require_shape("per_token_scale", t, part.shape[0])


def _check_int8_by_int4(
    x: list[Tensor],
    weight: list[Tensor],
    bias: Tensors,
    scale: Tensors,
    tokens: Tensors,
    group_list: Tensor | list[int] | None,
    kind: int,
    target: torch.dtype | None,
) -> None:
    one = len(x) == len(weight) == len(bias or []) == len(scale or []) == len(tokens or []) == 1
    require(one, "x, weight, bias, scale and per_token_scale must be one tensor each for an int4 weight")
    w, rows = weight[0], x[0].shape[1]
    require_rank("weight", w, 3)
    require(not is_transposed(w), "an int4 weight must not be transposed", w.stride())
    require(target in HALF, "output_dtype must be bfloat16 or float16 for an int4 weight", target)
    require(rows % _GROUP_INT4 == 0, f"x's columns must be a multiple of {_GROUP_INT4} for an int4 weight", rows)
    require(rows <= _INNER_INT4, f"x must have at most {_INNER_INT4} columns for an int4 weight", rows)
    require(columns_of(w) % PER_WORD == 0, f"the output's columns must be a multiple of {PER_WORD}", columns_of(w))
    require_dtype("scale", scale[0], (torch.int64,))
    shapes = [(len(w), groups, columns_of(w)) for groups in (1, rows // _GROUP_INT4)]
    require(tuple(scale[0].shape) in shapes, f"scale must have shape {list(shapes[0])}", list(scale[0].shape))
    require_dtype("bias", bias[0], (torch.float32,))
    require_shape("bias", bias[0], len(w), columns_of(w))
    require_dtype("per_token_scale", tokens[0], (torch.float32,))
    require_shape("per_token_scale", tokens[0], x[0].shape[0])
    single = isinstance(group_list, Tensor) and len(group_list) == 1
    require(kind == 1 or single, "group_list_type must be 1 (counts) for an int4 weight: it is not looked at", kind)


def product_by_halves(x: Tensor, w: Tensor, scale: Tensor, assist: Tensor) -> Tensor:
    """`x [m, k]` int8 by `w [k, n]` of int4, fp32: the high and the low four bits of x apart, the low ones less 8.

    `scale [n]`, or `[g, n]` by equal groups of rows; `assist [n]` is `8 * sum(w) * scale`, which makes up for the 8.
    """
    scale = scale.view(-1, w.shape[1])
    high, low = x.int().div(16, rounding_mode="floor"), (x.int() & 0xF) - 8
    wide = torch.zeros(len(x), w.shape[1])
    for index, rows in enumerate(torch.arange(len(w)).chunk(len(scale))):
        parts = (int_product(half[:, rows].to(torch.int8), w[rows]).float() for half in (high, low))
        wide += (next(parts) * 16 + next(parts)) * scale[index]
    return wide + assist


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
    plain = [unpack_matrix(w) if w.dtype == torch.int32 else w for w in weight]
    matrices = list(plain[0]) if plain[0].dim() == 3 else plain
    if antiquant_scale:
        shifts = _per_group(antiquant_offset, len(matrices))
        scales = _per_group(antiquant_scale, len(matrices))
        matrices = [_widened(w, s, o) for w, s, o in zip(matrices, scales, shifts, strict=True)]
    out = _dtype(output_dtype) or x[0].dtype
    parts, tokens = _parts(x, len(matrices), group_list, group_list_type or 0, per_token_scale)
    extras = zip(matrices, _per_group(bias, len(matrices)), _per_group(scale, len(matrices)), strict=True)
    is_int4 = x[0].dtype == torch.int8 and weight[0].dtype == torch.int32
    ys = [
        _product(part, *extra, t, act_type or 0, out, is_int4)
        for part, t, extra in zip(parts, tokens, extras, strict=True)
    ]
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
    """What belongs to each group: a tensor of a list, or a part of the one tensor."""
    if not given:
        return [None] * groups
    return list(given) if len(given) == groups > 1 or given[0].dim() == 1 else list(given[0])


def _widened(w: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`(w + offset) * scale`, by columns or by columns of equal groups of rows."""
    scale, offset = (
        x if x is None or x.dim() == 1 else x.repeat_interleave(len(w) // len(x), 0) for x in (scale, offset)
    )
    wide = w.float() if offset is None else w.float() + offset.float()
    return (wide * scale.float()).to(scale.dtype)


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, scale: Tensor | None, tokens: Tensor | None, act: int, out: torch.dtype,
    is_int4: bool,
) -> Tensor:  # fmt: skip
    if is_int4:
        wide = product_by_halves(x, w, scale_of_param(scale)[0], bias)
        return (wide * tokens.unsqueeze(-1)).to(out)
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
