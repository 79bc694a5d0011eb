"""Quantized products and the product fused with an all-reduce.

Semantics and limits: the ops' docstrings in the torch_npu wheel. int8 and int4 products are exact. int8 by int4 and MX
quantization are documented and not emulated.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emulator import chips
from emulator.formats import NAMES, ND, format_of
from emulator.kernels.int4 import PER_WORD, columns_of, rows_of, unpack_int4, unpack_matrix
from emulator.kernels.quant import quantize, scale_of_param, trans_quant_param
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

# torch's numbers of the dtypes that an `int? output_dtype` may name.
DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def int_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of int8 tensors, exactly, in int32. Not by torch._int_mm: it saturates on a CPU without VNNI."""
    return (a.double() @ b.double()).to(torch.int32)


def _duo() -> bool:
    return chips.current().soc == "atlas_300i_duo"


def _check_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> None:
    refuse(x1_dtype=x1_dtype, x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype, scale_dtype=scale_dtype)
    refuse(group_sizes=group_sizes or None, y_scale=y_scale)
    packed = x1.dtype == torch.int32  # int4, eight to a word
    require_dtype("x1", x1, (torch.int8,) if _duo() else (torch.int8, torch.int32))
    require_dtype("x2", x2, (x1.dtype,))
    require_rank("x1", x1, 2, 6)
    require_rank("x2", x2, 2, 2 if packed else 6)
    require(x1.numel() > 0 and x2.numel() > 0, "x1 and x2 must not be empty", [list(x1.shape), list(x2.shape)])
    require(not packed or x1.is_contiguous(), "x1 of int4 must be contiguous", x1.stride())
    inner, columns = x1.shape[-1] * (PER_WORD if packed else 1), columns_of(x2)
    require(inner == rows_of(x2), "x1's columns must be x2's rows", [list(x1.shape), list(x2.shape)])
    require(max(inner, columns) <= 65535, "x1's and x2's columns must be at most 65535", [inner, columns])
    if _duo() and format_of(x2) != ND:
        require(
            x2.dim() == 2 and x2.t().is_contiguous(),
            "a weight in FRACTAL_NZ must have been transposed before the cast: pass `cast([n, k]).t()`",
        )
    require_dtype("scale", scale, (torch.float32, torch.int64, torch.bfloat16))
    require(
        scale.dim() == 1 and scale.shape[0] in (1, columns),
        f"scale must have shape [1] or [{columns}]",
        list(scale.shape),
    )
    out = DTYPES.get(output_dtype, output_dtype) if output_dtype is not None else torch.int8
    outs = (torch.int8, torch.float16) if _duo() else (torch.int8, torch.float16, torch.bfloat16, torch.int32)
    require(out in outs, f"output_dtype must be one of {', '.join(str(d).removeprefix('torch.') for d in outs)}", out)
    if packed:
        require(out == torch.float16, "for int4 operands output_dtype must be float16", out)
        refuse(pertoken_scale=pertoken_scale, offset=offset)
    _check_combination(x1, scale, offset, pertoken_scale, bias, out, columns)


def _check_combination(
    x1: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken: Tensor | None,
    bias: Tensor | None,
    out: torch.dtype,
    columns: int,
) -> None:
    """The table of dtype combinations: what goes with which output."""
    scales, biases, tokens = {
        torch.int8: ((torch.int64, torch.float32), (torch.int32,), False),
        torch.float16: ((torch.int64, torch.float32), (torch.int32,), False),
        torch.bfloat16: ((torch.float32, torch.bfloat16), (torch.int32, torch.bfloat16, torch.float32), True),
        torch.int32: ((torch.float32, torch.bfloat16), (torch.int32,), False),
    }[out]
    if out == torch.float16 and pertoken is not None:
        require(not _duo(), "pertoken_scale must be None")
        scales, biases, tokens = (torch.float32,), (torch.int32, torch.float16, torch.float32), True
    require(scale.dtype in scales, f"for an output of {out} scale must be {' or '.join(map(str, scales))}", scale.dtype)
    require(tokens or pertoken is None, f"for an output of {out} pertoken_scale must be None", pertoken)
    require(offset is None or out == torch.int8, "offset is for int8 outputs only", offset)
    require(
        bias is None or bias.dtype in biases,
        f"bias must be {' or '.join(map(str, biases))}",
        None if bias is None else bias.dtype,
    )
    if offset is not None:
        require_dtype("offset", offset, (torch.float32,))
        require(
            offset.dim() == 1 and offset.shape[0] in (1, columns),
            f"offset must have shape [1] or [{columns}]",
            list(offset.shape),
        )
    if pertoken is not None:
        require_dtype("pertoken_scale", pertoken, (torch.float32,))
        require_shape("pertoken_scale", pertoken, x1.shape[-2])
    if bias is not None:
        require(
            bias.shape[-1] == columns and bias.numel() % columns == 0, f"bias must end in {columns}", list(bias.shape)
        )


