"""One call of a fused attention op, in whichever layout, and its semantics; the ops themselves stand beside.

B requests, S padded tokens, T packed tokens, H query heads, K key/value heads, D head dim, L keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emulator.kernels.attention_math import attend, differences, gather_blocks, log_sum_exp, require_triangle
from emulator.limits import require

MASK = 2048  # the side of a compressed mask
EVERYTHING = 2147483647
COUNTABLE = 2**31 - 1  # elements of a paged cache
Lengths = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Call:
    """The arguments in the words of npu_fused_infer_attention_score_v2, whichever op they came to."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    q_lens: Lengths = None
    kv_lens: Lengths = None
    block_table: Tensor | None = None
    heads: int = 1
    kv_heads: int = 1
    scale: float = 1.0
    layout: str = "BSH"
    sparse_mode: int = 0
    block_size: int = 0
    inner_precise: int = 0
    lse: bool = False
    pre_tokens: int = EVERYTHING
    next_tokens: int = EVERYTHING
    shift: Tensor | None = None  # added to the scaled scores, [B or 1, H, S, L]
    out_scale: Tensor | None = None  # int8 output: round(out * scale + offset)
    out_offset: Tensor | None = None
    k_scale: Tensor | None = None  # of int8 keys, one number for every channel
    v_scale: Tensor | None = None
    prompt: bool = False  # npu_prompt_flash_attention: one query token is as good as many

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def tnd(self) -> bool:
        return self.layout == "TND"

    @property
    def single(self) -> bool:
        """Whether the call takes the branch for one query token, for which sparse_mode and bands are void."""
        return not self.tnd and not self.prompt and self.query_tokens == 1

    @property
    def mode(self) -> int:
        """The sparse_mode that holds."""
        return 0 if self.single else self.sparse_mode

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1] // (self.heads if self.layout == "BSH" else 1)

    @property
    def query_tokens(self) -> int:
        """Q_S: the padded length of a request's queries; for TND all tokens of the batch."""
        if self.tnd:
            return self.query.shape[0]
        return self.query.shape[2 if self.layout.startswith("BNSD") else 1]

    @property
    def batch(self) -> int:
        return len(self.q_lens or ()) if self.tnd else self.query.shape[0]


