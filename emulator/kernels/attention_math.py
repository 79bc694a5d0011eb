"""Attention in plain arithmetic, shared by the fused ops: one request at a time, in fp32.

Not a kernel itself. T query tokens, L keys, H query heads, K key/value heads, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from emulator.limits import require


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """`softmax(q k^T * scale + shift) v`: `q [T, H, D]`, `k [L, K, D]`, `v [L, K, Dv] -> [T, H, Dv]` in fp32.

    `hidden [T, L]` is True where a key is not seen, `shift [H, T, L]` is fp32. A row that sees nothing gives zeros,
    and so does an empty `k`.
    """
    if not len(q) or not len(k):
        return q.new_zeros(*q.shape[:2], v.shape[-1], dtype=torch.float32)
    q, k, v = (x.float().transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    bias = None if hidden is None else ~hidden
    if shift is not None:
        bias = shift if hidden is None else shift.masked_fill(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if hidden is not None:
        out = out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return out[0].transpose(0, 1)


def log_sum_exp(
    q: Tensor, k: Tensor, scale: float, hidden: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """`log(sum(exp(q k^T * scale + shift)))` per query and head, `[T, H]` in fp32; +inf where nothing is seen."""
    if not len(k):
        return q.new_full(q.shape[:2], float("inf"), dtype=torch.float32)
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("thd,lhd->htl", q.float(), keys) * scale
    if shift is not None:
        scores = scores + shift
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    sums = scores.logsumexp(-1).transpose(0, 1)
    return sums.masked_fill(sums == float("-inf"), float("inf"))


def causal(q_len: int, kv_len: int) -> Tensor | None:
    """Hidden keys when the last query sees all of them; None where nothing is hidden."""
    if q_len <= 1:
        return None
    return torch.ones(q_len, kv_len, dtype=torch.bool).triu_(kv_len - q_len + 1)


def differences(name: str, cumulative: list[int], total: int) -> list[int]:
    """Lengths out of a cumulative list, which must not decrease and must end within `total`."""
    steps = [b - a for a, b in zip([0, *cumulative], cumulative, strict=False)]
    require(
        all(n >= 0 for n in steps), f"{name} must be cumulative (each value at least the one before it)", cumulative
    )
    require(
        not cumulative or cumulative[-1] <= total, f"{name} must not end beyond the {total} tokens given", cumulative
    )
    return steps


def gather_blocks(blocks: Tensor, row: Tensor, length: int) -> Tensor:
    """A request's first `length` tokens: `blocks [N, block_size, K, ...]`, its ids `row` -> `[length, K, ...]`."""
    needed = -(-length // blocks.shape[1])
    ids = row[:needed].long()
    require(needed <= len(row), f"block_table must have at least {needed} columns for {length} tokens", len(row))
    inside = bool(((ids >= 0) & (ids < len(blocks))).all())
    require(inside, f"block ids must lie in [0, {len(blocks)})", ids.tolist()[:32])
    return blocks[ids].flatten(0, 1)[:length]


def require_triangle(name: str, mask: Tensor) -> None:
    """A compressed causal mask `[..., n, n]` is non-zero exactly above the diagonal."""
    # One mask serves all layers and steps: the last one seen is remembered, until it is written to or freed.
    storage = mask.untyped_storage()
    mark = (storage._cdata, mask.data_ptr(), 0 if mask.is_inference() else mask._version)
    if _triangle and _triangle[0] == mark and not _triangle[1].expired():
        return
    wanted = torch.ones(mask.shape[-2:], dtype=torch.bool).triu_(1)
    require(bool(((mask != 0) == wanted).all()), f"{name} must hide what lies above the diagonal, and nothing else")
    _triangle[:] = [mark, StorageWeakRef(storage)]


_triangle: list[Any] = []
