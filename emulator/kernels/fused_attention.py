"""npu_fused_infer_attention_score, first and second form; what ACL graphs call of them; lengths as tensors (torchair).

Semantics and limits: the ops' docstrings in the torch_npu wheel; for TND with a paged cache, head dim 64 and NZ
caches, which those docstrings leave out, the newer pages of torch_npu's op reference (op-plugin 26 / CANN 9).
Not emulated, though documented: MLA (query_rope), quantized queries, int8 keys and values but those of one query token
with scales by channel and no offsets (whose sign no page says), shared prefix, left padding, attention sinks, the NTD
layouts, sparse mode 9.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from emulator.kernels.attention_call import MASK, Call, require_countable, run
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

_TND_TOKENS = 1 << 20
_WORKSPACE = 1 << 10
_LAYOUTS = {"BSH": 3, "BSND": 4, "BNSD": 4, "BNSD_BSND": 4, "TND": 3}


def check(call: Call) -> None:
    """The limits that shapes and plain arguments show."""
    require(call.layout in _LAYOUTS, f"input_layout must be one of {', '.join(_LAYOUTS)}", call.layout)
    require_rank("query", call.query, _LAYOUTS[call.layout])
    require_dtype("query", call.query, HALF)
    if call.k_scale is None and call.v_scale is None:
        require_same_dtype("query", call.query, key=call.key, value=call.value)
    else:
        _check_int8_keys(call)
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
    _check_precision(call)
    _check_head_dim(call)
    _check_mask(call)
    _check_lengths(call)
    check_extras(call)
    if call.paged:
        _check_paged(call)
    else:
        axis = {"TND": 1, "BSND": 2, "BSH": None}.get(call.layout, 1)
        got = call.key.shape[axis] if axis is not None else call.key.shape[2] // call.head_dim
        require(got == call.kv_heads, f"key must have {call.kv_heads} heads", list(call.key.shape))


def _check_int8_keys(call: Call) -> None:
    """Keys and values in int8 with a scale for every channel, which the branch for one query token takes."""
    require(
        call.k_scale is not None and call.v_scale is not None,
        "the scales of keys and values must be given together",
        [call.k_scale is not None, call.v_scale is not None],
    )
    require(not call.tnd, "TND does not take scales of keys and values")
    require(call.single, "scales by channel are emulated for one query token", call.query_tokens)
    require_dtype("key", call.key, (torch.int8,))
    require_dtype("value", call.value, (torch.int8,))
    heads, dim = call.kv_heads, call.head_dim
    shapes = ((1, heads, 1, dim), (1, heads, dim), (1, heads * dim))
    for name, scale in (("key", call.k_scale), ("value", call.v_scale)):
        require_same_dtype("query", call.query, **{f"the scale of {name}": scale})
        require(
            tuple(scale.shape) in shapes,
            f"the scale of {name} must have shape {' or '.join(str(list(shape)) for shape in shapes)}",
            list(scale.shape),
        )
    require(
        tuple(call.k_scale.shape) == tuple(call.v_scale.shape),
        "the scales of keys and values must have one shape",
        [list(call.k_scale.shape), list(call.v_scale.shape)],
    )
    if call.paged:
        require(call.key.dim() != 5, "NZ blocks of int8 are not emulated (documented for few head counts)")
        require(call.block_size % 32 == 0, "with int8 keys block_size must be a multiple of 32", call.block_size)


def _check_precision(call: Call) -> None:
    allowed = (0, 1) if call.single else (0, 1, 2, 3)
    one = " with one query token" if call.single else ""
    require(call.inner_precise in allowed, f"inner_precise must be 0 to {allowed[-1]}{one}", call.inner_precise)
    require(
        not call.tnd or call.query.dtype != torch.bfloat16 or call.inner_precise == 0,
        "with TND and bfloat16 inner_precise must be 0",
        call.inner_precise,
    )


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
        require(
            call.query_tokens <= _TND_TOKENS, f"with TND there must be at most {_TND_TOKENS} tokens", call.query_tokens
        )
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
    modes = (0, 3, 4) if call.tnd else (0, 1, 2, 3, 4)
    require(call.mode in modes, f"sparse_mode must be {', '.join(map(str, modes))}", call.sparse_mode)
    if call.mask is not None:
        require_dtype("atten_mask", call.mask, (torch.bool, torch.int8, torch.uint8))
    mode = call.mode
    if mode == 4:
        require(
            call.pre_tokens + call.next_tokens >= 0,
            "with sparse_mode 4 pre_tokens + next_tokens must not be negative",
            [call.pre_tokens, call.next_tokens],
        )
    if mode in (2, 3, 4):
        require(call.mask is not None, f"sparse_mode {mode} needs atten_mask, the {MASK} x {MASK} upper triangle")
        shape = tuple(call.mask.shape)
        require(
            shape in ((MASK, MASK), (1, MASK, MASK), (1, 1, MASK, MASK)),
            f"with sparse_mode {mode} atten_mask must have shape [{MASK}, {MASK}]",
            list(shape),
        )
    elif call.tnd:
        refuse(atten_mask=call.mask)
    require(mode != 1 or call.mask is not None, "sparse_mode 1 needs the whole atten_mask")


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
    require_countable(call)
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


def check_extras(call: Call) -> None:
    """pse_shift and int8 output."""
    if call.shift is not None:
        require(not call.tnd, "pse_shift must be None with TND")
        require_same_dtype("query", call.query, pse_shift=call.shift)
        require_rank("pse_shift", call.shift, 4)
        require(
            call.shift.shape[0] in (1, call.batch) and call.shift.shape[1] == call.heads,
            f"pse_shift must have shape [1 or {call.batch}, {call.heads}, queries, keys]",
            list(call.shift.shape),
        )
    if call.out_scale is None:
        refuse(quant_offset_out=call.out_offset)
        return
    require(not call.tnd, "an int8 output is not for TND")
    require(
        call.mode != 4 or min(call.pre_tokens, call.next_tokens) >= 0,
        "with an int8 output and sparse_mode 4 pre_tokens and next_tokens must not be negative",
        [call.pre_tokens, call.next_tokens],
    )
    wide = (torch.float32, torch.bfloat16) if call.query.dtype == torch.bfloat16 else (torch.float32,)
    require_dtype("the output's scale", call.out_scale, wide)
    channels = call.heads * call.head_dim
    require(
        call.out_scale.numel() in (1, channels),
        f"the output's scale must have 1 or {channels} values",
        list(call.out_scale.shape),
    )
    if call.out_offset is not None:
        require_same_dtype("the output's scale", call.out_scale, offset=call.out_offset)
        require_shape("the output's offset", call.out_offset, *call.out_scale.shape)


_SHARED = {
    "mask": "atten_mask", "shift": "pse_shift", "block_table": "block_table", "layout": "input_layout",
    "sparse_mode": "sparse_mode", "block_size": "block_size", "inner_precise": "inner_precise",
    "pre_tokens": "pre_tokens", "next_tokens": "next_tokens",
}  # fmt: skip
_SECOND = _SHARED | {
    "q_lens": "actual_seq_qlen", "kv_lens": "actual_seq_kvlen", "heads": "num_query_heads", "scale": "softmax_scale",
    "lse": "return_softmax_lse", "out_scale": "quant_scale_out", "out_offset": "quant_offset_out",
    "k_scale": "dequant_scale_key", "v_scale": "dequant_scale_value",
}  # fmt: skip
_FIRST = _SHARED | {
    "q_lens": "actual_seq_lengths", "kv_lens": "actual_seq_lengths_kv", "heads": "num_heads", "scale": "scale",
    "lse": "softmax_lse_flag", "out_scale": "quant_scale2", "out_offset": "quant_offset2",
    "k_scale": "key_antiquant_scale", "v_scale": "value_antiquant_scale",
}  # fmt: skip


def _call(names: dict[str, str], query: Tensor, key: Tensor, value: Tensor, **given: object) -> Call:
    """The op's arguments by the call's names; whatever else is given and not its default has no semantics here."""
    fields = {field: given.pop(name) for field, name in names.items() if given.get(name) is not None}
    fields["kv_heads"] = given.pop("num_key_value_heads", 0) or fields.get("heads", 1)
    refuse(**{name: value or None for name, value in given.items() if not isinstance(value, Tensor)})
    refuse(**{name: value for name, value in given.items() if isinstance(value, Tensor)})
    return Call(query, key, value, **fields)  # type: ignore[arg-type]


def _check_second(*args: Tensor, **given: object) -> None:
    check(_call(_SECOND, *args, **given))


def _check_first(*args: Tensor, **given: object) -> None:
    check(_call(_FIRST, *args, **given))


@kernel("npu_fused_infer_attention_score_v2", _check_second)
@kernel("npu_fused_infer_attention_score_v2", _check_second, namespace="air")
def npu_fused_infer_attention_score_v2(*args: Tensor, **given: object) -> tuple[Tensor, Tensor]:
    return run(_call(_SECOND, *args, **given))


@kernel("npu_fused_infer_attention_score", _check_first)
@kernel("npu_fused_infer_attention_score", _check_first, namespace="air")
def npu_fused_infer_attention_score(*args: Tensor, **given: object) -> tuple[Tensor, Tensor]:
    return run(_call(_FIRST, *args, **given))


def _check_out(
    names: dict[str, str], *args: Tensor, out: list[Tensor], workspace: Tensor | None = None, **given: object
) -> None:
    """The forms that write where they are told: ACL graphs capture them and call them again with other lengths."""
    call = _call(names, *args, **given)
    check(call)
    require(len(out) == 2, "out must be [attention_out, softmax_lse]", len(out))
    if workspace is not None:
        require_rank("workspace", workspace, 1)
        require_same_dtype("query", call.query, workspace=workspace)
    require_shape("out[0]", out[0], *_out_shape(call))
    wanted = call.query.dtype if call.out_scale is None else torch.int8
    require(out[0].dtype == wanted, f"out[0] must be {wanted}", out[0].dtype)
    require_contiguous(attention_out=out[0])
    if call.lse:
        require_shape("out[1]", out[1], *_lse_shape(call))
        require_dtype("out[1]", out[1], (torch.float32,))


def _out_shape(call: Call) -> tuple[int, ...]:
    """Of the output: the query's, turned where the layout says so. Key and value have one head dim here."""
    shape = call.query.shape
    return (shape[0], shape[2], shape[1], shape[3]) if call.layout == "BNSD_BSND" else tuple(shape)


