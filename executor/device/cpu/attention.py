"""Causal attention over cached keys and values on a CPU.

A row is attended by a call of its own over views of the cache, which reads its keys once. A call has a price of its
own, though: it wakes idle threads, 25 us where they sleep. So decode rows of few tokens are attended by one call
together, over copies of their keys and values.
Cache layout: [blocks, block_size, K, D].
Legend: T tokens, H query heads, K key/value heads, G = H / K, D head dim, L cached tokens.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.device.cpu.int8_cache import Int8Cache, RowBuffer
from executor.device.cpu.tiled_attention import is_worth_tiles, tiled_attention
from executor.device.ops import KVLayer

_FEW_QUERIES = 32  # of a row behind cached tokens; up to here reading keys and values takes longer than the products
_SHORT = 256  # cached tokens of a row that is attended together with others: beyond, copies take longer than calls
_TOGETHER_ROWS, _TOGETHER_TOKENS = 4, 2048  # of a call: rows at least, and cached tokens of all of them at most


@dataclass(slots=True)
class Row:
    """One row's place in the step and in the cache."""

    start: int
    q_len: int
    kv_len: int
    first_slot: int  # of the row's consecutive blocks; -1 where they must be gathered
    blocks: Tensor | None  # int64, set where first_slot is -1
    mask: Tensor | None  # bool [q_len, kv_len], set where 1 < q_len < kv_len

    def slots(self, block_size: int) -> np.ndarray:
        """int64 `[kv_len]`."""
        if self.blocks is None:
            return np.arange(self.first_slot, self.first_slot + self.kv_len)
        return (self.blocks.numpy()[:, None] * block_size + np.arange(block_size)).ravel()[: self.kv_len]

    def cached(self, cache: Tensor) -> Tensor:
        """The row's keys or values `[1, K, L, D]`: a view where its blocks are consecutive."""
        if self.blocks is None:
            heads, dim = cache.shape[2:]
            width = heads * dim
            offset = cache.storage_offset() + self.first_slot * width
            return cache.as_strided((1, heads, self.kv_len, dim), (0, dim, width, 1), offset)
        flat = cache.index_select(0, self.blocks).flatten(0, 1)[: self.kv_len]
        return flat.transpose(0, 1).unsqueeze(0)


class Together:
    """Decode rows that one call attends. What is behind a shorter row's last token is its own first one, masked: a row
    reads nothing of others and nothing that was never written."""

    def __init__(self, rows: Sequence[Row], block_size: int) -> None:
        self._lengths = np.array([row.kv_len for row in rows])
        self._numbers = np.arange(len(rows))
        self._slots = np.empty((len(rows), _SHORT), dtype=np.int64)
        for line, row in zip(self._slots, rows, strict=True):
            line[: row.kv_len] = row.slots(block_size)
            line[row.kv_len :] = line[0]
        starts = [row.start for row in rows]
        are_neighbours = starts[-1] - starts[0] == len(rows) - 1
        self.tokens = slice(starts[0], starts[-1] + 1) if are_neighbours else torch.tensor(starts)
        self._set()

    def _set(self) -> None:
        longest = int(self._lengths.max())
        self.shape = len(self._lengths), longest
        self.slots = torch.from_numpy(self._slots[:, :longest].ravel())
        self.mask: Tensor | None = None  # added to scores, fp32 [rows, 1, 1, L]
        if self._lengths.min() < longest:
            is_behind = np.arange(longest) >= self._lengths[:, None]
            self.mask = torch.from_numpy(np.where(is_behind, np.float32(-np.inf), np.float32(0)))[:, None, None]

    def advance(self, entered: Mapping[int, int]) -> bool:
        """Every row gets a token, in the slot behind its last one or, by its number, in one of `entered`. Whether the
        rows are still few enough tokens; if not, nothing has changed."""
        longest = self.shape[1] + 1
        if longest > _SHORT or longest * len(self._lengths) > _TOGETHER_TOKENS:
            return False
        new = self._slots[self._numbers, self._lengths - 1] + 1
        for number, slot in entered.items():
            new[number] = slot
        self._slots[self._numbers, self._lengths] = new
        self._lengths += 1
        self._set()
        return True

    def cached(self, cache: Tensor, into: RowBuffer) -> Tensor:
        """`[rows, K, L, D]`"""
        copy = into.take((len(self.slots), *cache.shape[2:]), cache.dtype)
        torch.index_select(cache.flatten(0, 1), 0, self.slots, out=copy)
        return copy.unflatten(0, self.shape).transpose(1, 2)


class Copies(threading.local):
    """Memory for keys and values of rows that are attended together: of every thread, as engines may step beside each
    other."""

    def __init__(self) -> None:
        self.buffers = RowBuffer(), RowBuffer()


