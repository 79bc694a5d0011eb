"""npu_fused_infer_attention_score, first and second form, and torchair's form with lengths as tensors.

Semantics and limits: the ops' docstrings in the torch_npu wheel; for TND with a paged cache, head dim 64 and NZ
caches, which those docstrings leave out, the newer pages of torch_npu's op reference (op-plugin 26 / CANN 9).
Not emulated, though documented: MLA (query_rope), quantized keys and values, int8 output, pse_shift, shared prefix,
left padding, attention sinks, the NTD layouts, sparse modes 1, 2, 4 and 9.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.emulator.kernels.attention_math import (
    attend,
    causal,
    differences,
    gather_blocks,
    log_sum_exp,
    require_triangle,
)
from executor.emulator.limits import (
    HALF,
    refuse,
    require,
    require_contiguous,
    require_dtype,
    require_rank,
    require_same_dtype,
)
from executor.emulator.registry import kernel

_LAYOUTS = {"BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4, "TND": 3}
_MASK = 2048
_EVERYTHING = 2147483647
Lengths = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Call:
    """One call in the words of the second form, whichever form it came in."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    q_lens: Lengths
    kv_lens: Lengths
    block_table: Tensor | None
    heads: int
    kv_heads: int
    scale: float
    layout: str
    sparse_mode: int
    block_size: int
    inner_precise: int
    lse: bool
    pre_tokens: int = _EVERYTHING
    next_tokens: int = _EVERYTHING

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def tnd(self) -> bool:
        return self.layout == "TND"

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1] // (self.heads if self.layout == "BSH" else 1)

    @property
    def query_tokens(self) -> int:
        """Q_S: the padded length of a request's queries; for TND all tokens of the batch."""
        if self.tnd:
            return self.query.shape[0]
        return self.query.shape[2 if self.layout.startswith("BNSD") else 1]


def check(call: Call) -> None:
    """The limits that shapes and plain arguments show."""
    require(call.layout in _LAYOUTS, f"input_layout must be one of {', '.join(_LAYOUTS)}", call.layout)
    require_rank("query", call.query, _LAYOUTS[call.layout])
    require_dtype("query", call.query, HALF)
    require_same_dtype("query", call.query, key=call.key, value=call.value)
    require(
        tuple(call.key.shape) == tuple(call.value.shape),
        "key and value must have the same shape",
        [list(call.key.shape), list(call.value.shape)],
    )
    require_contiguous(
        query=call.query, key=call.key, value=call.value, atten_mask=call.mask, block_table=call.block_table
    )
    require(
        call.heads > 0 and call.heads % call.kv_heads == 0,
        "the key/value heads must divide the query heads",
        [call.heads, call.kv_heads],
    )
    require(
        call.heads // call.kv_heads <= 64,
        "there must be at most 64 query heads for a key/value head",
        call.heads // call.kv_heads,
    )
    require(call.heads <= 256, "there must be at most 256 query heads", call.heads)
    require(call.inner_precise in (0, 1, 2, 3), "inner_precise must be 0 to 3", call.inner_precise)
    _check_head_dim(call)
    _check_mask(call)
    _check_lengths(call)
    if call.paged:
        _check_paged(call)
    else:
        axis = {"TND": 1, "BSND": 2, "BSH": None}.get(call.layout, 1)
        got = call.key.shape[axis] if axis is not None else call.key.shape[2] // call.head_dim
        require(got == call.kv_heads, f"key must have {call.kv_heads} heads", list(call.key.shape))


def _check_head_dim(call: Call) -> None:
    if call.layout != "BSH":
        axis = 1 if call.tnd or call.layout.startswith("BNSD") else 2
        require(call.query.shape[axis] == call.heads, f"query must have {call.heads} heads", list(call.query.shape))
    else:
        require(
            call.query.shape[2] % call.heads == 0,
            "query's last dimension must be a multiple of the heads",
            list(call.query.shape),
        )
    dim = call.head_dim
    if call.tnd:
        require(dim in (64, 128), "with TND the head dim must be 64 or 128 (192 is not emulated)", dim)
    else:
        require(dim <= 512, "the head dim must be at most 512", dim)
        require(call.query_tokens == 1 or dim % 16 == 0, "the head dim must be a multiple of 16", dim)
        require(
            call.layout not in ("BSH", "BSND") or call.heads * dim < 65535,
            "with BSH and BSND heads * head dim must be below 65535",
            call.heads * dim,
        )
    if call.layout == "BNSD_BSND":
        require(call.query_tokens > 1, "BNSD_BSND needs more than one query token", call.query_tokens)


