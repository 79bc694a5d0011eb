"""npu_prompt_flash_attention and npu_incre_flash_attention: the older attention ops, which 300I DUO has.

Semantics and limits: the ops' docstrings in the torch_npu wheel. Not emulated: quantized inputs, left padding.
"""

from dataclasses import replace

import torch
from torch import Tensor

from emulator import chips
from emulator.kernels.attention_call import MASK, Call, require_countable, run
from emulator.kernels.fused_attention import check_extras
from emulator.limits import (
    HALF,
    refuse,
    require,
    require_contiguous,
    require_dtype,
    require_rank,
    require_same_dtype,
)
from emulator.registry import kernel

_PROMPT_LAYOUTS = {"BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4}
_INCRE_LAYOUTS = {"BSH": 3, "BSND": 4, "BNSD": 4}
_ALL = 2147483647


def _duo() -> bool:
    return chips.current().soc == "atlas_300i_duo"


def _check_common(call: Call, layouts: dict[str, int]) -> None:
    require(
        call.layout in layouts,
        f"input_layout must be one of {', '.join(layouts)} (TND here takes head dim 192 only)",
        call.layout,
    )
    require_rank("query", call.query, layouts[call.layout])
    require_dtype("query", call.query, HALF)
    require_same_dtype("query", call.query, key=call.key, value=call.value)
    require_contiguous(query=call.query, key=call.key, value=call.value, atten_mask=call.mask)
    require(
        tuple(call.key.shape) == tuple(call.value.shape),
        "key and value must have the same shape",
        [list(call.key.shape), list(call.value.shape)],
    )
    require(
        call.heads % call.kv_heads == 0 and call.heads // call.kv_heads <= 64,
        "the key/value heads must divide the query heads, at most 64 to one",
        [call.heads, call.kv_heads],
    )
    require(call.heads <= 256, "there must be at most 256 query heads", call.heads)
    if call.layout != "BSH":
        got = call.query.shape[1 if call.layout.startswith("BNSD") else 2]
        require(got == call.heads, "num_heads must be the heads of query", [got, call.heads])
    require(
        call.head_dim <= 512 and call.head_dim % 16 == 0,
        "the head dim must be a multiple of 16, at most 512",
        call.head_dim,
    )
    if call.mask is not None:
        require_dtype("atten_mask", call.mask, (torch.bool, torch.int8, torch.uint8))
    if _duo():
        refuse(pse_shift=call.shift, quant_scale2=call.out_scale, quant_offset2=call.out_offset)
    check_extras(call)


def _prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = _ALL,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: list[int] | None = None,
    sparse_mode: int = 0,
) -> Call:
    refuse(padding_mask=padding_mask, deq_scale1=deq_scale1, quant_scale1=quant_scale1, deq_scale2=deq_scale2)
    return Call(
        query,
        key,
        value,
        mask=atten_mask,
        q_lens=actual_seq_lengths,
        kv_lens=actual_seq_lengths_kv,
        heads=num_heads,
        kv_heads=num_key_value_heads or num_heads,
        scale=scale_value,
        layout=input_layout,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        shift=pse_shift,
        out_scale=quant_scale2,
        out_offset=quant_offset2,
        prompt=True,
    )


