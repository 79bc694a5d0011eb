"""Attention and the cache it reads: one class per family of kernels, with the same methods.

`prepare` makes everything that a step's layers share, once, from lists on the host: block table on the device,
lengths where the op wants them. Nothing here reads a device tensor back.
Legend: T tokens, H query heads, K kv heads, D head dim, R rows (requests) of the step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch_npu
import torchair
from torch import Tensor

from executor.device.npu import int8_cache, layout
from executor.device.ops import HeadNorms, Heads, KVLayer, Send

_FUSED_ROWS = 4096  # requests (or packed segments) of one npu_fused_infer_attention_score call
_ATB_ROWS = 2000
_ROOM_BLOCKS = 4  # that a decode step's table has to spare
_TILE = 16  # rows of the 300I DUO's tiles


@dataclass(frozen=True)
class Step:
    """What every layer's attention of one step shares."""

    q_ends: list[int] | Tensor  # cumulative query lengths; int64 [R] on the device in a GE graph
    kv_lens: list[int] | Tensor
    block_table: Tensor  # int32 [R, most blocks], on the device
    block_size: int
    q_lens_host: Tensor | None = None  # int32 [R], for ATB, as is the next
    kv_lens_device: Tensor | None = None
    decodes: bool = False  # every row has one query token
    mask: Tensor | None = None  # for ops that want a row for every token
    host_table: np.ndarray | None = None  # block_table, on the host

    @cached_property
    def split(self) -> int8_cache.Split:
        """Its rows as an int8 cache is read: found by the first layer that asks, for all of them."""
        q_lens = [end - start for start, end in zip([0, *self.q_ends], self.q_ends, strict=False)]
        return int8_cache.split(q_lens, self.kv_lens, self.host_table, self.block_size, self.block_table.device)


