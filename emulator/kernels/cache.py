"""Writing the paged caches: npu_scatter_pa_kv_cache, npu_qkv_rms_norm_rope_cache, ATB's _npu_reshape_and_cache.

Sources: the docstring of npu_scatter_pa_kv_cache in the torch_npu wheel, the QkvRmsNormRopeCache and
ReshapeAndCacheOperation pages. A slot is `block * block_size + offset`; T tokens, K heads, D head dim.
"""

import torch
from torch import Tensor

from emulator import chips
from emulator.formats import format_of, is_nz
from emulator.kernels.norm import normalised
from emulator.kernels.rope import rotated
from emulator.limits import (
    HALF,
    refuse,
    require,
    require_contiguous,
    require_dtype,
    require_rank,
    require_same_dtype,
    require_shape,
)
from emulator.registry import kernel


def write_plain(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`rows [T, K, D]` into `cache [blocks, block_size, K, D]`; slots of -1 are left out."""
    keep = slots >= 0
    cache.view(-1, *cache.shape[2:])[slots[keep].long()] = rows[keep]


def write_nz(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`rows [T, K, D]` into `cache [blocks, K*D/w, block_size, w]`; slots of -1 are left out."""
    keep = slots >= 0
    kept = slots[keep].long()
    block_size, width = cache.shape[2:]
    cache[kept // block_size, :, kept % block_size] = rows[keep].reshape(len(kept), -1, width)


def _check_slots(slots: Tensor, capacity: int, low: int = 0, unique: bool = True) -> None:
    values = slots.flatten()
    inside = bool(((values >= low) & (values < capacity)).all())
    require(
        inside,
        f"slots must lie in [{low}, {capacity})",
        f"{values.min().item()} to {values.max().item()}" if len(values) else None,
    )
    written = values[values >= 0]
    require(not unique or len(written.unique()) == len(written), "slots must not repeat", values.tolist()[:32])


def _check_nz_cache(name: str, cache: Tensor, heads: int, dim: int) -> None:
    width = 32 if cache.dtype == torch.int8 else 16
    require_rank(name, cache, 4)
    require((heads * dim) % width == 0, f"heads * head dim must be a multiple of {width}", heads * dim)
    require(
        cache.shape[1] == heads * dim // width and cache.shape[3] == width,
        f"{name} must have shape [blocks, {heads * dim // width}, block_size, {width}] (NZ)",
        list(cache.shape),
    )
    require(cache.shape[2] % width == 0, f"the block size must be a multiple of {width}", cache.shape[2])


def _check_scatter(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    refuse(compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    require_same_dtype("key", key, value=value, key_cache=key_cache, value_cache=value_cache)
    require_dtype(
        "key", key, (torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32)
    )
    require_dtype("slot_mapping", slot_mapping, (torch.int32, torch.int64))
    require_contiguous(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    require_rank("key", key, 3)
    require_rank("value", value, 3)
    require(
        key.shape[:2] == value.shape[:2],
        "key and value must have the same tokens and heads",
        [list(key.shape), list(value.shape)],
    )
    require_shape("slot_mapping", slot_mapping, key.shape[0])
    require(cache_mode in (None, "Norm", "PA_NZ"), "cache_mode must be None, 'Norm' or 'PA_NZ'", cache_mode)
    for name, rows, cache in (("key_cache", key, key_cache), ("value_cache", value, value_cache)):
        if cache_mode == "PA_NZ":
            _check_nz_cache(name, cache, rows.shape[1], rows.shape[2])
        else:
            require_rank(name, cache, 4)
            require(
                cache.shape[2:] == rows.shape[1:],
                f"{name} must have shape [blocks, block_size, {rows.shape[1]}, {rows.shape[2]}]",
                list(cache.shape),
            )


@kernel("npu_scatter_pa_kv_cache", _check_scatter)
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    nz = cache_mode == "PA_NZ"
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _check_slots(slot_mapping, cache.shape[0] * cache.shape[2 if nz else 1])
        (write_nz if nz else write_plain)(rows, cache, slot_mapping)


@kernel("npu_scatter_pa_kv_cache_functional", _check_scatter)
def npu_scatter_pa_kv_cache_functional(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    caches = key_cache.clone(), value_cache.clone()
    npu_scatter_pa_kv_cache(key, value, *caches, slot_mapping, **options)  # type: ignore[arg-type]
    return caches


def _check_qkv(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: list[int],
    head_nums: list[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> None:
    require(cache_mode == "PA_NZ", "cache_mode must be 'PA_NZ'", cache_mode)
    require_dtype("qkv", qkv, HALF)
    require_same_dtype("qkv", qkv, q_gamma=q_gamma, k_gamma=k_gamma, cos=cos, sin=sin, q_out=q_out)
    batch, seq, heads, dim = qkv_size
    q_heads, k_heads, v_heads = head_nums
    require(dim == 128, "the head dim (qkv_size[3]) must be 128", dim)
    require(
        k_heads == v_heads and q_heads + k_heads + v_heads == heads,
        "head_nums must be [Nq, Nk, Nv], Nk == Nv, adding up to qkv_size[2]",
        head_nums,
    )
    tokens = batch * seq
    require_shape("qkv", qkv, tokens, heads * dim)
    require_shape("q_out", q_out, tokens, q_heads * dim)
    for name, x, shape in (
        ("q_gamma", q_gamma, (dim,)),
        ("k_gamma", k_gamma, (dim,)),
        ("cos", cos, (tokens, dim)),
        ("sin", sin, (tokens, dim)),
    ):
        require_shape(name, x, *shape)
    require_dtype("index", index, (torch.int64,))
    require_shape("index", index, tokens)
    _check_written(qkv, "k", k_cache, k_heads, k_scale, k_offset)
    _check_written(qkv, "v", v_cache, v_heads, v_scale, v_offset)
    blocks, block_size = k_cache.shape[0], k_cache.shape[2]
    require(
        blocks >= -(-seq // block_size) * batch,
        f"the cache must have at least ceil(S / block size) * B blocks, {-(-seq // block_size) * batch}",
        blocks,
    )


def _check_written(
    qkv: Tensor, name: str, cache: Tensor, heads: int, scale: Tensor | None, offset: Tensor | None
) -> None:
    """One of the two caches, and the scales an int8 one needs; the head dim is 128."""
    require(cache.dtype in (qkv.dtype, torch.int8), f"{name}_cache must have qkv's dtype or int8", cache.dtype)
    _check_nz_cache(f"{name}_cache", cache, heads, 128)
    fits = (scale is not None) == (cache.dtype == torch.int8)
    require(fits, f"{name}_scale must be given for an int8 {name}_cache, and only then", scale)
    for part, x in ((f"{name}_scale", scale), (f"{name}_offset", offset)):
        require(x is None or x.dtype == torch.float32, f"{part} must be float32", None if x is None else x.dtype)
        require_shape(part, x, heads, 128)


@kernel("npu_qkv_rms_norm_rope_cache", _check_qkv)
def npu_qkv_rms_norm_rope_cache(
    qkv: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv_size: list[int],
    head_nums: list[int],
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_offset: Tensor | None = None,
    v_offset: Tensor | None = None,
    epsilon: float = 1e-6,
    cache_mode: str = "PA_NZ",
    is_output_qkv: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_slots(index, k_cache.shape[0] * k_cache.shape[2], low=-1)
    dim = qkv_size[3]
    q, k, v = qkv.view(-1, qkv_size[2], dim).split(head_nums, dim=1)
    turn = cos.unsqueeze(1), sin.unsqueeze(1)
    q = rotated(normalised(q, q_gamma, epsilon)[0], *turn).to(qkv.dtype)
    k = rotated(normalised(k, k_gamma, epsilon)[0], *turn).to(qkv.dtype)
    q_out.copy_(q.flatten(1))
    write_nz(_cached(k, k_scale, k_offset), k_cache, index)
    write_nz(_cached(v, v_scale, v_offset), v_cache, index)
    if is_output_qkv:
        return q.flatten(1), k.flatten(1), v.flatten(1)
    return qkv.new_zeros(()), qkv.new_zeros(()), qkv.new_zeros(())


@kernel("npu_qkv_rms_norm_rope_cache_functional", _check_qkv)
def npu_qkv_rms_norm_rope_cache_functional(
    qkv: Tensor, q_gamma: Tensor, k_gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, q_out: Tensor,
    k_cache: Tensor, v_cache: Tensor, qkv_size: list[int], head_nums: list[int], **options: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    written = q_out.clone(), k_cache.clone(), v_cache.clone()
    plain = npu_qkv_rms_norm_rope_cache(
        qkv, q_gamma, k_gamma, cos, sin, index, *written, qkv_size, head_nums, **options
    )  # type: ignore[arg-type]
    return *plain, *written


def _cached(x: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    if scale is None:
        return x
    y = x.float() / scale + (0.0 if offset is None else offset)
    return y.round().clamp(-128, 127).to(torch.int8)


def _check_reshape(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    for name, rows, cache in (("key", key, key_cache), ("value", value, value_cache)):  # int8 beside half is taken
        require_dtype(name, rows, (*HALF, torch.int8))
        require_same_dtype(name, rows, **{f"{name}_cache": cache})
    require_rank("key", key, 3)
    require_rank("value", value, 3)
    require_dtype("slot_indices", slot_indices, (torch.int32,))
    require_shape("slot_indices", slot_indices, key.shape[0])
    require_contiguous(key=key, value=value, slot_indices=slot_indices)
    if chips.current().soc == "atlas_300i_duo":
        for name, rows, cache in (("key_cache", key, key_cache), ("value_cache", value, value_cache)):
            aligned = rows.shape[2] * rows.element_size() % 32 == 0
            require(aligned, "the head dim must be aligned to 32 bytes", rows.shape[2])
            _check_nz_cache(name, cache, rows.shape[1], rows.shape[2])
            require(
                is_nz(cache),
                f"{name} must be in FRACTAL_NZ (empty_with_format or npu_format_cast with 29)",
                format_of(cache),
            )
    else:
        for name, rows, cache in (("key_cache", key, key_cache), ("value_cache", value, value_cache)):
            require_rank(name, cache, 4)
            require(
                cache.shape[2:] == rows.shape[1:],
                f"{name} must have shape [blocks, block_size, {rows.shape[1]}, {rows.shape[2]}]",
                list(cache.shape),
            )


@kernel("_npu_reshape_and_cache", _check_reshape, lambda *_, **__: None, namespace="atb")
def _npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    nz = chips.current().soc == "atlas_300i_duo"
    for rows, cache in ((key, key_cache), (value, value_cache)):
        _check_slots(slot_indices, cache.shape[0] * cache.shape[2 if nz else 1], unique=False)
        (write_nz if nz else write_plain)(rows, cache, slot_indices)
