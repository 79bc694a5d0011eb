"""The fused attention ops against attention's formula: packed, padded, paged in every layout, chunks, decode."""

import pytest
import torch
import torch_npu
import torchair

from emulator.formats import to_nz
from emulator.limits import LimitError
from tests.emulator.helpers import BF16, FP16, HALF, blocks_of, close, like_meta, naive, rand, slots_of

MASK = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)
SCALE = 0.11
HEADS = pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])


def cumulative(lengths):
    return torch.tensor(lengths).cumsum(0).tolist()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [64, 3]])
def test_vision_attention(a2, dtype, dim, lengths) -> None:
    total = sum(lengths)
    q, k, v = (rand(total, 4, dim, dtype=dtype, seed=s) for s in range(3))
    out, _ = torch_npu.npu_fused_infer_attention_score(
        q, k, v, actual_seq_lengths=cumulative(lengths), actual_seq_lengths_kv=cumulative(lengths), num_heads=4,
        num_key_value_heads=4, scale=SCALE, input_layout="TND", sparse_mode=0,
    )  # fmt: skip
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    close(out, torch.cat([naive(*part, SCALE, False) for part in parts]))


def pages(layout, k, v, table, blocks, lengths, size):
    """Keys and values of all requests, written into a paged cache of a layout."""
    heads, dim = k.shape[1:]
    slots = slots_of(table, lengths, size)
    made = []
    for rows in (k, v):
        plain = torch.full((blocks, size, heads, dim), float("nan"), dtype=k.dtype)
        plain.view(-1, heads, dim)[slots] = rows
        if layout == "BSH":
            made.append(plain.flatten(2))
        elif layout == "BNSD":
            made.append(plain.transpose(1, 2).contiguous())
        else:
            made.append(to_nz(plain.transpose(1, 2)))
    return made


def expected(q, k, v, q_lens, kv_lens):
    parts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
    return torch.cat([naive(*part, SCALE, True) for part in parts])


@HEADS
@pytest.mark.parametrize("layout", ["BSH", "BNSD", "NZ"])
@pytest.mark.parametrize(
    "q_lens,kv_lens", [([1], [1]), ([1, 1, 1], [17, 16, 130]), ([5, 1, 16], [5, 33, 16]), ([2, 16], [48, 47])]
)
@pytest.mark.parametrize("dtype", HALF)
def test_paged_tnd(a2, heads, layout, q_lens, kv_lens, dtype) -> None:
    size, dim = 16, 64
    q = rand(sum(q_lens), heads[0], dim, dtype=dtype)
    k, v = (rand(sum(kv_lens), heads[1], dim, dtype=dtype, seed=s) for s in (1, 2))
    table, blocks = blocks_of(kv_lens, size)
    caches = pages(layout, k, v, table, blocks, kv_lens, size)
    shared = {"atten_mask": MASK, "block_table": table, "num_query_heads": heads[0], "num_key_value_heads": heads[1]}
    shared |= {"softmax_scale": SCALE, "input_layout": "TND", "sparse_mode": 3, "block_size": size}
    lens = {"actual_seq_qlen": cumulative(q_lens), "actual_seq_kvlen": kv_lens}
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(q, *caches, **shared, **lens)
    close(out, expected(q, k, v, q_lens, kv_lens))
    tensors = {name: torch.tensor(values) for name, values in lens.items()}
    assert torch.equal(torchair.ops.npu_fused_infer_attention_score_v2(q, *caches, **shared, **tensors)[0], out)


def test_prefill_without_a_cache(a3) -> None:
    lengths = [7, 1, 20]
    q, k, v = rand(28, 8, 128), rand(28, 2, 128, seed=1), rand(28, 2, 128, seed=2)
    out, lse = torch_npu.npu_fused_infer_attention_score_v2(
        q, k, v, atten_mask=MASK, actual_seq_qlen=cumulative(lengths), actual_seq_kvlen=cumulative(lengths),
        num_query_heads=8,
        num_key_value_heads=2, softmax_scale=SCALE, input_layout="TND", sparse_mode=3, return_softmax_lse=True,
    )  # fmt: skip
    close(out, expected(q, k, v, lengths, lengths))
    scores = torch.einsum("hd,lhd->hl", q[27].double(), k[8:28].double().repeat_interleave(4, 1)) * SCALE
    close(lse[27, :, 0], scores.logsumexp(-1).float(), 4)
    assert lse.shape == (28, 8, 1)