@kernel("npu_quant_matmul", _check_quant_matmul)
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **_: object,
) -> Tensor:
    if x1.dtype == torch.int32:
        x1, x2 = unpack_int4(x1), unpack_matrix(x2)
    product = int_product(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        product, bias = product + bias, None
    out = torch.int8 if output_dtype is None else DTYPES[output_dtype]
    if out == torch.int32:
        return product
    packed_offset = None
    if scale.dtype == torch.float32 and pertoken_scale is None and out in (torch.float16, torch.int8):
        scale = trans_quant_param(scale)  # as the op does by itself: 19 bits of the scale are left
    if scale.dtype == torch.int64:
        scale, packed_offset = scale_of_param(scale)
    if out == torch.int8:
        return quantize(product, scale, offset if offset is not None else packed_offset, False)
    y = product.float() * scale.float()
    if pertoken_scale is not None:
        y = y * pertoken_scale.unsqueeze(-1)
    return (y if bias is None else y + bias.float()).to(out)


def _check_all_reduce(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    **others: object,
) -> None:
    refuse(antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    refuse(comm_quant_scale_1=comm_quant_scale_1, comm_quant_scale_2=comm_quant_scale_2)
    refuse(**{name: value or None for name, value in others.items()})
    require(reduce_op == "sum", "reduce_op must be 'sum'", reduce_op)
    require(
        comm_turn == 0 and antiquant_group_size == 0,
        "comm_turn and antiquant_group_size must be 0",
        [comm_turn, antiquant_group_size],
    )
    require_rank("x1", x1, 2, 3)
    require_rank("x2", x2, 2)
    require(x1.numel() > 0 and x2.numel() > 0, "x1 and x2 must not be empty", [list(x1.shape), list(x2.shape)])
    require(x1.shape[-1] == x2.shape[0], "x1's last dimension must be x2's first", [list(x1.shape), list(x2.shape)])
    require(x1.is_contiguous(), "x1 must not be transposed", x1.stride())
    require_shape("x3", x3, *x1.shape[:-1], x2.shape[1])
    require_shape("bias", bias, x2.shape[1])
    _check_reduced_dtypes(x1, x2, bias, x3, dequant_scale, pertoken_scale)
    group = group_named(hcom)
    if group is not None:
        require(group.size() in (1, 2, 4, 8), "the group must have 1, 2, 4 or 8 ranks", group.size())
        _check_domain(hcom)


def _check_domain(hcom: str) -> None:
    """A model's fused communication passes through one domain only: here, all of a process while its world lasts."""
    world = dist.group.WORLD
    if not _domain or _domain[0]() is not world:
        _domain[:] = [weakref.ref(world), hcom]
    require(_domain[1] == hcom, f"a model's fused ops must share one communication domain, here {_domain[1]}", hcom)


_domain: list[Any] = []


def _check_reduced_dtypes(
    x1: Tensor, x2: Tensor, bias: Tensor | None, x3: Tensor | None, dequant: Tensor | None, pertoken: Tensor | None
) -> None:
    """Plain operands in one dtype, or int8 with what brings their product back."""
    if x1.dtype != torch.int8:
        require_dtype("x1", x1, HALF)
        require_same_dtype("x1", x1, x2=x2, bias=bias, x3=x3)
        refuse(dequant_scale=dequant, pertoken_scale=pertoken)
        return
    require_dtype("x2", x2, (torch.int8,))
    require(dequant is not None, "an int8 x1 needs dequant_scale")
    scales = (torch.int64, torch.bfloat16) if pertoken is None else (torch.float32, torch.bfloat16)
    require_dtype("dequant_scale", dequant, scales)
    columns = x2.shape[1]
    require(dequant.numel() in (1, columns), f"dequant_scale must have 1 or {columns} values", list(dequant.shape))
    require(bias is None or bias.dtype == torch.int32, "bias must be int32", bias)
    if pertoken is not None:
        require_dtype("pertoken_scale", pertoken, (torch.float32,))
        rows = x1[..., 0].numel()
        require(pertoken.numel() == rows, f"pertoken_scale must have {rows} values", list(pertoken.shape))


@kernel("npu_mm_all_reduce_base", _check_all_reduce)
def npu_mm_all_reduce_base(
    x1: Tensor,
    x2: Tensor,
    hcom: str,
    *,
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    **_: object,
) -> Tensor:
    if x1.dtype == torch.int8:
        out = torch.bfloat16 if dequant_scale.dtype != torch.int64 else torch.float16
        if dequant_scale.dtype == torch.float32:
            out = torch.float16
        scale = scale_of_param(dequant_scale)[0] if dequant_scale.dtype == torch.int64 else dequant_scale.float()
        y = int_product(x1.flatten(0, -2), x2)
        y = (y if bias is None else y + bias).float() * scale.view(1, -1)
        y = y if pertoken_scale is None else y * pertoken_scale.view(-1, 1)
        y = y.view(*x1.shape[:-1], -1).to(out)
    else:
        y = x1 @ x2 if bias is None else x1 @ x2 + bias
    group = group_named(hcom)
    if group is not None:
        dist.all_reduce(y, group=group)
    return y if x3 is None else y + x3


def group_named(hcom: str) -> "dist.ProcessGroup | None":
    """The process group of that name, as torch.distributed knows it; None where there is none (one rank)."""
    if not dist.is_initialized():
        return None
    try:
        return dist.distributed_c10d._resolve_process_group(hcom)
    except (LookupError, RuntimeError):
        return None


def _check_weight_quant(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> None:
    refuse(quant_scale=quant_scale, quant_offset=quant_offset, weight_dtype=weight_dtype)
    require(inner_precise == 0, "inner_precise must be 0 (1 is for int4 weights in FRACTAL_NZ)", inner_precise)
    require_dtype("x", x, HALF)
    require_dtype("weight", weight, (torch.int8,) if _duo() else (torch.int8, torch.int32))
    require_rank("x", x, 2)
    require_rank("weight", weight, 2)
    rows, columns = rows_of(weight), columns_of(weight)
    require(x.numel() > 0 and weight.numel() > 0, "x and weight must not be empty", [list(x.shape), list(weight.shape)])
    require(x.shape[1] == rows, "x's columns must be weight's rows", [list(x.shape), [rows, columns]])
    require(max(rows, columns) <= 65535, "weight's dimensions must be at most 65535", [rows, columns])
    require_same_dtype("x", x, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    if antiquant_group_size:
        require(not _duo(), "antiquant_group_size must be 0", antiquant_group_size)
        fits = antiquant_group_size % 32 == 0 and 32 <= antiquant_group_size <= rows - 1
        require(fits, f"antiquant_group_size must be a multiple of 32 below {rows}", antiquant_group_size)
        require_shape("antiquant_scale", antiquant_scale, -(-rows // antiquant_group_size), columns)
    else:
        shapes = ((1,), (1, 1), (columns,), (1, columns))
        require(
            tuple(antiquant_scale.shape) in shapes,
            f"antiquant_scale must have shape [1], [1, 1], [{columns}] or [1, {columns}]",
            list(antiquant_scale.shape),
        )
    require(
        antiquant_offset is None or antiquant_offset.shape == antiquant_scale.shape,
        "antiquant_offset must have antiquant_scale's shape",
    )
    if bias is not None:
        require_dtype("bias", bias, (torch.float16,) if x.dtype == torch.float16 else (torch.float32,))
        require(bias.numel() == columns, f"bias must have {columns} values", list(bias.shape))
    require(
        format_of(weight) == ND,
        "a weight in FRACTAL_NZ is for graph mode only: called by itself the op takes ND",
        NAMES[format_of(weight)],
    )


@kernel("npu_weight_quant_batchmatmul", _check_weight_quant)
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    **_: object,
) -> Tensor:
    wide = (unpack_matrix(weight) if weight.dtype == torch.int32 else weight).float()

    def spread(values: Tensor) -> Tensor:
        """By column, or by column of each group of rows."""
        values = values.float().reshape(-1, values.shape[-1])
        return values.repeat_interleave(antiquant_group_size, 0)[: len(wide)] if antiquant_group_size else values

    if antiquant_offset is not None:
        wide = wide + spread(antiquant_offset)
    wide = (wide * spread(antiquant_scale)).to(x.dtype)
    y = x.float() @ wide.float()
    return (y if bias is None else y + bias.float().view(1, -1)).to(x.dtype)
