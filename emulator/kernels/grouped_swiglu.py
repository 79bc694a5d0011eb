"""npu_grouped_matmul_swiglu_quant_v2: an expert's first product, its activation and the quantization after it.

Semantics and limits: the op's docstring in the torch_npu wheel, W8A8; int4 weights are documented and not emulated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator.kernels.grouped import group_sizes
from emulator.kernels.matmul import int_product
from emulator.kernels.quant import dynamic_quantize
from emulator.limits import refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel


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
    refuse(smooth_scale=smooth_scale, weight_assist_matrix=weight_assist_matrix or None, bias=bias, **others)
    require_dtype("x", x, (torch.int8,))
    require_rank("x", x, 2)
    one = len(weight) == len(weight_scale) == 1
    require(one, "weight and weight_scale must be lists of one tensor", [len(weight), len(weight_scale)])
    require_dtype("weight", weight[0], (torch.int8,))
    require_rank("weight", weight[0], 3)
    groups, rows, columns = weight[0].shape
    fits = rows == x.shape[1] and columns % 2 == 0
    require(fits, "weight must have shape [groups, x's columns, an even number]", list(weight[0].shape))
    require_dtype("weight_scale", weight_scale[0], (torch.float32,))
    require_shape("weight_scale", weight_scale[0], groups, columns)
    require_dtype("x_scale", x_scale, (torch.float32,))
    require_shape("x_scale", x_scale, x.shape[0])
    require_dtype("group_list", group_list, (torch.int64,))
    require_shape("group_list", group_list, groups)
    require(dequant_mode == 0 and quant_mode == 0, "dequant_mode and quant_mode must be 0", [dequant_mode, quant_mode])
    require(group_list_type in (0, 1), "group_list_type must be 0 or 1", group_list_type)


@kernel("npu_grouped_matmul_swiglu_quant_v2", _check)
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
    # Rows of no group are not written: what stands there is as good as anything.
    out, scales = torch.full((len(x), half), 99, dtype=torch.int8), torch.full((len(x),), float("nan"))
    start = 0
    for index, size in enumerate(group_sizes(group_list.tolist(), group_list_type or 0, len(x))):
        mine = slice(start, start + size)
        wide = int_product(x[mine], weight[0][index]).float() * weight_scale[0][index] * x_scale[mine, None]
        if size:
            out[mine], scales[mine] = dynamic_quantize(F.silu(wide[:, :half]) * wide[:, half:])
        start += size
    return out, scales