def prepare(
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    send: Send,
) -> Step:
    """The step of these rows; each has its own number of blocks, the rest of the table is block 0."""
    needed = [-(-kv_len // block_size) for kv_len in kv_lens]
    decodes = all(q_len == 1 for q_len in q_lens)
    # Decode steps go on in the same table: with room for more blocks it seldom has to be made anew.
    width = max(needed, default=1) + (_ROOM_BLOCKS if decodes else 0)
    table = np.zeros((len(needed), width), dtype=np.int32)
    for row, count, blocks in zip(table, needed, block_tables, strict=True):
        assert len(blocks) >= count, (
            f"{len(blocks)} blocks of {block_size} for {count}"
        )  # numpy would repeat a single one
        row[:count] = blocks[:count]
    return Step(
        q_ends=list(accumulate(q_lens)),
        kv_lens=list(kv_lens),
        block_table=send(table),
        block_size=block_size,
        decodes=decodes,
        host_table=table,
    )


def advanced(
    step: Step,
    kv_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    entered: Sequence[int],
    send: Send,
) -> Step:
    """A decode step's rows one token further; the table is sent again only where rows have `entered` a block."""
    step = replace(step, kv_lens=list(kv_lens))
    if not entered:
        return step
    size, table = step.block_size, step.host_table
    width = max(-(-kv_lens[row] // size) for row in entered)
    if width > table.shape[1]:
        table = np.pad(table, ((0, 0), (0, width - table.shape[1] + _ROOM_BLOCKS)))
    for row in entered:
        last = (kv_lens[row] - 1) // size
        table[row, last] = block_tables[row][last]
    return replace(step, block_table=send(table), host_table=table)


def static(q_len: int, kv_lens: Tensor | Sequence[int], block_table: Tensor, block_size: int) -> Step:
    """Of a decode graph, `q_len` tokens a row; lengths are a tensor (GE), or numbers a replay updates (ACL)."""
    stop = q_len * block_table.shape[0] + 1
    if isinstance(kv_lens, Tensor):
        q_ends = torch.arange(q_len, stop, q_len, device=block_table.device)
    else:
        q_ends = list(range(q_len, stop, q_len))
    return Step(q_ends, kv_lens, block_table, block_size, decodes=q_len == 1)


class FusedAttention:
    """A2 and A3: npu_fused_infer_attention_score_v2 over packed tokens, for prefill, chunks, decode and vision."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mask = layout.triangle(device)

    def complete(self, step: Step, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Step:
        """Nothing is missing: the mask is one for all steps."""
        return step

    def advanced(self, step: Step) -> Step:
        return step

    def caches(self, *sizes: int, dtype: torch.dtype, form: str) -> list[KVLayer]:
        return layout.caches(*sizes, dtype, self.device, form, formatted=False)

    def norm_rope_write(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms, cos: Tensor, sin: Tensor, cache: KVLayer, slots: Tensor
    ) -> Tensor:  # fmt: skip
        """Norms, rotation and the write in one kernel: `qkv [T, (H + 2K) * D] -> q [T, H, D]`. NZ caches, D 128."""
        counts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
        q_out = qkv.new_empty(len(qkv), heads.num_heads * heads.dim) if cache.q_out is None else cache.q_out
        torch_npu.npu_qkv_rms_norm_rope_cache(
            qkv, norms.q, norms.k, cos, sin, slots, q_out, cache.k, cache.v,
            [1, len(qkv), sum(counts), heads.dim], counts, epsilon=norms.eps, cache_mode="PA_NZ",
        )  # fmt: skip
        return q_out.view(-1, heads.num_heads, heads.dim)

    def write(self, k: Tensor, v: Tensor, cache: KVLayer, slots: Tensor) -> None:
        if cache.scales is not None:
            k, v = cache.scales.quantized(k, v)
        torch_npu.npu_scatter_pa_kv_cache(
            key=k.contiguous(),
            value=v.contiguous(),
            key_cache=cache.k,
            value_cache=cache.v,
            slot_mapping=slots,
            cache_mode="PA_NZ" if layout.in_strips(cache) else "Norm",
        )

    def paged(self, q: Tensor, cache: KVLayer, step: Step, scale: float) -> Tensor:
        if cache.scales is not None:
            return self._paged_int8(q, cache, step, scale)
        num_heads, dim = q.shape[1:]
        if not layout.in_strips(cache):
            num_kv_heads = cache.k.shape[2]
            k, v = cache.k.flatten(2), cache.v.flatten(2)  # [blocks, block_size, K*D]
        else:
            num_kv_heads = cache.k.shape[1] * layout.STRIP // dim
            k, v = (x.unflatten(1, (num_kv_heads, -1)) for x in (cache.k, cache.v))  # [blocks, K, D/16, block_size, 16]
        # The same op; torchair's form takes the lengths as tensors.
        ops = torchair.ops if isinstance(step.kv_lens, Tensor) else torch_npu
        out, _ = ops.npu_fused_infer_attention_score_v2(
            q.contiguous(),
            k,
            v,
            atten_mask=self.mask,
            actual_seq_qlen=step.q_ends,
            actual_seq_kvlen=step.kv_lens,
            block_table=step.block_table,
            num_query_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            softmax_scale=scale,
            input_layout="TND",
            sparse_mode=3,
            block_size=step.block_size,
        )
        return out.flatten(1)

    def _paged_int8(self, q: Tensor, cache: KVLayer, step: Step, scale: float) -> Tensor:
        if step.decodes:
            return int8_cache.decode(q, cache, step.kv_lens, step.block_table, step.block_size, scale)
        out, rows = q.new_empty(len(q), q.shape[1] * q.shape[2]), step.split
        if rows.singles is not None:
            table = step.block_table[rows.single_rows]
            y = int8_cache.decode(q[rows.singles], cache, rows.single_lens, table, step.block_size, scale)
            out.index_copy_(0, rows.singles, y)
        for prompts in rows.prompts:
            y = int8_cache.prefill(q[prompts.tokens], cache, prompts, self.mask, scale)
            out.index_copy_(0, prompts.tokens, y)
        return out

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        """The lengths are always given: without them some stacks return averages over the whole pack."""
        parts = []
        for rows, group in _groups(lengths, _FUSED_ROWS):
            ends = list(accumulate(group))
            out, _ = torch_npu.npu_fused_infer_attention_score_v2(
                q[rows].contiguous(),
                k[rows].contiguous(),
                v[rows].contiguous(),
                actual_seq_qlen=ends,
                actual_seq_kvlen=ends,
                num_query_heads=q.shape[1],
                num_key_value_heads=k.shape[1],
                softmax_scale=scale,
                input_layout="TND",
                sparse_mode=0,
            )
            parts.append(out)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


class AtbAttention:
    """300I DUO: ATB's paged attention over NZ caches, one token a row or chunks; fp16.

    Query lengths are read on the host, key lengths on the device.

    `chunk_call`: the op for chunks; releases 2.8 and 2.9 have only the one whose mask has a row for every token.
    """

    def __init__(self, device: torch.device, chunk_call: str) -> None:
        self.device = device
        self.chunk_call = chunk_call
        self.by_rows = not chunk_call.endswith("_v2")
        self.mask = None if self.by_rows else layout.additive_triangle(device)

    def complete(self, step: Step, q_lens: Sequence[int], kv_lens: Sequence[int]) -> Step:
        """The step with its lengths where ATB reads them, and with its mask, where chunks want one of their own."""
        by_rows = self.by_rows and not step.decodes
        return replace(
            step,
            q_lens_host=torch.tensor(q_lens, dtype=torch.int32),
            kv_lens_device=torch.tensor(kv_lens, dtype=torch.int32).to(self.device),
            mask=layout.rows_nz(q_lens, kv_lens, self.device) if by_rows else None,
        )

    def advanced(self, step: Step) -> Step:
        """A completed decode step whose rows are a token further."""
        return replace(step, kv_lens_device=step.kv_lens_device + 1)

    def caches(self, *sizes: int, dtype: torch.dtype, form: str) -> list[KVLayer]:
        assert form == "NZ", f"this chip's caches are NZ, got {form}"
        return layout.caches(*sizes, dtype, self.device, "NZ", formatted=True)

    def write(self, k: Tensor, v: Tensor, cache: KVLayer, slots: Tensor) -> None:
        torch_npu._npu_reshape_and_cache(
            key=k.contiguous(), value=v.contiguous(), key_cache=cache.k, value_cache=cache.v, slot_indices=slots
        )

    def paged(self, q: Tensor, cache: KVLayer, step: Step, scale: float) -> Tensor:
        q = q.contiguous()
        num_heads, dim = q.shape[1:]
        shared = {
            "query": q,
            "key_cache": cache.k,
            "value_cache": cache.v,
            "num_kv_heads": cache.k.shape[1] * layout.STRIP // dim,
            "num_heads": num_heads,
            "scale_value": scale,
            "block_table": step.block_table,
            "context_lens": step.kv_lens_device,
            "out": torch.empty_like(q),
        }
        if step.decodes:
            torch_npu._npu_paged_attention(**shared)
        else:
            mask = step.mask if self.by_rows else self.mask
            getattr(torch_npu, self.chunk_call)(**shared, mask=mask, seq_len=step.q_lens_host)
        return shared["out"].flatten(1)

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        parts = []
        for rows, group in _groups(lengths, _ATB_ROWS):
            total = sum(group)
            pad = -total % _TILE
            padded = [torch.nn.functional.pad(x[rows], (0, 0, 0, 0, 0, pad)).contiguous() for x in (q, k, v)]
            out = torch.empty_like(padded[0])
            torch_npu._npu_flash_attention_unpad(
                query=padded[0],
                key=padded[1],
                value=padded[2],
                seq_len=torch.tensor(group, dtype=torch.int32),
                scale_value=scale,
                num_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                out=out,
            )
            parts.append(out[:total])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _groups(lengths: Sequence[int], most: int) -> Iterator[tuple[slice, list[int]]]:
    """Segments in runs of at most `most`: the rows they cover, and their lengths."""
    start = 0
    for first in range(0, len(lengths), most):
        group = list(lengths[first : first + most])
        end = start + sum(group)
        yield slice(start, end), group
        start = end
