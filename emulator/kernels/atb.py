"""ATB's attention ops: the whole attention of 300I DUO, and available on A2 and A3.

Sources: the SelfAttentionOperation (PA_ENCODER) and PagedAttentionOperation pages of ATB, their mask tables and
constraints; for _npu_paged_attention_splitfuse_v2 its own test on 300I DUO in op-plugin. Lengths are each request's
own, int32, on the host (on 300I DUO those of cached keys may be, and for that op are, on the device). Masks hide where
they are not 0; values between 0 and -1000 (ALiBi slopes) are documented and not emulated. T tokens, H heads, K kv
heads, D head dim, L keys.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.formats import NZ, cache_rows, format_of, from_nz, is_nz
from emulator.kernels.attention_math import attend, causal, gather_blocks, require_triangle
from emulator.limits import (
    HALF,
    require,
    require_contiguous,
    require_dtype,
    require_rank,
    require_same_dtype,
    require_shape,
)
from emulator.registry import kernel

_LONG = 2048


def _nothing(*_: object, **__: object) -> None:
    """These ops write `out` and return nothing."""


def _duo() -> bool:
    return chips.current().soc == "atlas_300i_duo"


def _check_query(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, out: Tensor) -> None:
    require_dtype("query", query, HALF)
    require_same_dtype("query", query, key=key, value=value, out=out)
    require_rank("query", query, 3)
    require_contiguous(query=query, out=out)
    require(query.shape[1] == heads, "num_heads must be the heads of query", [query.shape[1], heads])
    require(0 < kv_heads <= heads and heads % kv_heads == 0, "num_kv_heads must divide num_heads", [heads, kv_heads])
    require(out.numel() == query.numel(), "out must have the size of query", list(out.shape))
    dim = query.shape[2]
    require(0 < dim <= 256, "the head dim must be at most 256", dim)
    require(not _duo() or dim % 16 == 0, "the head dim must be a multiple of 16", dim)


def _check_lens(name: str, lens: Tensor, most: int) -> None:
    """Lengths on the host."""
    _check_counts(name, lens, most)
    require(lens.device.type in ("cpu", "meta"), f"{name} must be on the host", lens.device)


def _check_counts(name: str, lens: Tensor, most: int) -> None:
    require_dtype(name, lens, (torch.int32,))
    require_rank(name, lens, 1)
    require(0 < len(lens) <= most, f"there must be 1 to {most} requests", len(lens))


def _check_packed(
    query: Tensor, key: Tensor, value: Tensor, seq_len: Tensor, heads: int, kv_heads: int, out: Tensor
) -> None:
    _check_query(query, key, value, heads, kv_heads, out)
    require_shape("key", key, query.shape[0], kv_heads, query.shape[2])
    require_shape("value", value, query.shape[0], kv_heads, query.shape[2])
    require_contiguous(key=key, value=value)
    _check_lens("seq_len", seq_len, 2000)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, lens: list[int], scale: float, out: Tensor, hidden: Tensor | None, triangle: bool
) -> None:
    """Each request over its own tokens; `hidden [L, L]` serves every request from its corner."""
    total = sum(lens)
    expected = -(-total // 16) * 16 if _duo() else total
    require(all(n > 0 for n in lens), "seq_len must hold each request's length, none of them 0", lens)
    require(
        q.shape[0] == expected,
        f"query must have {expected} rows for {total} tokens{' (padded to 16)' if _duo() else ''}",
        q.shape[0],
    )
    flat, start = out.view(q.shape), 0
    for n in lens:
        mine = slice(start, start + n)
        seen = causal(n, n) if triangle else None if hidden is None else hidden[:n, :n]
        flat[mine] = attend(q[mine], k[mine], v[mine], scale, seen).to(q.dtype)
        start += n


def _hidden_by(mask: Tensor, rows: int, columns: int, exact: bool) -> Tensor:
    """A mask, plain or in NZ, as True where it hides, `[rows, columns]`."""
    padded = -(-rows // 16) * 16, -(-columns // 16) * 16
    if _duo():
        require_rank("mask", mask, 4)
        require(
            mask.shape[0] == 1 and mask.shape[3] == 16,
            f"mask must have shape [1, {padded[1] // 16}, {padded[0]}, 16]",
            list(mask.shape),
        )
        require(is_nz(mask), "mask must be in FRACTAL_NZ (npu_format_cast with 29)", format_of(mask))
        plain = from_nz(mask[0], mask.shape[2], mask.shape[1] * 16)
    else:
        plain = mask.flatten(0, -3)[0] if mask.dim() > 2 else mask
    fits = plain.shape[0] >= rows and plain.shape[1] >= columns
    if exact and _duo():
        fits = tuple(plain.shape) == padded
    require(
        fits,
        f"mask must cover {rows} queries and {columns} keys{' (padded to 16), no more' if exact and _duo() else ''}",
        list(mask.shape),
    )
    plain = plain[:rows, :columns]
    values = plain.float()
    require(
        bool(((values == 0) | (values <= -1000) | (values == 1)).all()),
        "mask must be 0 where a key is seen and -inf, -10000 or less (or 1) where not",
    )
    return plain != 0


def _check_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    _check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)
    require_same_dtype("query", query, mask=mask)


@kernel("_npu_flash_attention", _check_flash, _nothing, namespace="atb")
def _npu_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    lens = seq_len.tolist()
    hidden = _hidden_by(mask, max(lens), max(lens), exact=True)
    _packed(query, key, value, lens, scale_value, out, hidden, triangle=False)


def _check_flash_v3(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, seq_len: Tensor, scale_value: float, num_heads: int,
    num_kv_heads: int,
    *, mask_type: int | None = 3, out: Tensor,
) -> None:  # fmt: skip
    _check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)
    require(mask_type in (None, 3), "mask_type must be 3 (MASK_TYPE_NORM_COMPRESS)", mask_type)
    require_dtype("mask", mask, (torch.float16,))
    require_shape("mask", mask, 1, _LONG // 16, _LONG, 16)


@kernel("_npu_flash_attention_v3", _check_flash_v3, _nothing, namespace="atb")
def _npu_flash_attention_v3(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, seq_len: Tensor, scale_value: float, num_heads: int,
    num_kv_heads: int,
    *, mask_type: int | None = 3, out: Tensor,
) -> None:  # fmt: skip
    require(is_nz(mask), "mask must be in FRACTAL_NZ (npu_format_cast with 29)", format_of(mask))
    require_triangle("mask", from_nz(mask[0], _LONG, _LONG))
    _packed(query, key, value, seq_len.tolist(), scale_value, out, None, triangle=True)


def _check_unpad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    _check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)


@kernel("_npu_flash_attention_unpad", _check_unpad, _nothing, namespace="atb")
def _npu_flash_attention_unpad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    _packed(query, key, value, seq_len.tolist(), scale_value, out, None, triangle=False)


def _check_paged(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lens: Tensor, heads: int, kv_heads: int, out: Tensor
) -> None:
    """Limits of every paged op; on 300I DUO a cache has NZ's shape."""
    _check_query(query, k_cache, v_cache, heads, kv_heads, out)
    dim = query.shape[2]
    require_dtype("block_table", table, (torch.int32,))
    require_rank("block_table", table, 2)
    require_rank("key_cache", k_cache, 4)
    require_shape("value_cache", v_cache, *k_cache.shape)
    if _duo():
        strips = kv_heads * dim // 16
        block_size = k_cache.shape[2]
        require(
            k_cache.shape[1] == strips and k_cache.shape[3] == 16,
            f"key_cache must have shape [blocks, {strips}, block_size, 16] (NZ)",
            list(k_cache.shape),
        )
        for name, cache in (("key_cache", k_cache), ("value_cache", v_cache)):
            require(
                is_nz(cache),
                f"{name} must be in FRACTAL_NZ (empty_with_format or npu_format_cast with 29)",
                format_of(cache),
            )
        require(block_size * dim <= 128 * 128, "block size * head dim must be at most 128 * 128", block_size * dim)
    else:
        block_size = k_cache.shape[1]
        require(
            tuple(k_cache.shape[2:]) == (kv_heads, dim),
            f"key_cache must have shape [blocks, block_size, {kv_heads}, {dim}]",
            list(k_cache.shape),
        )
    require(
        block_size % 16 == 0 and block_size <= 128, "the block size must be a multiple of 16, at most 128", block_size
    )
    if _duo():
        _check_counts("context_lens", lens, 2048)
    else:
        _check_lens("context_lens", lens, 8192)
    require(table.shape[0] == len(lens), f"block_table must have one row per request, {len(lens)}", list(table.shape))