def _lse_shape(call: Call) -> tuple[int, ...]:
    if not call.lse:
        return (1,)
    if call.tnd:
        return (call.query_tokens, call.heads, 1)
    return (call.query.shape[0], call.heads, call.query_tokens, 1)


def _write(
    names: dict[str, str], *args: Tensor, out: list[Tensor], workspace: Tensor | None = None, **given: object
) -> tuple[Tensor, Tensor]:
    call = _call(names, *args, **given)
    result, sums = run(call)
    out[0].copy_(result)
    if call.lse:
        out[1].copy_(sums)
    return out[0], out[1]


def _workspace(query: Tensor, *_: Tensor, **__: object) -> Tensor:
    """Of the largest size that any lengths need; how large that is only CANN knows."""
    return query.new_zeros(_WORKSPACE)


def _inferred(names: dict[str, str], query: Tensor, value: Tensor, **given: object) -> tuple[Tensor, Tensor]:
    """Empty outputs for the .out form."""
    call = _call(names, query, value, value, **{name: x for name, x in given.items() if name != "block_table"})
    kind = query.dtype if call.out_scale is None else torch.int8
    return query.new_empty(_out_shape(call), dtype=kind), query.new_empty(_lse_shape(call), dtype=torch.float32)


def _enter(name: str, names: dict[str, str], checked: Callable[..., None]) -> None:
    """The three beside an op: its .out form, its workspace and the outputs to give it. They have no meta kernels."""
    written = functools.partial(_write, names)
    kernel(f"{name}.out", functools.partial(_check_out, names), lambda *_, out, **__: (out[0], out[1]))(written)
    kernel(f"_{name}_get_max_workspace", checked, _workspace)(_workspace)
    inferred = functools.partial(_inferred, names)
    kernel(f"_{name}_infer_output", None, inferred)(inferred)


_enter("npu_fused_infer_attention_score", _FIRST, _check_first)
_enter("npu_fused_infer_attention_score_v2", _SECOND, _check_second)
