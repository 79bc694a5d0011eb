"""300I DUO's products of half inputs by int8 weights, which quantize and dequantize by themselves: dense and grouped.

Sources: the pages of aclnnQuantMatmulDequant and aclnnQuantGroupedMatmulDequant, and the ops' meta kernels. Weights are
plain or in FRACTAL_NZ by their storage format; the shapes of four and five dimensions that the pages also name are not
emulated. m rows, k inputs, n outputs, g groups.
"""

import torch
from torch import Tensor

from emulator.kernels.grouped import group_sizes
from emulator.kernels.matmul import int_product
from emulator.kernels.quant import dynamic_quantize, quantize, scale_of_param
from emulator.limits import refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel

_ALIGNED = 16


def _check(
    x: Tensor,
    quantized_weight: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    quant_mode: str | None = "pertoken",
) -> None:
    _check_types(x, quantized_weight, weight_scale, x_scale, smooth_scale, quant_mode)
    refuse(bias=bias, x_offset=x_offset)
    require_rank("quantized_weight", quantized_weight, 2)
    require_shape("weight_scale", weight_scale, quantized_weight.shape[0])


def _check_grouped(
    x: Tensor, quantized_weight: Tensor, weight_scale: Tensor, group_list: Tensor, *, bias: Tensor | None = None,
    x_scale: Tensor | None = None, x_offset: Tensor | None = None, smooth_scale: Tensor | None = None,
    quant_mode: str | None = "pertoken",
) -> None:  # fmt: skip
    _check_types(x, quantized_weight, weight_scale, x_scale, smooth_scale, quant_mode)
    refuse(bias=bias, x_offset=x_offset)
    require_rank("quantized_weight", quantized_weight, 3)
    groups = quantized_weight.shape[0]
    require_shape("weight_scale", weight_scale, groups, quantized_weight.shape[1])
    require_dtype("group_list", group_list, (torch.int64,))
    require_shape("group_list", group_list, groups)


def _check_types(
    x: Tensor, weight: Tensor, scale: Tensor, x_scale: Tensor | None, smooth: Tensor | None, mode: str | None
) -> None:
    require_dtype("x", x, (torch.float16,))
    require_rank("x", x, 2)
    require(x.numel() > 0 and weight.numel() > 0, "x and quantized_weight must not be empty", list(x.shape))
    require_dtype("quantized_weight", weight, (torch.int8,))
    rows, columns = weight.shape[-2:]
    require(columns == x.shape[1], "quantized_weight must be [n, k], k the columns of x", list(weight.shape))
    require(
        rows % _ALIGNED == 0 and columns % _ALIGNED == 0, f"n and k must be multiples of {_ALIGNED}", [rows, columns]
    )
    require(mode in (None, "pertoken", "pertensor"), "quant_mode must be 'pertoken' or 'pertensor'", mode)
    require_dtype("weight_scale", scale, (torch.float32, torch.int64))
    if smooth is not None:
        require_dtype("smooth_scale", smooth, (torch.float16,))
        require_shape("smooth_scale", smooth, columns)
    if x_scale is None:
        require(mode != "pertensor", "without x_scale only quant_mode 'pertoken' is possible", mode)
        require(scale.dtype == torch.float32, "an int64 weight_scale needs a float16 x_scale", scale.dtype)
        return
    packed = scale.dtype == torch.int64
    require_dtype("x_scale", x_scale, (torch.float16,) if packed else (torch.float32,))
    require(not packed or mode == "pertensor", "an int64 weight_scale needs quant_mode 'pertensor'", mode)
    require_shape("x_scale", x_scale, 1 if mode == "pertensor" else x.shape[0])


def _quantized(x: Tensor, x_scale: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` as int8, and its scale by row or one for all."""
    if x_scale is None:
        return dynamic_quantize(x, smooth)
    wide = x.float() if smooth is None else x.float() * smooth.float()
    return quantize(wide, x_scale.view(-1, 1), None, True), x_scale.float()


def _product(x: Tensor, tokens: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x [m, k]` int8 by `weight [n, k]`; an int64 scale holds float32 bits and x's scale already."""
    y = int_product(x, weight.t()).float()
    if scale.dtype == torch.int64:
        return (y * scale_of_param(scale)[0]).half()
    return (y * scale * tokens.view(-1, 1)).half()


@kernel("npu_quant_matmul_dequant", _check)
def npu_quant_matmul_dequant(
    x: Tensor,
    quantized_weight: Tensor,
    weight_scale: Tensor,
    *,
    x_scale: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    **_: object,
) -> Tensor:
    return _product(*_quantized(x, x_scale, smooth_scale), quantized_weight, weight_scale)


@kernel("npu_quant_grouped_matmul_dequant", _check_grouped)
def npu_quant_grouped_matmul_dequant(
    x: Tensor,
    quantized_weight: Tensor,
    weight_scale: Tensor,
    group_list: Tensor,
    *,
    x_scale: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Groups by running totals; rows of no group are undefined."""
    rows, tokens = _quantized(x, x_scale, smooth_scale)
    tokens = tokens.expand(len(rows)) if tokens.numel() == 1 else tokens
    out = x.new_full((len(x), weight_scale.shape[1]), float("nan"))
    start = 0
    for index, size in enumerate(group_sizes(group_list.tolist(), 0, len(x))):
        part = slice(start, start + size)
        if size:
            out[part] = _product(rows[part], tokens[part], quantized_weight[index], weight_scale[index])
        start += size
    return out