def _check_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, num_kv_heads: int, num_heads: int, scale_value: float,
    block_table: Tensor,
    context_lens: Tensor, out: Tensor, *, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    _check_paged(query, key_cache, value_cache, block_table, context_lens, num_heads, num_kv_heads, out)
    require(
        query.shape[0] == len(context_lens),
        "query must have one token per request",
        [query.shape[0], len(context_lens)],
    )


@kernel("_npu_paged_attention", _check_decode, _nothing, namespace="atb")
def _npu_paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, num_kv_heads: int, num_heads: int, scale_value: float,
    block_table: Tensor,
    context_lens: Tensor, out: Tensor, *, workspace: Tensor | None = None,
) -> None:  # fmt: skip
    k, v = (_plain(cache, num_kv_heads) for cache in (key_cache, value_cache))
    flat = out.view(query.shape)
    for index, length in enumerate(context_lens.tolist()):
        mine = slice(index, index + 1)
        keys, values = (gather_blocks(x, block_table[index], length) for x in (k, v))
        flat[mine] = attend(query[mine], keys, values, scale_value).to(query.dtype)


def _plain(cache: Tensor, heads: int) -> Tensor:
    return cache_rows(cache, heads) if _duo() else cache


def _check_split(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int, num_heads: int, scale_value: float, out: Tensor,
) -> None:  # fmt: skip
    _check_paged(query, key_cache, value_cache, block_table, context_lens, num_heads, num_kv_heads, out)
    _check_lens("seq_len", seq_len, 2048)
    require(
        len(seq_len) == len(context_lens),
        "seq_len and context_lens must have one entry per request each",
        [len(seq_len), len(context_lens)],
    )
    require_same_dtype("query", query, mask=mask)