def _check_mask(call: Call) -> None:
    require(
        call.sparse_mode in (0, 3),
        "sparse_mode must be 0 or 3 (1, 2 and 4 are documented and not emulated)",
        call.sparse_mode,
    )
    if call.mask is not None:
        require_dtype("atten_mask", call.mask, (torch.bool, torch.int8, torch.uint8))
    if call.sparse_mode == 3:
        require(call.mask is not None, f"sparse_mode 3 needs atten_mask, the {_MASK} x {_MASK} upper triangle")
        shape = tuple(call.mask.shape)
        require(
            shape in ((_MASK, _MASK), (1, _MASK, _MASK), (1, 1, _MASK, _MASK)),
            f"with sparse_mode 3 atten_mask must have shape [{_MASK}, {_MASK}]",
            list(shape),
        )
    elif call.tnd:
        refuse(atten_mask=call.mask)


def _check_lengths(call: Call) -> None:
    counts = [None if lens is None else len(lens) for lens in (call.q_lens, call.kv_lens)]
    for name, lens in (("actual_seq_qlen", call.q_lens), ("actual_seq_kvlen", call.kv_lens)):
        if isinstance(lens, Tensor):
            require(
                lens.dim() == 1 and lens.dtype == torch.int64,
                f"{name} must be a 1-dimensional int64 tensor",
                [lens.dtype, list(lens.shape)],
            )
    if call.tnd:
        require(
            None not in counts,
            "with TND the lengths of queries and of keys must be given (without them some stacks return averages)",
        )
        require(counts[0] == counts[1], "the lists of lengths must have one entry per request each", counts)
        require(counts[0] <= 4096, "there must be at most 4096 requests", counts[0])
    else:
        batch = call.query.shape[0]
        for count in counts:
            require(
                count is None or count == 1 or count >= batch,
                f"a list of lengths must have 1 entry or at least {batch}",
                count,
            )
    if call.paged:
        require(call.kv_lens is not None, "with block_table actual_seq_kvlen must be given")


