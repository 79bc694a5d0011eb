"""npu_grouped_matmul_swiglu_quant, both forms: an expert's first product, its activation and the quantization after it.

Semantics and limits: the ops' docstrings in the torch_npu wheel, and for sizes and int4 weights the page of
aclnnGroupedMatmulSwigluQuantV2 beneath the second form; weights with scales by groups are documented and not emulated.
Weights must be in FRACTAL_NZ: the kernels read them so whatever their format is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator.formats import NAMES, format_of, is_nz
from emulator.kernels.grouped import group_sizes, product_by_halves
from emulator.kernels.int4 import columns_of, is_transposed, unpack_matrix
from emulator.kernels.matmul import int_product
from emulator.kernels.quant import dynamic_quantize, scale_of_param
from emulator.limits import refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel

_COLUMNS, _INNER, _INNER_INT4 = 10240, 65536, 20000


def _check(
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
    refuse(smooth_scale=smooth_scale, bias=bias, **others)
    one = len(weight) == len(weight_scale) == 1
    require(one, "weight and weight_scale must be lists of one tensor", [len(weight), len(weight_scale)])
    is_int4 = weight[0].dtype == torch.int32
    require_dtype("weight_scale", weight_scale[0], (torch.int64,) if is_int4 else (torch.float32,))
    _check_operands(x, weight[0], weight_scale[0], x_scale, group_list)
    require(x.shape[0] > 0, "x must not be empty", list(x.shape))
    require(columns_of(weight[0]) <= _COLUMNS, f"weight must have at most {_COLUMNS} columns", columns_of(weight[0]))
    most = _INNER_INT4 if is_int4 else _INNER
    require(x.shape[1] < most, f"x must have fewer than {most} columns", x.shape[1])
    if is_int4:
        require(len(weight_assist_matrix or []) == 1, "weight_assist_matrix must be given for an int4 weight")
        require_dtype("weight_assist_matrix", weight_assist_matrix[0], (torch.float32,))
        require_shape("weight_assist_matrix", weight_assist_matrix[0], *weight_scale[0].shape)
    else:
        refuse(weight_assist_matrix=weight_assist_matrix or None)
    require(dequant_mode == 0 and quant_mode == 0, "dequant_mode and quant_mode must be 0", [dequant_mode, quant_mode])
    require(group_list_type in (0, 1), "group_list_type must be 0 or 1", group_list_type)


def _check_first(
    x: Tensor, weight: Tensor, group_list: Tensor, weight_scale: Tensor, x_scale: Tensor, *, bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:  # fmt: skip
    refuse(bias=bias, offset=offset)
    require_dtype("weight", weight, (torch.int8,))
    require_dtype("weight_scale", weight_scale, (torch.float32, torch.float16, torch.bfloat16))
    _check_operands(x, weight, weight_scale, x_scale, group_list)


def _check_operands(x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, group_list: Tensor) -> None:
    require_dtype("x", x, (torch.int8,))
    require_rank("x", x, 2)
    require_dtype("weight", weight, (torch.int8, torch.int32))
    require_rank("weight", weight, 3)
    require(not is_transposed(weight), "weight must not be transposed", weight.stride())
    require(is_nz(weight), "weight must be in FRACTAL_NZ (npu_format_cast with 29)", NAMES[format_of(weight)])
    groups, rows, columns = *weight.shape[:2], columns_of(weight)
    fits = rows == x.shape[1] and columns % 2 == 0
    require(fits, "weight must have shape [groups, x's columns, an even number]", list(weight.shape))
    require_shape("weight_scale", weight_scale, groups, columns)
    require_dtype("x_scale", x_scale, (torch.float32,))
    require_shape("x_scale", x_scale, x.shape[0])
    require_dtype("group_list", group_list, (torch.int64,))
    require_shape("group_list", group_list, groups)


def _fused(
    x: Tensor, weight: Tensor, scale: Tensor, tokens: Tensor, sizes: list[int], assist: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`(quantized [m, n / 2], its scale [m])`; rows of no group are not written, what stands there is anything."""
    is_int4 = weight.dtype == torch.int32
    weight = unpack_matrix(weight) if is_int4 else weight
    half = weight.shape[2] // 2
    out, scales = torch.full((len(x), half), 99, dtype=torch.int8), torch.full((len(x),), float("nan"))
    start = 0
    for index, size in enumerate(sizes):
        part = slice(start, start + size)
        if size:
            if is_int4:
                wide = product_by_halves(x[part], weight[index], scale_of_param(scale[index])[0], assist[index])
            else:
                wide = int_product(x[part], weight[index]).float() * scale[index].float()
            wide = wide * tokens[part, None]
            out[part], scales[part] = dynamic_quantize(F.silu(wide[:, :half]) * wide[:, half:])
        start += size
    return out, scales


@kernel("npu_grouped_matmul_swiglu_quant_v2", _check)
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    weight_assist_matrix: list[Tensor] | None = None,
    group_list_type: int | None = 0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    sizes = group_sizes(group_list.tolist(), group_list_type or 0, len(x))
    assist = weight_assist_matrix[0] if weight_assist_matrix else None
    return _fused(x, weight[0], weight_scale[0], x_scale, sizes, assist)


@kernel("npu_grouped_matmul_swiglu_quant", _check_first)
def npu_grouped_matmul_swiglu_quant(
    x: Tensor, weight: Tensor, group_list: Tensor, weight_scale: Tensor, x_scale: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The first form: groups by running totals; the third output is reserved."""
    sizes = group_sizes(group_list.tolist(), 0, len(x))
    return *_fused(x, weight, weight_scale, x_scale, sizes), torch.full((), float("nan"))