def test_padding_requests_of_a_graph_step_give_zeros(a2) -> None:
    table, cache = torch.zeros(3, 1, dtype=torch.int32), rand(2, 16, 128)
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        rand(3, 2, 64), cache, cache, atten_mask=MASK, block_table=table, actual_seq_qlen=[1, 2, 3],
        actual_seq_kvlen=[4, 0, 0],
        num_query_heads=2, num_key_value_heads=2, softmax_scale=SCALE, input_layout="TND", sparse_mode=3, block_size=16,
    )  # fmt: skip
    assert out[0].any() and not out[1:].any()


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_padded_layouts(a2, layout, tokens) -> None:
    q, k, v = rand(2, tokens, 4, 32), rand(2, 9, 2, 32, seed=1), rand(2, 9, 2, 32, seed=2)
    arrange = {"BSH": lambda x: x.flatten(2), "BSND": lambda x: x, "BNSD": lambda x: x.transpose(1, 2).contiguous()}[
        layout
    ]
    out, _ = like_meta_first(
        torch_npu.npu_fused_infer_attention_score, *(arrange(x) for x in (q, k, v)), actual_seq_lengths_kv=[9, 7],
        num_heads=4, num_key_value_heads=2, scale=SCALE, input_layout=layout,
    )  # fmt: skip
    wanted = torch.stack([naive(q[i], k[i, :n], v[i, :n], SCALE, False) for i, n in enumerate((9, 7))])
    close(out, arrange(wanted))


def like_meta_first(op, *args, **kwargs):
    like_meta(lambda *a, **k: op(*a, **k)[0], *args, **kwargs)
    return op(*args, **kwargs)


def test_a_mask_of_ones_own(a2) -> None:
    q, k = rand(1, 5, 2, 32), rand(1, 5, 2, 32, seed=1)
    mask = torch.ones(5, 5, dtype=torch.bool).triu_(1)
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        q, k, k, atten_mask=mask, num_query_heads=2, softmax_scale=SCALE, input_layout="BSND"
    )
    close(out[0], naive(q[0], k[0], k[0], SCALE, True))


@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
@pytest.mark.parametrize("soc", ["a2", "duo"])
def test_prompt_flash_attention(request, soc, layout) -> None:
    request.getfixturevalue(soc)
    q, k, v = (rand(2, 6, 4, 32, dtype=FP16, seed=s) for s in range(3))
    arrange = (lambda x: x.flatten(2)) if layout == "BSH" else (lambda x: x.transpose(1, 2).contiguous())
    mask = torch.ones(6, 6, dtype=torch.bool).triu_(1)
    for causal in (True, False):
        out = like_meta(
            torch_npu.npu_prompt_flash_attention, *(arrange(x) for x in (q, k, v)), atten_mask=mask if causal else None,
            num_heads=4, scale_value=SCALE, input_layout=layout,
        )  # fmt: skip
        close(out, arrange(torch.stack([naive(q[i], k[i], v[i], SCALE, causal) for i in range(2)])))


@pytest.mark.parametrize("soc", ["a2", "duo"])
@pytest.mark.parametrize("layout", ["BSH", "BNSD"])
def test_incre_flash_attention_paged(request, soc, layout) -> None:
    request.getfixturevalue(soc)
    lengths, size = [17, 3, 32], 16
    q = rand(3, 4, 32, dtype=FP16)
    k, v = (rand(sum(lengths), 2, 32, dtype=FP16, seed=s) for s in (1, 2))
    table, blocks = blocks_of(lengths, size)
    caches = pages(layout, k, v, table, blocks, lengths, size)
    out = torch_npu.npu_incre_flash_attention(
        q.view(3, 1, 128) if layout == "BSH" else q.unsqueeze(2), *caches, actual_seq_lengths=lengths,
        block_table=table,
        num_heads=4, num_key_value_heads=2, scale_value=SCALE, input_layout=layout, block_size=size,
    )  # fmt: skip
    close(out.view(3, 4, 32), expected(q, k, v, [1, 1, 1], lengths))


def test_bf16_runs_where_the_chip_has_it(a3) -> None:
    assert torch_npu.npu_rms_norm(rand(2, 32), torch.ones(32, dtype=BF16))[0].dtype == BF16


