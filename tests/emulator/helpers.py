"""Shared by the tests of emulated ops: tensors, tolerances, paged caches, and the real meta kernels as a check."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = (BF16, FP16)


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    """Equal within two roundings of `got`'s dtype."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2 * eps * scale, atol=2 * eps * scale)


def like_meta(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `op`, and hold the shapes and dtypes of its results against torch_npu's own meta kernel."""
    move = lambda x: x.to("meta") if isinstance(x, Tensor) else x  # noqa: E731
    predicted = op(*tree_map(move, args), **tree_map(move, kwargs))
    got = op(*args, **kwargs)
    pairs = [(got, predicted)] if isinstance(got, Tensor) else list(zip(got, predicted, strict=True))
    for mine, theirs in pairs:
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    return got


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention by its formula in fp64: `[T, H, D]`, `[L, K, D] -> [T, H, D]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,lhd->htl", q.double(), k) * scale
    if causal:
        rows, columns = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1), float("-inf"))
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), v)


def blocks_of(lengths: list[int], block_size: int, seed: int = 0) -> tuple[Tensor, int]:
    """A block table `[B, most]` (int32) over shuffled blocks, and how many blocks there are."""
    needed = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed))
    table = torch.zeros(len(lengths), max(max(needed), 1), dtype=torch.int32)
    start = 0
    for row, n in enumerate(needed):
        table[row, :n] = order[start : start + n]
        start += n
    return table, sum(needed) + 3


def slots_of(table: Tensor, lengths: list[int], block_size: int) -> Tensor:
    """The slot of every token of every request, int64."""
    rows = [torch.arange(n) for n in lengths]
    return torch.cat([table[i, r // block_size].long() * block_size + r % block_size for i, r in enumerate(rows)])
