"""Rotary embeddings: npu_apply_rotary_pos_emb (query and key at once) and npu_rotary_mul.

Semantics and limits: the docstrings of the ops in the torch_npu wheel.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.limits import FLOATS, require, require_dtype, require_rank, require_same_dtype, require_shape
from emulator.registry import kernel

_ROTARY_BROADCASTS = {
    "half": ((1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0)),
    "interleave": ((1, 1, 0), (1, 0, 1), (0, 1, 1)),
}


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """`x * cos + rotated(x) * sin` in fp32, in `x`'s dtype; halves rotate, or neighbours with `interleave`."""
    wide = x.float()
    if interleave:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def _check_apply(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> None:
    require_dtype("query", query, FLOATS)
    require_same_dtype("query", query, key=key, cos=cos, sin=sin)
    require(layout in ("BSND", "TND"), "layout must be 'BSND' or 'TND'", layout)
    require(rotary_mode == "half", "rotary_mode must be 'half'", rotary_mode)
    rank = 4 if layout == "BSND" else 3
    for name, x in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_rank(name, x, rank)
        require(x.numel() > 0, f"{name} must not be empty", list(x.shape))
        require(x.shape[-1] in (64, 128), f"{name}'s last dimension must be 64 or 128", list(x.shape))
    lead, dim = query.shape[: rank - 2], query.shape[-1]
    require_shape("key", key, *lead, key.shape[-2], dim)
    require_shape("cos", cos, *lead, 1, cos.shape[-1])
    require_shape("sin", sin, *cos.shape)
    require(cos.shape[-1] == dim, f"cos and sin must have query's head dim, {dim}", list(cos.shape))


@kernel("npu_apply_rotary_pos_emb", _check_apply)
def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Documented to work in place: the inputs are overwritten too, so that a caller who reads them again sees it."""
    q_out, k_out = rotated(query, cos, sin), rotated(key, cos, sin)
    query.copy_(q_out)
    key.copy_(k_out)
    return q_out, k_out


def _check_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> None:
    require_dtype("input", input, FLOATS)
    require_same_dtype("input", input, r1=r1, r2=r2)
    require(rotary_mode in _ROTARY_BROADCASTS, "rotary_mode must be 'half' or 'interleave'", rotary_mode)
    for name, x in (("input", input), ("r1", r1), ("r2", r2)):
        require_rank(name, x, 4)
    require_shape("r2", r2, *r1.shape)
    dim = input.shape[-1]
    require(dim % 2 == 0 and dim < 896, "the head dim must be even and below 896", dim)
    require(r1.shape[-1] == dim, f"r1 and r2 must have input's head dim, {dim}", list(r1.shape))
    fits = any(
        all(r == (1 if one else n) for r, n, one in zip(r1.shape, input.shape, pattern, strict=False))
        for pattern in _ROTARY_BROADCASTS[rotary_mode]
    )
    require(
        fits,
        f"r1 must broadcast over input {list(input.shape)} in a documented way (11SD, 1S1D, S11D, ...)",
        list(r1.shape),
    )
    if chips.current().soc == "atlas_300i_duo":
        require(rotary_mode == "half", "rotary_mode must be 'half'", rotary_mode)
        require(dim == 128, "the head dim must be 128", dim)
    if rotate is not None:
        require_shape("rotate", rotate, dim, dim)


@kernel("npu_rotary_mul", _check_rotary_mul)
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    if rotate is not None:
        turned = input.float() @ rotate.float()
        return (input.float() * r1.float() + turned * r2.float()).to(input.dtype)
    return rotated(input, r1, r2, rotary_mode == "interleave")