def test_attention_in_inference_mode_and_a_mask_that_changes(a2) -> None:
    with torch.inference_mode():
        q, mask = rand(3, 2, 64), MASK.clone()
        call = {
            "actual_seq_lengths": [3],
            "actual_seq_lengths_kv": [3],
            "num_heads": 2,
            "scale": SCALE,
            "input_layout": "TND",
        }
        out, _ = torch_npu.npu_fused_infer_attention_score(q, q, q, atten_mask=mask, sparse_mode=3, **call)
    close(out, naive(q, q, q, SCALE, True))
    mask = MASK.clone()
    torch_npu.npu_fused_infer_attention_score(q, q, q, atten_mask=mask, sparse_mode=3, **call)
    mask[0, 1] = 0
    with pytest.raises(LimitError, match="above the diagonal"):
        torch_npu.npu_fused_infer_attention_score(q, q, q, atten_mask=mask, sparse_mode=3, **call)


@pytest.mark.parametrize("mode,pre,after", [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 3, 1), (0, 2, 1)])
def test_sparse_modes(a2, mode, pre, after) -> None:
    """A 5 x 8 problem: which keys each mode shows, written out."""
    q, k, v = rand(1, 5, 2, 32), rand(1, 8, 2, 32, seed=1), rand(1, 8, 2, 32, seed=2)
    ahead = torch.arange(8) - torch.arange(5).unsqueeze(1)
    own = torch.rand(5, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    own[:, 0] = False
    hidden = {
        0: own | (ahead > 1) | (-ahead > 2),
        1: own,
        2: ahead > 0,
        3: ahead > 3,
        4: (ahead - 3 > 1) | (-(ahead - 3) > 3),
    }[mode]
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        q, k, v, atten_mask=own if mode < 2 else MASK, num_query_heads=2, softmax_scale=SCALE, input_layout="BSND",
        sparse_mode=mode, pre_tokens=pre, next_tokens=after,
    )  # fmt: skip
    scores = (torch.einsum("thd,lhd->htl", q[0].double(), k[0].double()) * SCALE).masked_fill(hidden, float("-inf"))
    wanted = torch.einsum("htl,lhd->thd", scores.softmax(-1).nan_to_num(0.0), v[0].double())
    close(out[0], wanted)


