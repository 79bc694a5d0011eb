"""Quantization of activations and of scales: npu_quantize, npu_dynamic_quant, npu_trans_quant_param.

Semantics and limits: the docstrings of the ops in the torch_npu wheel. Rounding is to nearest, ties to even.
An int4 output (torch.quint4x2) is 8 values to an int32, the first in the lowest bits.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.limits import (
    HALF,
    refuse,
    require,
    require_dtype,
    require_rank,
    require_same_dtype,
    require_shape,
)
from emulator.registry import kernel

INT8_MAX, INT4_MAX = 127.0, 7.0
_INT8, _UINT8, _INT32, _QINT8, _QUINT8, _QINT32, _INT4 = 1, 0, 3, 12, 13, 14, 16
_OUTPUT = {
    _INT8: torch.int8,
    _QINT8: torch.int8,
    _UINT8: torch.uint8,
    _QUINT8: torch.uint8,
    _INT32: torch.int32,
    _QINT32: torch.int32,
}


def quantize(x: Tensor, scale: Tensor, offset: Tensor | None, divide: bool, dtype: torch.dtype = torch.int8) -> Tensor:
    """`round(x / scale + offset)` (or `x * scale`), saturated to `dtype`."""
    y = x.float() / scale.float() if divide else x.float() * scale.float()
    if offset is not None:
        y = y + offset.float()
    info = torch.iinfo(dtype)
    return y.round().double().clamp(info.min, info.max).to(dtype)


def dynamic_quantize(x: Tensor, smooth: Tensor | None = None, most: float = INT8_MAX) -> tuple[Tensor, Tensor]:
    """Symmetric by row: `(round(x * smooth / scale), scale = rowmax|x * smooth| / most)`; a row of 0 stays 0."""
    wide = x.float() if smooth is None else x.float() * smooth.float()
    scale = wide.abs().amax(dim=-1) / most
    y = wide / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)
    return y.round().clamp(-most - 1, most).to(torch.int8), scale


def pack_int4(x: Tensor) -> Tensor:
    """int4 values `[..., n]` of any integer dtype as int32 `[..., n / 8]`, the first value in the lowest bits."""
    nibbles = (x.to(torch.int64) & 0xF).unflatten(-1, (-1, 8))
    packed = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _check_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> None:
    require_dtype("input", input, (torch.float32, *HALF))
    if div_mode:
        require(dtype in _OUTPUT, "dtype must be torch.qint8, torch.quint8, torch.int32 or their plain forms", dtype)
        require_dtype("scales", scales, (torch.float32, torch.bfloat16))
        if zero_points is not None:
            require_dtype("zero_points", zero_points, (torch.int8, torch.uint8, torch.int32, torch.bfloat16))
    else:
        kinds = (_INT8, _QINT8, _INT4)
        require(dtype in kinds, "with div_mode=False dtype must be torch.qint8 or torch.quint4x2", dtype)
        require(dtype != _INT4 or input.shape[-1] % 8 == 0, "for int4 the last dimension must be a multiple of 8")
        if chips.current().soc == "atlas_300i_duo":
            require(dtype != _INT4 and axis != -2, "int4 and axis=-2 are not available", [dtype, axis])
        require_dtype("scales", scales, (torch.float32, *HALF))
        require_same_dtype("scales", scales, zero_points=zero_points)
        require_shape("zero_points", zero_points, *scales.shape)
        require(-2 <= axis < input.dim(), f"axis must be in [-2, {input.dim()})", axis)
    along = input.shape[_quantize_axis(input, axis, div_mode)]
    if scales.dim() == 1:
        require(
            scales.shape[0] in (1, along),
            f"scales must have 1 or {along} elements (axis {axis} of input)",
            list(scales.shape),
        )
    else:
        require(scales.dim() == input.dim(), "scales must have 1 dimension or as many as input", list(scales.shape))


def _quantize_axis(input: Tensor, axis: int, div_mode: bool) -> int:
    if div_mode:
        return axis % input.dim()
    return input.dim() - 2 if axis == -2 else input.dim() - 1


@kernel("npu_quantize", _check_quantize)
def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    def spread(x: Tensor | None) -> Tensor | None:
        if x is None or x.dim() != 1 or x.shape[0] == 1:
            return x
        shape = [1] * input.dim()
        shape[_quantize_axis(input, axis, div_mode)] = -1
        return x.view(shape)

    if dtype == _INT4:
        y = quantize(input, spread(scales), spread(zero_points), div_mode)
        return pack_int4(y.clamp(-INT4_MAX - 1, INT4_MAX))
    return quantize(input, spread(scales), spread(zero_points), div_mode, _OUTPUT[dtype])


def _check_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> None:
    require_dtype("input", input, HALF)
    require(input.dim() > 1, "input must have more than 1 dimension", list(input.shape))
    require(dst_type in (None, _INT8, _INT4), "dst_type must be torch.int8 or torch.quint4x2", dst_type)
    require(dst_type != _INT4 or input.shape[-1] % 8 == 0, "for int4 the last dimension must be a multiple of 8")
    require(quant_mode == "pertoken", "quant_mode must be 'pertoken' (others are not emulated)", quant_mode)
    require(dst_type_max == 0.0, "dst_type_max must be 0", dst_type_max)
    require_same_dtype("input", input, smooth_scales=smooth_scales)
    if smooth_scales is None:
        refuse(group_index=group_index)
    elif group_index is None:
        require_shape("smooth_scales", smooth_scales, input.shape[-1])
    else:
        require_dtype("group_index", group_index, (torch.int32,))
        require_rank("group_index", group_index, 1)
        require_shape("smooth_scales", smooth_scales, group_index.shape[0], input.shape[-1])


@kernel("npu_dynamic_quant", _check_dynamic_quant)
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    smooth = smooth_scales if group_index is None else _smooth_by_row(input, smooth_scales, group_index)
    if dst_type == _INT4:
        y, scale = dynamic_quantize(input, smooth, INT4_MAX)
        return pack_int4(y), scale
    return dynamic_quantize(input, smooth)


def _smooth_by_row(input: Tensor, smooth_scales: Tensor, group_index: Tensor) -> Tensor:
    """Each row's smoothing vector, from the cumulative row counts of the groups."""
    rows, ends = input.flatten(0, -2).shape[0], group_index.tolist()
    rising = all(a <= b for a, b in zip(ends, ends[1:], strict=False))
    require(rising, "group_index must be cumulative (not decreasing)", ends)
    require(bool(ends) and ends[-1] == rows, f"group_index must end at the number of rows, {rows}", ends)
    counts = torch.tensor(ends) - torch.tensor([0, *ends[:-1]])
    return smooth_scales.repeat_interleave(counts, 0).view(input.shape)


