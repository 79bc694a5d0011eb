"""Storage formats of emulated tensors: which are FRACTAL_NZ, and what that layout looks like.

On a chip the format belongs to a tensor's storage, its logical shape stays; so it does here: logical contents are
kept plain, and a table remembers each storage's format. The layouts that are visible in a shape (the paged caches,
the masks of ATB) are laid out truly, by the functions below.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

ND = 2
NZ = 29
NAMES = {ND: "ND", NZ: "FRACTAL_NZ", 0: "NCHW", -1: "undefined"}
_formats: dict[int, tuple[StorageWeakRef, int]] = {}


def format_of(x: Tensor) -> int:
    """The acl format of `x`'s storage; ND unless it was cast."""
    found = _formats.get(x.untyped_storage()._cdata)
    return ND if found is None or found[0].expired() else found[1]


def is_nz(x: Tensor) -> bool:
    """Whether `x` is in FRACTAL_NZ; tensors without data are believed."""
    return x.is_meta or isinstance(x, FakeTensor) or format_of(x) == NZ


def set_format(x: Tensor, acl_format: int) -> Tensor:
    """Remember `acl_format` for `x`'s storage; gives `x`."""
    storage = x.untyped_storage()
    for key in [key for key, (ref, _) in _formats.items() if ref.expired()]:
        del _formats[key]
    _formats.pop(storage._cdata, None)
    if acl_format != ND:
        _formats[storage._cdata] = (StorageWeakRef(storage), acl_format)
    return x


def to_nz(x: Tensor) -> Tensor:
    """`[..., m, n] -> [..., ceil(n/16), ceil(m/16)*16, 16]`, zero-padded: columns in strips of 16 (int8: 32)."""
    width = 32 if x.dtype == torch.int8 else 16
    m, n = x.shape[-2:]
    rows, strips = -(-m // 16) * 16, -(-n // width)
    padded = x.new_zeros(*x.shape[:-2], rows, strips * width)
    padded[..., :m, :n] = x
    return padded.unflatten(-1, (strips, width)).transpose(-3, -2).contiguous()


def from_nz(x: Tensor, m: int, n: int) -> Tensor:
    """The inverse of `to_nz`: `[..., strips, rows, width] -> [..., m, n]`."""
    return x.transpose(-3, -2).flatten(-2)[..., :m, :n]


def cache_rows(cache: Tensor, heads: int) -> Tensor:
    """A PA_NZ cache `[blocks, K*D/w, block_size, w]` as plain `[blocks, block_size, K, D]` (a copy)."""
    return cache.permute(0, 2, 1, 3).flatten(2).unflatten(2, (heads, -1))
