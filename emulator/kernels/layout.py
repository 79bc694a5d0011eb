"""Storage formats: npu_format_cast, empty_with_format, get_npu_format. Contents stay, the format is remembered."""

import torch
from torch import Tensor

from emulator.formats import NAMES, ND, NZ, format_of, set_format
from emulator.limits import refuse, require, require_dtype
from emulator.registry import kernel

_NZ_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.uint8)


def _check_format(x: Tensor, acl_format: int) -> None:
    require(acl_format in (ND, NZ), "acl_format must be 2 (ND) or 29 (FRACTAL_NZ)", NAMES.get(acl_format, acl_format))
    if acl_format == NZ:
        require(x.dim() >= 2, "FRACTAL_NZ needs 2 dimensions or more", list(x.shape))
        require_dtype("the tensor in FRACTAL_NZ", x, _NZ_DTYPES)


def _check_cast(
    input: Tensor, acl_format: int, customize_dtype: int | None = None, input_dtype: int | None = None
) -> None:
    refuse(customize_dtype=customize_dtype, input_dtype=input_dtype)
    _check_format(input, acl_format)


def _cast(input: Tensor, acl_format: int) -> Tensor:
    if format_of(input) == acl_format:
        return input
    return set_format(input.clone(memory_format=torch.contiguous_format), acl_format)


def _meta_cast(
    input: Tensor, acl_format: int, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return set_format(torch.empty_like(input, memory_format=torch.contiguous_format), acl_format)


@kernel("npu_format_cast", _check_cast, _meta_cast)
def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return _cast(input, acl_format)


@kernel("npu_format_cast_.acl_format", _check_cast, lambda input, acl_format, **_: input)
def npu_format_cast_(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return set_format(input, acl_format)


@kernel("get_npu_format")
def get_npu_format(self: Tensor) -> int:
    return format_of(self)


def _empty_with_format(
    size: list[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    acl_format: int = ND,
    base_addr_aligned_kb: int | None = None,
) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@kernel("empty_with_format", meta=_empty_with_format)
def empty_with_format(size: list[int], *, acl_format: int = ND, **options: object) -> Tensor:
    options.pop("base_addr_aligned_kb", None)
    x = torch.empty(size, **options)  # type: ignore[arg-type]
    _check_format(x, acl_format)
    return set_format(x, acl_format)