def _check_prompt(*args: Tensor, **kwargs: object) -> None:
    call = _prompt(*args, **kwargs)  # type: ignore[arg-type]
    _check_common(call, _PROMPT_LAYOUTS)
    require(call.sparse_mode in (0, 1, 2, 3, 4), "sparse_mode must be 0 to 4", call.sparse_mode)
    if call.sparse_mode > 1:
        require(
            call.mask is not None and tuple(call.mask.shape[-2:]) == (MASK, MASK),
            f"sparse_mode {call.sparse_mode} needs an atten_mask of {MASK} x {MASK}",
            call.mask,
        )
    require(call.sparse_mode != 1 or call.mask is not None, "sparse_mode 1 needs the whole atten_mask")
    if not _duo():
        require(
            call.layout not in ("BSH", "BSND") or call.heads * call.head_dim < 65535,
            "with BSH and BSND heads * head dim must be below 65535",
            call.heads * call.head_dim,
        )
        return
    require(call.query.shape[0] <= 128, "there must be at most 128 requests", call.query.shape[0])
    require(call.query_tokens <= 65535, "there must be at most 65535 query tokens", call.query_tokens)
    require(
        call.q_lens is None and call.kv_lens is None,
        "actual_seq_lengths and actual_seq_lengths_kv must be None",
        [call.q_lens, call.kv_lens],
    )
    require(
        kwargs.get("num_key_value_heads", 0) == 0, "num_key_value_heads must be 0 (no grouped queries)", call.kv_heads
    )
    require(call.sparse_mode == 0, "sparse_mode must be 0", call.sparse_mode)
    require(call.pre_tokens == _ALL, f"pre_tokens must be {_ALL}", call.pre_tokens)
    require(call.next_tokens in (0, _ALL), f"next_tokens must be 0 or {_ALL}", call.next_tokens)


@kernel("npu_prompt_flash_attention", _check_prompt)
def npu_prompt_flash_attention(*args: Tensor, **kwargs: object) -> Tensor:
    return run(_prompt(*args, **kwargs))[0]  # type: ignore[arg-type]


def _incre(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> Call:
    refuse(padding_mask=padding_mask, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    refuse(dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2)
    refuse(kv_padding_size=kv_padding_size)
    return Call(
        query,
        key,
        value,
        mask=atten_mask,
        kv_lens=actual_seq_lengths,
        block_table=block_table,
        heads=num_heads,
        kv_heads=num_key_value_heads or num_heads,
        scale=scale_value,
        layout=input_layout,
        block_size=block_size,
        inner_precise=inner_precise,
        shift=pse_shift,
        out_scale=quant_scale2,
        out_offset=quant_offset2,
    )


def _check_incre(*args: Tensor, **kwargs: object) -> None:
    call = _incre(*args, **kwargs)  # type: ignore[arg-type]
    _check_common(call, _INCRE_LAYOUTS)
    require(call.query_tokens == 1, "query must have one token per request", call.query_tokens)
    require(call.inner_precise in (0, 1), "inner_precise must be 0 or 1", call.inner_precise)
    batch, limit = call.query.shape[0], 256 if _duo() else 65535
    require(batch <= limit, f"there must be at most {limit} requests", batch)
    require(
        call.kv_lens is None or len(call.kv_lens) in (1, batch),
        f"actual_seq_lengths must have 1 or {batch} entries",
        call.kv_lens,
    )
    if not call.paged:
        require(call.key.dim() == call.query.dim(), "key must have as many dimensions as query", list(call.key.shape))
        return
    require(call.kv_lens is not None, "with block_table actual_seq_lengths must be given")
    require_countable(call)
    require_dtype("block_table", call.block_table, (torch.int32,))
    require_rank("block_table", call.block_table, 2)
    require(
        call.block_table.shape[0] == batch,
        f"block_table must have one row per request, {batch}",
        list(call.block_table.shape),
    )
    require(call.block_size > 0 and call.block_size % 16 == 0, "block_size must be a multiple of 16", call.block_size)
    wide = call.kv_heads * call.head_dim
    shapes = [(call.block_size, wide)] + (
        [(call.kv_heads, call.block_size, call.head_dim)] if call.layout == "BNSD" else []
    )
    allowed = " or ".join(f"[blocks, {', '.join(map(str, s))}]" for s in shapes)
    require(tuple(call.key.shape[1:]) in shapes, f"the paged key must have shape {allowed}", list(call.key.shape))
    require(
        call.key.dim() != 3 or wide <= 65536,
        "heads * head dim of a [blocks, block_size, H] cache must be at most 65536",
        wide,
    )


@kernel("npu_incre_flash_attention", _check_incre)
def npu_incre_flash_attention(*args: Tensor, **kwargs: object) -> Tensor:
    call = _incre(*args, **kwargs)  # type: ignore[arg-type]
    if call.mask is not None and call.mask.dim() > 2:
        call = replace(call, mask=call.mask.flatten(1))
    return run(call)[0]
