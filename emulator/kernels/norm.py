"""RMS norms, alone and fused with the residual addition and with quantization.

Semantics and limits: the docstrings of the ops in the torch_npu wheel. Statistics are taken in fp32; the sum of an
add_rms_norm is rounded to the inputs' dtype before it is normalised.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.kernels.quant import dynamic_quantize, quantize
from emulator.limits import (
    FLOATS,
    HALF,
    refuse,
    require,
    require_dtype,
    require_rank,
    require_same_dtype,
    require_shape,
)
from emulator.registry import kernel


def normalised(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`(x / rms(x) * gamma in fp32, 1 / rms)` over the trailing dimensions that `gamma` has."""
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return wide * rstd * gamma.float(), rstd


def _check_gamma(x: Tensor, gamma: Tensor) -> None:
    require(
        tuple(gamma.shape) == tuple(x.shape[x.dim() - gamma.dim() :]),
        "gamma must have the trailing shape of x",
        list(gamma.shape),
    )
    require_same_dtype("x", x, gamma=gamma)


def _check_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    require_dtype("input", input, FLOATS)
    require_rank("input", input, 2, 8)
    _check_gamma(input, gamma)


@kernel("npu_rms_norm", _check_rms_norm)
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    y, rstd = normalised(input, gamma, epsilon)
    return y.to(input.dtype), rstd


def _check_add(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> None:
    require_dtype("x1", x1, FLOATS)
    require_rank("x1", x1, 1, 8)
    require_same_dtype("x1", x1, x2=x2)
    require_shape("x2", x2, *x1.shape)
    require(x1.numel() > 0, "empty tensors are not supported", list(x1.shape))
    _check_gamma(x1, gamma)


@kernel("npu_add_rms_norm", _check_add)
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    x = x1 + x2
    y, rstd = normalised(x, gamma, epsilon)
    if chips.current().soc == "atlas_300i_duo":
        rstd = torch.full_like(rstd, float("nan"))  # void there
    return y.to(x.dtype), rstd, x


def _check_add_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None = None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> None:
    _check_add(x1, x2, gamma)
    require_dtype("x1", x1, HALF)
    require(axis == -1, "axis must be -1", axis)
    require(dst_type in (None, 1), "dst_type must be torch.int8", dst_type)
    require_same_dtype("x1", x1, beta=beta)
    require_same_dtype("scales1", scales1, scales2=scales2)
    require_dtype("scales1", scales1, (torch.float32, torch.bfloat16))
    # The page of aclnnAddRmsNormQuant and the operator's definition: these pairs, the second beside bfloat16 x1 only.
    zero = torch.int32 if scales1.dtype == torch.float32 else torch.bfloat16
    require(
        scales1.dtype == torch.float32 or x1.dtype == torch.bfloat16, "bfloat16 scales need a bfloat16 x1", x1.dtype
    )
    if chips.current().soc == "atlas_300i_duo":
        require(gamma.numel() * gamma.element_size() >= 32, "gamma must have at least 32 bytes", list(gamma.shape))
    for name, x in (
        ("scales1", scales1),
        ("zero_points1", zero_points1),
        ("beta", beta),
        ("scales2", scales2),
        ("zero_points2", zero_points2),
    ):
        require_shape(name, x, *gamma.shape)
        if x is not None and name.startswith("zero"):
            require(x.dtype == zero, f"{name} must be {zero} beside scales of {scales1.dtype}", x.dtype)


@kernel("npu_add_rms_norm_quant", _check_add_quant)
def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None = None,
    beta: Tensor | None = None,
    scales2: Tensor | None = None,
    zero_points2: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x1 + x2
    y = normalised(x, gamma, epsilon)[0]
    if beta is not None:
        y = y + beta.float()
    y1 = quantize(y, scales1, zero_points1, div_mode)
    y2 = torch.zeros_like(y1) if scales2 is None else quantize(y, scales2, zero_points2, div_mode)
    return y1, y2, x


def _check_add_dynamic(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
) -> None:
    _check_add(x1, x2, gamma)
    require_dtype("x1", x1, HALF)
    require_rank("x1", x1, 2, 8)
    require_rank("gamma", gamma, 1)
    require(y_dtype in (None, 1), "y_dtype must be torch.int8 (int4 is not emulated)", y_dtype)
    for name, x in (("smooth_scale1", smooth_scale1), ("smooth_scale2", smooth_scale2), ("beta", beta)):
        require_shape(name, x, *gamma.shape)
        require_same_dtype("gamma", gamma, **{name: x})
    if output_mask:
        require(any(output_mask), "output_mask must not be all False", output_mask)
        for index, smooth in enumerate((smooth_scale1, smooth_scale2)):
            require(
                smooth is None or output_mask[index],
                f"output_mask[{index}] must be True where smooth_scale{index + 1} is given",
                output_mask,
            )
    else:
        require(smooth_scale2 is None or smooth_scale1 is not None, "smooth_scale2 needs smooth_scale1")


@kernel("npu_add_rms_norm_dynamic_quant", _check_add_dynamic)
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = x1 + x2
    y = normalised(x, gamma, epsilon)[0]
    if beta is not None:
        y = y + beta.float()
    first, second = output_mask or (True, smooth_scale2 is not None)
    nothing = x.new_zeros(0, dtype=torch.int8), x.new_zeros(0, dtype=torch.float32)
    y1, scale1 = dynamic_quantize(y, smooth_scale1) if first else nothing
    y2, scale2 = dynamic_quantize(y, smooth_scale2) if second else nothing
    return y1, y2, x, scale1, scale2


def _check_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float = 1e-6,
    *,
    dst_dtype: int | None = None,
) -> None:
    require_dtype("x", x, HALF)
    require_rank("x", x, 1, 8)
    columns = x.shape[-1]
    require(x.numel() > 0, "empty tensors are not supported", list(x.shape))
    require(columns * x.element_size() >= 32, "the last dimension must have at least 32 bytes", columns)
    for name, row in (("gamma", gamma), ("beta", beta)):
        require(
            tuple(row.shape) in ((columns,), (1, columns)),
            f"{name} must have shape [{columns}] or [1, {columns}]",
            list(row.shape),
        )
    refuse(dst_dtype=None if dst_dtype in (None, 1) else dst_dtype)
    require_dtype("offset", offset, (torch.int8,))
    require_same_dtype("x", x, gamma=gamma, beta=beta, scale=scale)
    require_shape("scale", scale, 1)
    require_shape("offset", offset, 1)


@kernel("npu_rms_norm_quant", _check_quant)
def npu_rms_norm_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float = 1e-6,
    *,
    dst_dtype: int | None = None,
) -> Tensor:
    y = normalised(x, gamma.view(-1), epsilon)[0] + beta.view(-1).float()
    return quantize(y, scale, offset, True)