def require_countable(call: Call) -> None:
    """A paged cache's elements are counted in int32."""
    got = call.key.numel()
    require(got <= COUNTABLE, f"a paged cache must have at most {COUNTABLE} elements (counted in int32)", got)


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Attention of every request, in the layout of the call; the sums of the softmax only where asked for."""
    if call.mode in (2, 3, 4):
        require_triangle("atten_mask", call.mask.view(MASK, MASK))
    queries, q_lens = _queries(call)
    keys, values, kv_lens = _keys(call, len(queries))
    outs, sums = [], []
    for q, k, v, q_len, kv_len in zip(queries, keys, values, q_lens, kv_lens, strict=True):
        padded = q.new_zeros(len(q), call.heads, v.shape[-1], dtype=torch.float32)
        hidden = _hidden(call, q_len, kv_len, len(outs))
        shift = None if call.shift is None else call.shift[len(outs) % call.shift.shape[0], :, :q_len, :kv_len].float()
        padded[:q_len] = attend(q[:q_len], k, v, call.scale, hidden, shift)
        outs.append(padded)
        if call.lse:
            filled = q.new_full((len(q), call.heads), float("inf"), dtype=torch.float32)
            filled[:q_len] = log_sum_exp(q[:q_len], k, call.scale, hidden, shift)
            sums.append(filled)
    if call.tnd:
        return _packed(call, outs), torch.cat(sums).unsqueeze(-1) if call.lse else torch.zeros(1)
    out = _rounded(call, torch.stack(outs))  # [B, S, H, D]
    if call.layout == "BSH":
        out = out.flatten(2)
    elif call.layout == "BNSD":
        out = out.transpose(1, 2).contiguous()
    return out, torch.stack(sums).transpose(1, 2).unsqueeze(-1) if call.lse else torch.zeros(1)


def _packed(call: Call, outs: list[Tensor]) -> Tensor:
    out = torch.zeros_like(call.query)
    if outs:
        packed = torch.cat(outs)
        out[: len(packed)] = packed.to(out.dtype)
    return out


def _rounded(call: Call, out: Tensor) -> Tensor:
    """`out [B, S, H, D]` in the output's dtype: the query's, or int8 by one scale or one per channel."""
    if call.out_scale is None:
        return out.to(call.query.dtype)
    shape = (1,) if call.out_scale.numel() == 1 else out.shape[-2:]
    scaled = out * call.out_scale.float().view(shape)
    if call.out_offset is not None:
        scaled = scaled + call.out_offset.float().view(shape)
    return scaled.round().clamp(-128, 127).to(torch.int8)


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
        keys, values = ([gather_blocks(x, *row).flatten(2) for row in rows] for x in (k, v))
        return _read(call, keys, call.k_scale), _read(call, values, call.v_scale), lens
    if call.tnd:
        lens = differences("actual_seq_kvlen", _listed(call.kv_lens), call.key.shape[0])
        return call.key[: sum(lens)].split(lens), call.value[: sum(lens)].split(lens), lens
    keys, lens = _requests(call, call.key, call.kv_heads, call.kv_lens, "actual_seq_kvlen")
    values, _ = _requests(call, call.value, call.kv_heads, call.kv_lens, "actual_seq_kvlen")
    cut = [x[:n] for x, n in zip(keys, lens, strict=True)], [x[:n] for x, n in zip(values, lens, strict=True)]
    return _read(call, cut[0], call.k_scale), _read(call, cut[1], call.v_scale), lens


def _read(call: Call, rows: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """Keys or values `[L, K, D]` of every request as they are meant: int8 ones times the scale of their channel."""
    if scale is None:
        return rows
    return [x.float() * scale.float().view(call.kv_heads, call.head_dim) for x in rows]


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
    """A view of a paged cache of any documented layout as `[blocks, block_size, K, D]`, D of NZ as `D/16, 16`."""
    if cache.dim() == 3:
        return cache.unflatten(2, (call.kv_heads, -1))
    if cache.dim() == 4:
        return cache.transpose(1, 2)
    return cache.permute(0, 3, 1, 2, 4)  # flattened after the gathering: only a part of the cache is copied


def _hidden(call: Call, q_len: int, kv_len: int, index: int) -> Tensor | None:
    """Where a request's keys are not seen, by the sparse mode: 0 own mask, 1 all of it, 2 and 3 causal, 4 a band."""
    ahead = torch.arange(kv_len) - torch.arange(q_len).unsqueeze(1)  # how far a key is ahead of a query, from top left
    if call.mode == 2:
        return ahead > 0
    if call.mode == 3:
        require(
            not kv_len or q_len <= kv_len,
            "with sparse_mode 3 a request must not have more queries than keys",
            [q_len, kv_len],
        )
        return None if q_len <= 1 else ahead > kv_len - q_len
    if call.mode == 4:
        require(
            call.pre_tokens >= -q_len and call.next_tokens >= -kv_len,
            "with sparse_mode 4 pre_tokens must be at least minus a request's queries, next_tokens minus its keys",
            [call.pre_tokens, call.next_tokens, q_len, kv_len],
        )
        ahead = ahead - (kv_len - q_len)
        return (ahead > call.next_tokens) | (-ahead > call.pre_tokens)
    if call.mask is None:
        return None
    own = _own_mask(call, q_len, kv_len, index)
    if call.mode == 1 or call.single:
        return own
    return own | (ahead > call.next_tokens) | (-ahead > call.pre_tokens)


def _own_mask(call: Call, q_len: int, kv_len: int, index: int) -> Tensor:
    """The part of a full mask that is the request's: `[S, L]`, or with a leading B or 1, and maybe a 1 after it."""
    mask = call.mask.bool()
    while mask.dim() > 3:
        mask = mask.squeeze(1)
    if mask.dim() == 2 and call.single:  # [B, L], one row per request
        mask = mask.unsqueeze(1)
    mask = mask if mask.dim() == 2 else mask[index if mask.shape[0] > 1 else 0]
    require(
        mask.shape[0] >= q_len and mask.shape[1] >= kv_len,
        f"atten_mask must cover {q_len} queries and {kv_len} keys",
        list(call.mask.shape),
    )
    return mask[:q_len, :kv_len]


def _listed(lens: Lengths) -> list[int]:
    return lens.tolist() if isinstance(lens, Tensor) else [int(n) for n in lens or ()]