@pytest.mark.parametrize("mode", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
def test_one_query_token_knows_no_sparse_mode_and_no_band(a2, mode, layout) -> None:
    """Outside TND: neither is a mask needed, nor does a band hide what the own mask shows."""
    q, k = rand(2, 1, 2, 32), rand(2, 8, 2, 32, seed=1)
    turned = {"BSND": lambda x: x, "BNSD": lambda x: x.transpose(1, 2).contiguous(), "BSH": lambda x: x.flatten(2)}
    arrange = turned[layout]
    call = {"num_query_heads": 2, "softmax_scale": SCALE, "input_layout": layout}
    call |= {"sparse_mode": mode, "pre_tokens": 0, "next_tokens": -3}
    own = torch.zeros(2, 8, dtype=torch.bool)
    own[0, 5:] = True
    for mask, seen in ((None, [8, 8]), (own, [5, 8])):
        out, _ = torch_npu.npu_fused_infer_attention_score_v2(*map(arrange, (q, k, k)), atten_mask=mask, **call)
        for i, n in enumerate(seen):
            close(out[i].flatten(), naive(q[i], k[i, :n], k[i, :n], SCALE, False).flatten())


def test_one_token_in_tnd_keeps_its_sparse_mode(a2) -> None:
    q, k = rand(1, 2, 64), rand(8, 2, 64, seed=1)
    call = {"actual_seq_qlen": [1], "actual_seq_kvlen": [8], "num_query_heads": 2, "softmax_scale": SCALE}
    call |= {"input_layout": "TND", "sparse_mode": 4, "atten_mask": MASK, "pre_tokens": 2, "next_tokens": 0}
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(q, k, k, **call)
    close(out, naive(q, k[5:], k[5:], SCALE, False))
    with pytest.raises(LimitError, match="sparse_mode must be 0, 3, 4; got 2"):
        torch_npu.npu_fused_infer_attention_score_v2(q, k, k, **call | {"sparse_mode": 2})


def test_shifted_scores_and_int8_output(a2) -> None:
    q, k, v = (rand(2, 2, 6, 32, dtype=FP16, seed=s) for s in range(3))
    shift, scale = rand(1, 2, 6, 6, dtype=FP16, seed=4), torch.rand(2, 32) * 50 + 10
    call = {"num_heads": 2, "scale": SCALE, "input_layout": "BNSD"}
    plain, _ = torch_npu.npu_fused_infer_attention_score(q, k, v, pse_shift=shift, **call)
    scores = torch.einsum("bhtd,bhld->bhtl", q.double(), k.double()) * SCALE + shift.double()
    wanted = scores.softmax(-1) @ v.double()
    close(plain, wanted, 2)
    turned, _ = torch_npu.npu_fused_infer_attention_score(
        q, k, v, pse_shift=shift, **call | {"input_layout": "BNSD_BSND"}
    )
    assert torch.equal(turned, plain.transpose(1, 2))
    small, _ = torch_npu.npu_fused_infer_attention_score(
        q, k, v, pse_shift=shift, quant_scale2=scale, quant_offset2=torch.full((2, 32), 2.0), **call
    )
    exact = wanted * scale.view(1, 2, 1, 32) + 2
    assert small.dtype == torch.int8 and (small - exact.clamp(-128, 127)).abs().max() < 0.51


FIRST, SECOND = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
FORMS = pytest.mark.parametrize("form", [FIRST, SECOND])
NAMES = {  # query heads, scale, lengths of queries and keys, sums of the softmax
    FIRST: ("num_heads", "scale", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag"),
    SECOND: ("num_query_heads", "softmax_scale", "actual_seq_qlen", "actual_seq_kvlen", "return_softmax_lse"),
}


@FORMS
def test_what_an_acl_graph_calls(a2, form) -> None:
    """One workspace of the largest size, outputs in place, and the same call again with other lengths."""
    lengths, size = [17, 30], 16
    q, k, v = rand(2, 4, 64), rand(47, 2, 64, seed=1), rand(47, 2, 64, seed=2)
    table, blocks = blocks_of(lengths, size)
    caches = pages("BSH", k, v, table, blocks, lengths, size)
    heads, scale, q_lens, kv_lens, lse = NAMES[form]
    call = {
        heads: 4,
        "num_key_value_heads": 2,
        scale: SCALE,
        "input_layout": "TND",
        "sparse_mode": 3,
        "atten_mask": MASK,
    }
    call |= {"block_table": table, "block_size": size, q_lens: [1, 2], kv_lens: lengths}
    plain, op = getattr(torch.ops.npu, form), getattr(torch.ops.npu, form).out
    shaped = {heads: 4, "num_key_value_heads": 2, "input_layout": "TND", "block_table": table}
    for wanted_lse in (False, True):
        call[lse] = shaped[lse] = wanted_lse
        workspace = getattr(torch.ops.npu, f"_{form}_get_max_workspace")(q, *caches, **call)
        assert workspace.dim() == 1 and workspace.dtype == q.dtype
        out = list(getattr(torch.ops.npu, f"_{form}_infer_output")(q, caches[1], **shaped))
        assert out[0].shape == q.shape and out[1].shape == ((2, 4, 1) if wanted_lse else (1,))
        for kv in (lengths, [3, 16]):  # the shorter ones are an update of the captured call
            pointers = [x.data_ptr() for x in out]
            got = op(q, *caches, workspace=workspace, out=out, **call | {kv_lens: kv})
            assert [x.data_ptr() for x in out] == [x.data_ptr() for x in got] == pointers
            wanted = plain(q, *caches, **call | {kv_lens: kv})
            assert torch.equal(out[0], wanted[0]) and (not wanted_lse or torch.equal(out[1], wanted[1]))
    for wrong, message in (
        ({"out": out[:1]}, r"out must be \[attention_out, softmax_lse\]"),
        ({"out": [out[0][:1], out[1]]}, r"out\[0\] must have shape \[2, 4, 64\]"),
        ({"out": [out[0].half(), out[1]]}, r"out\[0\] must be torch.bfloat16"),
        ({"out": [out[0], out[1][0]]}, r"out\[1\] must have shape \[2, 4, 1\]"),
        ({"workspace": workspace.half()}, "workspace must have the dtype of query"),
        ({"workspace": workspace.view(2, -1)}, "workspace must have 1 dimension"),
        ({"block_size": 24}, "block_size must be a multiple of 16"),
    ):
        with pytest.raises(LimitError, match=f"{form} on Atlas 800I A2.*{message}"):
            op(q, *caches, **{"workspace": workspace, "out": out} | call | wrong)


@FORMS
def test_graph_forms_are_not_on_duo(duo, form) -> None:
    q = rand(1, 2, 64, dtype=FP16)
    with pytest.raises(LimitError, match="not available on this chip"):
        getattr(torch.ops.npu, f"_{form}_get_max_workspace")(q, q, q)


ANTIQUANT = {
    FIRST: ("key_antiquant_scale", "value_antiquant_scale"),
    SECOND: ("dequant_scale_key", "dequant_scale_value"),
}
COUNTS = {
    FIRST: ("num_heads", "actual_seq_lengths_kv", "scale"),
    SECOND: ("num_query_heads", "actual_seq_kvlen", "softmax_scale"),
}


def int8_call(form, layout="BNSD", size=32, dtype=BF16, **changes):
    """One query token of two requests over int8 blocks, and what it must give."""
    torch.manual_seed(0)
    heads, dim, lens = 2, 64, [40, 7]
    table, blocks = blocks_of(lens, size)
    k, v = (torch.randint(-128, 128, (sum(lens), heads, dim), dtype=torch.int8) for _ in range(2))
    filled = [torch.zeros(blocks, size, heads, dim, dtype=torch.int8) for _ in range(2)]
    for plain, rows in zip(filled, (k, v), strict=True):
        plain.view(-1, heads, dim)[slots_of(table, lens, size)] = rows
    caches = [plain.flatten(2) for plain in filled]
    scales = [rand(heads, dim, dtype=dtype, seed=seed).abs() / 40 + 0.01 for seed in (5, 6)]
    q = rand(2, 4, dim, dtype=dtype)
    shaped = {
        "BNSD": (q.unsqueeze(2), (1, heads, 1, dim)),
        "BSND": (q.unsqueeze(1), (1, heads, dim)),
        "BSH": (q.flatten(1).unsqueeze(1), (1, heads * dim)),
    }
    query, shape = shaped[layout]
    num, lengths, scale = COUNTS[form]
    call = {num: 4, "num_key_value_heads": heads, lengths: lens, scale: SCALE, "block_table": table, "block_size": size}
    call |= {"input_layout": layout, **dict(zip(ANTIQUANT[form], (x.view(shape) for x in scales), strict=True))}
    wide = [x.double() * scale.double() for x, scale in zip((k, v), scales, strict=True)]
    parts = zip(q.split(1), wide[0].split(lens), wide[1].split(lens), strict=True)
    wanted = torch.cat([naive(*part, SCALE, False) for part in parts])
    return (query, *caches), call | changes, wanted


@FORMS
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
@pytest.mark.parametrize("dtype", HALF)
def test_int8_blocks_of_one_query_token(a2, form, layout, dtype) -> None:
    tensors, call, wanted = int8_call(form, layout, dtype=dtype)
    out, _ = getattr(torch_npu, form)(*tensors, **call)
    close(out.reshape(wanted.shape), wanted, 2)
    if form == FIRST:
        lengths = {"actual_seq_lengths_kv": torch.tensor(call["actual_seq_lengths_kv"])}
        assert torch.equal(torchair.ops.npu_fused_infer_attention_score(*tensors, **(call | lengths))[0], out)


@FORMS
@pytest.mark.parametrize(
    "change, message",
    [
        ({1: None}, "scales of keys and values must be given together"),
        ({0: rand(1, 2, 1, 64).float(), 1: rand(1, 2, 1, 64).float()}, "must have the dtype of query|same dtype"),
        ({0: rand(2, 64), 1: rand(2, 64)}, r"the scale of key must have shape \[1, 2, 1, 64\] or"),
        ({"size": 16}, "with int8 keys block_size must be a multiple of 32; got 16"),
        ({"tokens": 2}, "emulated for one query token"),
    ],
)  # fmt: skip
def test_limits_of_int8_blocks(a2, form, change, message) -> None:
    tensors, call, _ = int8_call(form, size=change.get("size", 32))
    call |= {ANTIQUANT[form][place]: value for place, value in change.items() if place in (0, 1)}
    if "tokens" in change:
        tensors = (tensors[0].expand(-1, -1, 2, -1).contiguous(), *tensors[1:])
    with pytest.raises(LimitError, match=message):
        getattr(torch_npu, form)(*tensors, **call)


@FORMS
def test_int8_keys_need_their_scales(a2, form) -> None:
    tensors, call, _ = int8_call(form)
    plain = {name: value for name, value in call.items() if name not in ANTIQUANT[form]}
    with pytest.raises(LimitError, match="key"):
        getattr(torch_npu, form)(*tensors, **plain)