def _split(
    query: Tensor,
    caches: tuple[Tensor, Tensor],
    table: Tensor,
    q_lens: list[int],
    kv_lens: list[int],
    scale: float,
    out: Tensor,
    hidden: Tensor | None,
) -> None:
    """Chunks of several requests; `hidden [T, L]` has each token's own row, None means causal."""
    require(
        sum(q_lens) == query.shape[0],
        "seq_len must hold each request's query tokens, together those of query",
        [sum(q_lens), query.shape[0]],
    )
    require(
        all(0 < q <= kv for q, kv in zip(q_lens, kv_lens, strict=True)),
        "a request must have at least one query and no fewer keys",
        [q_lens, kv_lens],
    )
    flat, start = out.view(query.shape), 0
    for index, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        mine = slice(start, start + q_len)
        keys, values = (gather_blocks(x, table[index], kv_len) for x in caches)
        seen = causal(q_len, kv_len) if hidden is None else hidden[mine, :kv_len]
        flat[mine] = attend(query[mine], keys, values, scale, seen).to(query.dtype)
        start += q_len


@kernel("_npu_paged_attention_splitfuse", _check_split, _nothing, namespace="atb")
def _npu_paged_attention_splitfuse(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int, num_heads: int, scale_value: float, out: Tensor,
) -> None:  # fmt: skip
    kv_lens = context_lens.tolist()
    hidden = _hidden_by(mask, query.shape[0], max(kv_lens), exact=False)
    caches = _plain(key_cache, num_kv_heads), _plain(value_cache, num_kv_heads)
    _split(query, caches, block_table, seq_len.tolist(), kv_lens, scale_value, out, hidden)


def _check_split_v2(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int, num_heads: int, scale_value: float, *, mask_type: int | None = 5, out: Tensor,
) -> None:  # fmt: skip
    _check_split(
        query,
        key_cache,
        value_cache,
        block_table,
        context_lens,
        mask,
        seq_len,
        num_kv_heads,
        num_heads,
        scale_value,
        out,
    )
    require(context_lens.device == query.device, "context_lens must be on the device", context_lens.device)
    require(mask_type in (None, 5), "mask_type must be 5 (MASK_TYPE_NORM_COMPRESS)", mask_type)
    require_dtype("mask", mask, (torch.float16,))
    require_shape("mask", mask, _LONG, _LONG)
    require(format_of(mask) != NZ, "mask must be plain here (not FRACTAL_NZ)", format_of(mask))


@kernel("_npu_paged_attention_splitfuse_v2", _check_split_v2, _nothing, namespace="atb")
def _npu_paged_attention_splitfuse_v2(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, mask: Tensor,
    seq_len: Tensor,
    num_kv_heads: int, num_heads: int, scale_value: float, *, mask_type: int | None = 5, out: Tensor,
) -> None:  # fmt: skip
    require_triangle("mask", mask)
    caches = _plain(key_cache, num_kv_heads), _plain(value_cache, num_kv_heads)
    _split(query, caches, block_table, seq_len.tolist(), context_lens.tolist(), scale_value, out, None)