def _check_paged(call: Call) -> None:
    table, block_size, dim = call.block_table, call.block_size, call.head_dim
    require_dtype("block_table", table, (torch.int32,))
    require_rank("block_table", table, 2)
    batch = len(call.kv_lens) if call.tnd else call.query.shape[0]
    require(table.shape[0] == batch, f"block_table must have one row per request, {batch}", list(table.shape))
    if call.tnd:
        require(
            0 < block_size <= 1024 and block_size % 16 == 0,
            "block_size must be a multiple of 16, at most 1024",
            block_size,
        )
    elif call.query_tokens > 1:
        require(
            128 <= block_size <= 512 and block_size % 128 == 0,
            "with more than one query token block_size must be 128, 256, 384 or 512",
            block_size,
        )
    else:
        require(
            0 < block_size <= 512 and block_size % 16 == 0,
            "block_size must be a multiple of 16, at most 512",
            block_size,
        )
    wide = call.kv_heads * dim
    shapes = {3: (block_size, wide), 5: (call.kv_heads, dim // 16, block_size, 16)}
    if call.tnd or call.layout.startswith("BNSD"):
        shapes[4] = (call.kv_heads, block_size, dim)
    expected = shapes.get(call.key.dim())
    allowed = " or ".join(f"[blocks, {', '.join(map(str, s))}]" for s in shapes.values())
    require(
        expected is not None and tuple(call.key.shape[1:]) == expected,
        f"the paged key must have shape {allowed}",
        list(call.key.shape),
    )
    require(
        call.key.dim() != 3 or wide <= 65535,
        "heads * head dim of a [blocks, block_size, H] cache must be at most 65535",
        wide,
    )


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Attention of every request, in the layout of the call; the sums only where asked for."""
    if call.sparse_mode == 3:
        require_triangle("atten_mask", call.mask.view(_MASK, _MASK))
    queries, q_lens = _queries(call)
    keys, values, kv_lens = _keys(call, len(queries))
    outs, sums = [], []
    for q, k, v, q_len, kv_len in zip(queries, keys, values, q_lens, kv_lens, strict=True):
        padded = q.new_zeros(len(q), call.heads, v.shape[-1])
        hidden = _hidden(call, q_len, kv_len, len(outs))
        padded[:q_len] = attend(q[:q_len], k, v, call.scale, hidden).to(q.dtype)
        outs.append(padded)
        if call.lse:
            filled = q.new_full((len(q), call.heads), float("inf"), dtype=torch.float32)
            filled[:q_len] = log_sum_exp(q[:q_len], k, call.scale, hidden)
            sums.append(filled)
    if call.tnd:
        out = torch.zeros_like(call.query)
        if outs:
            packed = torch.cat(outs)
            out[: len(packed)] = packed
        return out, torch.cat(sums).unsqueeze(-1) if call.lse else torch.zeros(1)
    out = torch.stack(outs)  # [B, S, H, D]
    if call.layout == "BSH":
        out = out.flatten(2)
    elif call.layout == "BNSD":
        out = out.transpose(1, 2).contiguous()
    return out, torch.stack(sums).transpose(1, 2).unsqueeze(-1) if call.lse else torch.zeros(1)


def _queries(call: Call) -> tuple[Sequence[Tensor], list[int]]:
    if call.tnd:
        lens = differences("actual_seq_qlen", _listed(call.q_lens), call.query.shape[0])
        return call.query[: sum(lens)].split(lens), lens
    return _requests(call, call.query, call.heads, call.q_lens if call.query_tokens > 1 else None, "actual_seq_qlen")


def _keys(call: Call, batch: int) -> tuple[Sequence[Tensor], Sequence[Tensor], list[int]]:
    if call.paged:
        lens = _listed(call.kv_lens)
        lens = lens * batch if len(lens) == 1 else lens[:batch]
        require(all(n >= 0 for n in lens), "actual_seq_kvlen must not be negative", lens)
        width = call.block_table.shape[1] * call.block_size
        require(
            max(lens, default=0) <= width,
            f"actual_seq_kvlen must hold each request's own length (not cumulative), at most {width} here",
            lens,
        )
        k, v = (_plain_blocks(call, x) for x in (call.key, call.value))
        rows = list(zip(call.block_table, lens, strict=True))
        return [gather_blocks(k, *row) for row in rows], [gather_blocks(v, *row) for row in rows], lens
    if call.tnd:
        lens = differences("actual_seq_kvlen", _listed(call.kv_lens), call.key.shape[0])
        return call.key[: sum(lens)].split(lens), call.value[: sum(lens)].split(lens), lens
    keys, lens = _requests(call, call.key, call.kv_heads, call.kv_lens, "actual_seq_kvlen")
    values, _ = _requests(call, call.value, call.kv_heads, call.kv_lens, "actual_seq_kvlen")
    cut = [x[:n] for x, n in zip(keys, lens, strict=True)], [x[:n] for x, n in zip(values, lens, strict=True)]
    return *cut, lens


def _requests(call: Call, x: Tensor, heads: int, lens: Lengths, name: str) -> tuple[Sequence[Tensor], list[int]]:
    """A padded batch as one `[S, heads, D]` per request, with the lengths in use."""
    if call.layout == "BSH":
        x = x.unflatten(2, (heads, -1))
    elif call.layout.startswith("BNSD"):
        x = x.transpose(1, 2)
    batch, tokens = x.shape[:2]
    used = [tokens] if lens is None else _listed(lens)
    used = used * batch if len(used) == 1 else used[:batch]
    require(all(0 <= n <= tokens for n in used), f"{name} must hold each request's own length, 0 to {tokens}", used)
    return list(x), used


def _plain_blocks(call: Call, cache: Tensor) -> Tensor:
    """A paged cache of any documented layout as `[blocks, block_size, K, D]`."""
    if cache.dim() == 3:
        return cache.unflatten(2, (call.kv_heads, -1))
    if cache.dim() == 4:
        return cache.transpose(1, 2)
    return cache.permute(0, 3, 1, 2, 4).flatten(3)


def _hidden(call: Call, q_len: int, kv_len: int, index: int) -> Tensor | None:
    if call.sparse_mode == 3:
        require(
            not kv_len or q_len <= kv_len,
            "with sparse_mode 3 a request must not have more queries than keys",
            [q_len, kv_len],
        )
        return causal(q_len, kv_len)
    if call.mask is None:
        return None
    mask = call.mask.bool()
    while mask.dim() > 3:
        mask = mask.squeeze(1)
    if mask.dim() == 2 and call.query_tokens == 1:  # [B, L], one row per request
        mask = mask.unsqueeze(1)
    mask = mask if mask.dim() == 2 else mask[index if mask.shape[0] > 1 else 0]
    require(
        mask.shape[0] >= q_len and mask.shape[1] >= kv_len,
        f"atten_mask must cover {q_len} queries and {kv_len} keys",
        list(call.mask.shape),
    )
    return mask[:q_len, :kv_len] | _outside_band(call, q_len, kv_len)


def _outside_band(call: Call, q_len: int, kv_len: int) -> Tensor:
    """With a mask of the user's own, only keys from pre_tokens before to next_tokens after a query are computed."""
    ahead = torch.arange(kv_len) - torch.arange(q_len).unsqueeze(1)
    if call.query_tokens == 1:  # both arguments have no effect on a single query token
        return torch.zeros(q_len, kv_len, dtype=torch.bool)
    return (ahead > call.next_tokens) | (-ahead > call.pre_tokens)


def _listed(lens: Lengths) -> list[int]:
    return lens.tolist() if isinstance(lens, Tensor) else [int(n) for n in lens or ()]


def _second(query: Tensor, key: Tensor, value: Tensor, **o: object) -> Call:
    for name in _SECOND_UNUSED:
        refuse(**{name: o.get(name)})
    heads = o.get("num_query_heads", 1)
    return Call(
        query, key, value, o.get("atten_mask"), o.get("actual_seq_qlen"), o.get("actual_seq_kvlen"),
        o.get("block_table"),
        heads, o.get("num_key_value_heads", 0) or heads, o.get("softmax_scale", 1.0), o.get("input_layout", "BSH"),
        o.get("sparse_mode", 0), o.get("block_size", 0), o.get("inner_precise", 0), o.get("return_softmax_lse", False),
        o.get("pre_tokens", _EVERYTHING), o.get("next_tokens", _EVERYTHING),
    )  # fmt: skip


def _first(query: Tensor, key: Tensor, value: Tensor, **o: object) -> Call:
    for name in _FIRST_UNUSED:
        refuse(**{name: o.get(name)})
    heads = o.get("num_heads", 1)
    return Call(
        query, key, value, o.get("atten_mask"), o.get("actual_seq_lengths"), o.get("actual_seq_lengths_kv"),
        o.get("block_table"),
        heads, o.get("num_key_value_heads", 0) or heads, o.get("scale", 1.0), o.get("input_layout", "BSH"),
        o.get("sparse_mode", 0), o.get("block_size", 0), o.get("inner_precise", 0), o.get("softmax_lse_flag", False),
        o.get("pre_tokens", _EVERYTHING), o.get("next_tokens", _EVERYTHING),
    )  # fmt: skip


_SECOND_UNUSED = (
    "query_rope", "key_rope", "pse_shift", "dequant_scale_query", "dequant_scale_key", "dequant_offset_key",
    "dequant_scale_value", "dequant_offset_value", "dequant_scale_key_rope", "quant_scale_out", "quant_offset_out",
    "quant_scale_p", "learnable_sink", "out_dtype",
)  # fmt: skip
_FIRST_UNUSED = (
    "pse_shift", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2", "antiquant_scale",
    "antiquant_offset", "key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale",
    "value_antiquant_offset",
    "query_padding_size", "kv_padding_size", "key_shared_prefix", "value_shared_prefix", "actual_shared_prefix_len",
    "query_rope", "key_rope", "key_rope_antiquant_scale",
)  # fmt: skip


@kernel("npu_fused_infer_attention_score_v2", lambda *args, **kwargs: check(_second(*args, **kwargs)))
@kernel("npu_fused_infer_attention_score_v2", lambda *args, **kwargs: check(_second(*args, **kwargs)), namespace="air")
def npu_fused_infer_attention_score_v2(*args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    return run(_second(*args, **kwargs))


@kernel("npu_fused_infer_attention_score", lambda *args, **kwargs: check(_first(*args, **kwargs)))
@kernel("npu_fused_infer_attention_score", lambda *args, **kwargs: check(_first(*args, **kwargs)), namespace="air")
def npu_fused_infer_attention_score(*args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    return run(_first(*args, **kwargs))
