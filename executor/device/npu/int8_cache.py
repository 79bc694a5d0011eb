"""Int8 keys and values on A2 and A3, in plain blocks `[blocks, block_size, K, D]`, symmetric scales by channel.

What the op pages allow decides how they are read. One query token a row: npu_fused_infer_attention_score over int8
blocks, scales in the type of the queries. Its first form: installations are said to refuse this mixture in the second,
whose page allows it as well. More query tokens: "page attention does not support" int8 keys with float queries, so the
keys and values of those rows are gathered and made floats, and attended as packed tokens.
NZ blocks, which npu_qkv_rms_norm_rope_cache could fill in int8, are documented for four pairs of head counts only, none
of which a rank of these models has but on one chip: norm, rotation, quantization and write are ops of their own.
Legend: T tokens, H query heads, K key/value heads, D head dim, R rows (requests), L cached tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch_npu
import torchair
from torch import Tensor

from executor.device.ops import KVLayer, KVScales
from executor.device.table import INT8_READ_TOKENS


@dataclass(frozen=True, eq=False)
class Int8Scales:
    """One layer's scales, as the ops take them. Writing uses what attention reads: scales rounded to its type."""

    k_step: Tensor  # float32 [K * D]
    v_step: Tensor
    k_read: Tensor  # [1, K, 1, D] in the type of the queries
    v_read: Tensor

    @staticmethod
    def of(scales: KVScales, dtype: torch.dtype, device: torch.device) -> "Int8Scales":
        for offset in (scales.k_offset, scales.v_offset):
            assert offset.is_meta or not offset.any(), "offsets are refused when they are loaded"
        reads = [x.to(device, dtype)[None, :, None].contiguous() for x in (scales.k_scale, scales.v_scale)]
        return Int8Scales(*(x.float().flatten() for x in reads), *reads)

    def quantized(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, K, D]` each, as int8."""
        pairs = zip((k, v), (self.k_step, self.v_step), strict=True)
        y = (torch_npu.npu_quantize(x.flatten(1), step, None, torch.qint8, axis=1) for x, step in pairs)
        k8, v8 = (x.unflatten(1, k.shape[1:]) for x in y)
        return k8, v8


@dataclass(frozen=True, eq=False)
class Prompts:
    """Rows of a step with more than one query token, read together."""

    tokens: Tensor  # int64 [T]: of the step
    q_ends: list[int]
    slots: Tensor  # int64 [L]: of all they have cached
    kv_ends: list[int]


@dataclass(frozen=True, eq=False)
class Split:
    """A step's rows by how they are read."""

    singles: Tensor | None  # int64: tokens of rows that have one
    single_rows: Tensor | None  # int64: their rows
    single_lens: list[int]
    prompts: list[Prompts]


def split(q_lens: Sequence[int], kv_lens: Sequence[int], table: np.ndarray, block_size: int, to: torch.device) -> Split:
    """`table` [R, blocks], on the host."""
    starts = [0, *accumulate(q_lens)]
    single = [row for row, q_len in enumerate(q_lens) if q_len == 1]
    several = [row for row, q_len in enumerate(q_lens) if q_len > 1]

    def sent(numbers: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(to)

    prompts = []
    for rows in _together(several, kv_lens):
        places = [np.arange(kv_lens[row]) for row in rows]
        slots = [
            table[row][place // block_size].astype(np.int64) * block_size + place % block_size
            for row, place in zip(rows, places, strict=True)
        ]
        tokens = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
        prompts.append(
            Prompts(
                sent(tokens),
                list(accumulate(q_lens[row] for row in rows)),
                sent(np.concatenate(slots)),
                list(accumulate(kv_lens[row] for row in rows)),
            )
        )
    return Split(
        sent([starts[row] for row in single]) if single else None,
        sent(single) if single else None,
        [kv_lens[row] for row in single],
        prompts,
    )


def _together(rows: Sequence[int], kv_lens: Sequence[int]) -> Iterator[list[int]]:
    """Runs of rows with at most INT8_READ_TOKENS cached tokens, or one row."""
    group: list[int] = []
    for row in rows:
        if group and sum(kv_lens[each] for each in (*group, row)) > INT8_READ_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def decode(
    q: Tensor, cache: KVLayer, kv_lens: Tensor | list[int], block_table: Tensor, block_size: int, scale: float
) -> Tensor:
    """One query token a row: `[R, H, D] -> [R, H * D]`; lengths are a tensor in a GE graph."""
    scales: Int8Scales = cache.scales
    ops = torchair.ops if isinstance(kv_lens, Tensor) else torch_npu
    out, _ = ops.npu_fused_infer_attention_score(
        q.contiguous().unsqueeze(2),
        cache.k.flatten(2),
        cache.v.flatten(2),
        key_antiquant_scale=scales.k_read,
        value_antiquant_scale=scales.v_read,
        actual_seq_lengths_kv=kv_lens,
        block_table=block_table,
        num_heads=q.shape[1],
        num_key_value_heads=cache.k.shape[2],
        scale=scale,
        input_layout="BNSD",
        block_size=block_size,
    )
    return out.flatten(1)


def prefill(q: Tensor, cache: KVLayer, rows: Prompts, mask: Tensor, scale: float) -> Tensor:
    """The rows' tokens `[T, H, D] -> [T, H * D]` over all they have cached, as floats."""
    scales: Int8Scales = cache.scales
    k, v = (
        held.flatten(0, 1).index_select(0, rows.slots).to(q.dtype).mul_(read.squeeze(2))
        for held, read in ((cache.k, scales.k_read), (cache.v, scales.v_read))
    )
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        q,
        k,
        v,
        atten_mask=mask,
        actual_seq_qlen=rows.q_ends,
        actual_seq_kvlen=rows.kv_ends,
        num_query_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=3,
    )
    return out.flatten(1)