def _check_trans(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> None:
    require(
        scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1),
        "scale must have shape [t] or [1, n]",
        list(scale.shape),
    )
    require_dtype("scale", scale, (torch.float32,))
    require(scale.numel() > 0, "scale must not be empty", list(scale.shape))
    require(round_mode in (0, 1), "round_mode must be 0 or 1", round_mode)
    if offset is not None:
        require_dtype("offset", offset, (torch.float32,))
        require(offset.dim() == scale.dim(), "offset must have as many dimensions as scale", list(offset.shape))


@kernel("npu_trans_quant_param", _check_trans)
def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """Bits 13-31: the upper 19 bits of the fp32 scale; bits 37-45: the offset in 9 bits; bit 46 is set."""
    bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:  # to the nearest of the 19 bits, ties to even
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    packed = (bits & 0xFFFFE000) | (1 << 46)
    if offset is not None:
        steps = offset.round().clamp(-256, 255).to(torch.int64) & 0x1FF
        packed, steps = torch.broadcast_tensors(packed, steps)
        packed = packed | (steps << 37)
    return packed


def scale_of_param(param: Tensor) -> tuple[Tensor, Tensor]:
    """What npu_trans_quant_param packed into an int64 tensor: `(scale, offset)` in fp32."""
    bits = (param & 0xFFFFFFFF).to(torch.int64)
    scale = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    steps = (param >> 37) & 0x1FF
    return scale, torch.where(steps >= 256, steps - 512, steps).float()