class Step:
    """The rows of a step: those that are attended together, some by each call, and those that are `alone`."""

    def __init__(self, rows: list[Row], block_size: int) -> None:
        self.rows, self.block_size = rows, block_size
        self.together: list[Together] = []
        self.alone: list[Row] = []
        self._places: dict[int, tuple[Together, int]] = {}  # of a row in the step: where it is attended
        self._part()

    def _part(self) -> None:
        self.together, self.alone, self._places = [], [], {}
        some: list[int] = []
        longest = 0
        for place, row in enumerate(self.rows):
            if row.q_len > 1 or row.kv_len > _SHORT:
                self.alone.append(row)
                continue
            if max(longest, row.kv_len) * (len(some) + 1) > _TOGETHER_TOKENS:
                self._take(some)
                some, longest = [], 0
            some.append(place)
            longest = max(longest, row.kv_len)
        self._take(some)

    def _take(self, places: list[int]) -> None:
        rows = [self.rows[place] for place in places]
        if len(rows) < _TOGETHER_ROWS:
            self.alone += rows
            return
        self.together.append(Together(rows, self.block_size))
        self._places |= {place: (self.together[-1], number) for number, place in enumerate(places)}

    def advance(self, block_tables: Sequence[Sequence[int]], entered: Sequence[int]) -> None:
        """Every row is a decode row and gets a token; `entered`: rows that have come into another block."""
        for row in self.rows:
            row.kv_len += 1
        new_slots: dict[Together, dict[int, int]] = {each: {} for each in self.together}
        for place in entered:
            row, blocks = self.rows[place], block_tables[place]
            last = (row.kv_len - 1) // self.block_size
            if row.first_slot < 0:
                row.blocks = torch.tensor(blocks[: last + 1])
            elif blocks[last] * self.block_size != row.first_slot + last * self.block_size:
                row.first_slot, row.blocks = -1, torch.tensor(blocks[: last + 1])
            if place in self._places:
                together, number = self._places[place]
                new_slots[together][number] = blocks[last] * self.block_size
        if not all([each.advance(slots) for each, slots in new_slots.items()]):
            self._part()


def prepare(
    q_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
) -> Step:
    rows, start = [], 0
    for q_len, kv_len, blocks in zip(q_lens, kv_lens, block_tables, strict=True):
        count, first = -(-kv_len // block_size), blocks[0]
        if len(blocks) > count:
            blocks = blocks[:count]
        together = blocks[-1] - first == count - 1 and blocks == list(range(first, first + count))
        mask = None
        if 1 < q_len < kv_len:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril_(kv_len - q_len)
        first_slot = first * block_size if together else -1
        rows.append(Row(start, q_len, kv_len, first_slot, None if together else torch.tensor(blocks), mask))
        start += q_len
    return Step(rows, block_size)


def attend(
    q: Tensor, cache: KVLayer, step: Step, scale: float, buffers: tuple[RowBuffer, RowBuffer], tiles: bool = False
) -> Tensor:
    """See Ops.paged_attention: `[T, H, D] -> [T, H * D]`.

    `buffers`: for copies of keys and values; `tiles`: many bfloat16 queries by tiled_attention.py.
    """
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = cache.k.shape[2]
    group = num_heads // num_kv_heads
    out = torch.empty(num_tokens, num_heads * dim, dtype=q.dtype)
    scales: Int8Cache | None = cache.scales
    if scales is not None:
        q = scales.scaled_queries(q)
    # The query heads of one KV head stand as query rows: its keys are read once for all of them.
    queries, answers = q.unflatten(1, (num_kv_heads, group)), out.view(num_tokens, num_kv_heads, group, dim)
    for some in step.together:
        k, v = (some.cached(each, into) for each, into in zip((cache.k, cache.v), buffers, strict=True))
        if scales is not None:
            k, v = scales.widened(k, v)
        y = F.scaled_dot_product_attention(queries[some.tokens], k, v, attn_mask=some.mask, scale=scale)
        answers[some.tokens] = y
    for row in step.alone:
        k, v = row.cached(cache.k), row.cached(cache.v)
        if scales is not None:
            k, v = scales.widened(k, v)
        own = slice(row.start, row.start + row.q_len)
        if row.q_len == 1:
            answers[own].copy_(F.scaled_dot_product_attention(queries[own], k, v, scale=scale))
        elif tiles and is_worth_tiles(row.q_len, row.kv_len, q.dtype):
            y = tiled_attention(queries[own].permute(1, 2, 0, 3), k[0], v[0], scale, causal=True)
            answers[own].copy_(y.permute(2, 0, 1, 3))
        elif row.q_len > _FEW_QUERIES or row.mask is None:
            y = F.scaled_dot_product_attention(
                queries[own].flatten(1, 2).transpose(0, 1).unsqueeze(0), k, v, attn_mask=row.mask,
                is_causal=row.mask is None, scale=scale, enable_gqa=True,
            )  # fmt: skip
            answers[own].copy_(y[0].unflatten(0, (num_kv_heads, group)).permute(2, 0, 1, 3))
        else:
            rows = queries[own].permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * row.q_len, dim)
            mask = row.mask.expand(group, -1, -1).flatten(0, 1)
            y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
            answers[own].copy_(y.view(num_kv_heads, group, row.q_len, dim).permute(2, 0, 1, 3))
    return out if scales is None else scales.scaled_values(out)
