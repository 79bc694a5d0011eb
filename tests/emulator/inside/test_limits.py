"""Wrong arguments that real stacks have let through: each is caught, and the error names op, chip and limit."""

import pytest
import torch
import torch_npu

from emulator import chips
from emulator.activate import activate
from emulator.limits import LimitError
from emulator.record import Recorder
from tests.emulator.emulating import A2, A3, ALL, DUO
from tests.emulator.helpers import BF16, FP16, FP32, rand

MASK = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)


def vision(dim=64, dtype=BF16, q_lens=(3, 8), kv_lens=(3, 8), **changed):
    q = rand(8, 4, dim, dtype=dtype)
    lens = {
        "actual_seq_lengths": list(q_lens) if q_lens else None,
        "actual_seq_lengths_kv": list(kv_lens) if kv_lens else None,
    }
    call = {"num_heads": 4, "num_key_value_heads": 4, "scale": 0.1, "input_layout": "TND"} | lens | changed
    return torch_npu.npu_fused_infer_attention_score(q, q, q, **call)


def decode(**changed):
    cache = rand(4, 16, 256)
    call = {
        "atten_mask": MASK, "block_table": torch.tensor([[0], [1]], dtype=torch.int32), "actual_seq_qlen": [1, 2],
        "actual_seq_kvlen": [9, 5], "num_query_heads": 4, "num_key_value_heads": 4, "softmax_scale": 0.1,
        "input_layout": "TND", "sparse_mode": 3, "block_size": 16,
    }  # fmt: skip
    q = changed.pop("query", rand(2, 4, 64))
    cache = changed.pop("cache", cache)
    return torch_npu.npu_fused_infer_attention_score_v2(q, cache, cache, **call | changed)


def test_head_dim_80_in_packed_attention(a2) -> None:
    vision()
    with pytest.raises(
        LimitError, match=r"^npu_fused_infer_attention_score on Atlas 800I A2 .*head dim must be 64 or 128.*; got 80$"
    ):
        vision(dim=80)


def test_bfloat16_on_300i_duo(duo) -> None:
    for call in (
        lambda: torch_npu.npu_rms_norm(rand(2, 32), rand(32)),
        lambda: torch_npu.npu_swiglu(rand(2, 64)),
        lambda: torch_npu.npu_apply_rotary_pos_emb(*[rand(2, 1, 64)] * 4, "TND", "half"),
        lambda: torch_npu.npu_prompt_flash_attention(*[rand(1, 4, 2, 32)] * 3, num_heads=2, input_layout="BSND"),
        lambda: torch_npu._npu_flash_attention_unpad(
            *[rand(16, 2, 64)] * 3, torch.tensor([16], dtype=torch.int32), 0.1, 2, 2, rand(16, 2, 64)
        ),
        lambda: torch_npu.npu_grouped_matmul(
            [rand(2, 32)], [rand(1, 32, 16)], group_list=torch.tensor([2]), split_item=2, group_type=0
        ),
    ):
        with pytest.raises(LimitError, match="on Atlas 300I DUO.*float16"):
            call()


@pytest.mark.parametrize("missing", [{"q_lens": None}, {"kv_lens": None}, {"q_lens": None, "kv_lens": None}])
def test_vision_attention_without_lengths(a2, missing) -> None:
    with pytest.raises(LimitError, match="with TND the lengths of queries and of keys must be given"):
        vision(**missing)


def test_lists_that_are_not_cumulative(a2) -> None:
    with pytest.raises(LimitError, match=r"actual_seq_qlen must be cumulative.*got \[5, 3\]"):
        vision(q_lens=(5, 3))
    with pytest.raises(LimitError, match="actual_seq_kvlen must be cumulative"):
        vision(kv_lens=(5, 3))
    with pytest.raises(LimitError, match="must not end beyond the 8 tokens"):
        vision(q_lens=(5, 9))


def test_a_cumulative_list_where_each_requests_own_is_wanted(a2) -> None:
    decode()
    with pytest.raises(LimitError, match=r"each request's own length \(not cumulative\), at most 16"):
        decode(actual_seq_kvlen=[9, 17])


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"atten_mask": None}, "sparse_mode 3 needs atten_mask"),
        ({"atten_mask": MASK[:1024, :1024].contiguous()}, r"atten_mask must have shape \[2048, 2048\]"),
        ({"atten_mask": MASK.float()}, "atten_mask must be bool or int8 or uint8"),
        ({"atten_mask": torch.zeros_like(MASK)}, "above the diagonal, and nothing else"),
        ({"sparse_mode": 0}, "atten_mask must be None"),
        ({"sparse_mode": 5}, "sparse_mode must be 0, 3, 4"),
        ({"block_size": 24}, "block_size must be a multiple of 16"),
        ({"block_size": 0}, "block_size must be a multiple of 16"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int64)}, "block_table must be int32"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "one row per request, 2"),
        ({"block_table": torch.tensor([[0], [9]], dtype=torch.int32)}, r"block ids must lie in \[0, 4\)"),
        ({"actual_seq_kvlen": None}, "lengths of queries and of keys must be given"),
        ({"actual_seq_kvlen": [9]}, "one entry per request"),
        ({"num_key_value_heads": 3}, "must divide the query heads"),
        ({"num_query_heads": 8}, "query must have 8 heads"),
        ({"cache": rand(4, 16, 4, 64)}, "the paged key must have shape"),
        ({"cache": rand(4, 16, 256, dtype=FP16)}, "key must have the dtype of query"),
        (
            {"query": rand(2, 4, 64, dtype=FP32), "cache": rand(4, 16, 256, dtype=FP32)},
            "query must be float16 or bfloat16",
        ),
        ({"query": rand(4, 2, 64).transpose(0, 1)}, "query must be contiguous"),
        ({"input_layout": "TDN"}, "input_layout must be one of"),
        ({"inner_precise": 1}, "with TND and bfloat16 inner_precise must be 0; got 1"),
        ({"inner_precise": 4}, "inner_precise must be 0 to 3"),
        ({"sparse_mode": 4, "pre_tokens": 2, "next_tokens": -3}, r"pre_tokens \+ next_tokens must not be negative"),
        (
            {"sparse_mode": 4, "pre_tokens": -2, "next_tokens": 9},
            "pre_tokens must be at least minus a request's queries",
        ),
        ({"sparse_mode": 4, "pre_tokens": 9, "next_tokens": -6}, "next_tokens minus its keys"),
        ({"actual_seq_qlen": [2, 2], "actual_seq_kvlen": [1, 5]}, "more queries than keys"),
    ],
)
def test_decode_arguments(a2, wrong, message) -> None:
    with pytest.raises(LimitError, match=f"npu_fused_infer_attention_score_v2 on Atlas 800I A2.*{message}"):
        decode(**wrong)


def test_precision_of_half_and_of_one_token(a2) -> None:
    half = {"query": rand(2, 4, 64, dtype=FP16), "cache": rand(4, 16, 256, dtype=FP16)}
    decode(**half, inner_precise=3)
    q = rand(2, 1, 4, 64, dtype=FP16)
    call = {"num_query_heads": 4, "input_layout": "BSND"}
    torch_npu.npu_fused_infer_attention_score_v2(q, q, q, inner_precise=1, **call)
    with pytest.raises(LimitError, match="inner_precise must be 0 to 1 with one query token; got 2"):
        torch_npu.npu_fused_infer_attention_score_v2(q, q, q, inner_precise=2, **call)


def test_a_paged_cache_is_counted_in_int32(a2) -> None:
    """2^31 elements are one too many, in whichever layout; seen without the memory."""
    table = torch.zeros(2, 1, dtype=torch.int32, device="meta")
    for layout, shape in (("TND", (16, 128, 64)), ("TND", (16, 4, 128, 16)), ("BNSD", (16, 128, 64))):
        q = torch.empty((2, 16, 64) if layout == "TND" else (2, 16, 1, 64), dtype=BF16, device="meta")
        per_block = torch.Size(shape).numel()
        call = {"num_query_heads": 16, "num_key_value_heads": 16, "input_layout": layout, "block_size": 128}
        call |= {"block_table": table, "actual_seq_qlen": [1, 2], "actual_seq_kvlen": [9, 5]}
        for blocks, fits in ((2**31 // per_block - 1, True), (2**31 // per_block, False)):
            cache = torch.empty(blocks, *shape, dtype=BF16, device="meta")
            with Recorder(check="collect") as seen:
                torch_npu.npu_fused_infer_attention_score_v2(q, cache, cache, **call)
            assert [("counted in int32" in text) for text in seen.violations] == [True] * (not fits), seen.violations
    with Recorder(check=True), pytest.raises(LimitError, match="npu_incre_flash_attention.*counted in int32"):
        torch_npu.npu_incre_flash_attention(
            q, cache, cache, actual_seq_lengths=[9, 5], block_table=table, num_heads=16, input_layout="BNSD",
            block_size=128,
        )  # fmt: skip


def test_block_sizes_of_chunks_in_padded_layouts(a2) -> None:
    cache, table = rand(2, 16, 256), torch.zeros(1, 1, dtype=torch.int32)
    call = {
        "num_query_heads": 4,
        "actual_seq_kvlen": [4],
        "input_layout": "BSND",
        "block_table": table,
        "block_size": 16,
    }
    torch_npu.npu_fused_infer_attention_score_v2(rand(1, 1, 4, 64), cache, cache, **call)
    with pytest.raises(LimitError, match="block_size must be 128, 256, 384 or 512"):
        torch_npu.npu_fused_infer_attention_score_v2(rand(1, 3, 4, 64), cache, cache, **call)


@pytest.mark.parametrize("soc,op,call", [
    (DUO, "npu_fused_infer_attention_score", vision),
    (DUO, "npu_qkv_rms_norm_rope_cache", None),
    (DUO, "npu_scatter_pa_kv_cache", None),
    (DUO, "npu_add_rms_norm_dynamic_quant", None),
    (DUO, "npu_top_k_top_p", lambda: torch_npu.npu_top_k_top_p(rand(1, 4, dtype=FP16), rand(1, dtype=FP16))),
    (A3, "npu_mm_all_reduce_base", lambda: torch_npu.npu_mm_all_reduce_base(rand(2, 16), rand(16, 2), "g")),
])  # fmt: skip
def test_ops_a_chip_does_not_have(soc, op, call) -> None:
    chip = activate(soc)
    found = chips.support(op, chip)
    assert not found.allowed
    if call is not None:
        with pytest.raises(LimitError, match=f"{op} on {chip.title}.*not available on this chip"):
            call()


def test_undocumented_ops_are_reported_with_a_source(a3) -> None:
    unsupported, undocumented = chips.report(
        ["npu_swiglu", "npu_rms_norm", "npu_mm_all_reduce_base", "npu_moe_finalize_routing"], a3
    )
    assert [s.op for s in unsupported] == ["npu_mm_all_reduce_base"]
    assert [s.op for s in undocumented] == ["npu_moe_finalize_routing", "npu_swiglu"]
    assert all(s.source for s in undocumented)


@pytest.mark.parametrize("soc", ALL)
def test_every_override_is_needed(soc) -> None:
    """An override of what the pages already allow, or forbid, would be a lie."""
    chip = chips.chip_of(soc)
    for op, (socs, source) in chips._overrides().items():
        assert source and set(socs) <= set(chips.CHIPS)
        if soc in socs:
            assert chips.support(op, chip).verdict == "undocumented", op


@pytest.mark.parametrize("wrong,message", [
    ({"dim": 80}, "last dimension must be 64 or 128"),
    ({"dtype": torch.float64}, "query must be float16 or bfloat16 or float32"),
    ({"layout": "BNSD"}, "layout must be 'BSND' or 'TND'"),
    ({"mode": "interleave"}, "rotary_mode must be 'half'"),
    ({"cos": rand(3, 1, 64)}, r"cos must have shape \[2, 1, 64\]"),
    ({"cos": rand(2, 1, 128)}, "head dim, 64"),
    ({"rows": 0}, "must not be empty"),
])  # fmt: skip
def test_rope_arguments(a2, wrong, message) -> None:
    dim, dtype, rows = wrong.get("dim", 64), wrong.get("dtype", BF16), wrong.get("rows", 2)
    q, cos = rand(rows, 4, dim, dtype=dtype), wrong.get("cos", rand(rows, 1, dim, dtype=dtype))
    with pytest.raises(LimitError, match=message):
        torch_npu.npu_apply_rotary_pos_emb(
            q, q.clone(), cos, cos, wrong.get("layout", "TND"), wrong.get("mode", "half")
        )


def test_norm_arguments(a2) -> None:
    for call, message in (
        (lambda: torch_npu.npu_rms_norm(rand(2, 32), rand(16)), "gamma must have the trailing shape"),
        (
            lambda: torch_npu.npu_rms_norm(rand(2, 32), rand(32, dtype=FP32)),
            "gamma must have the dtype of x, bfloat16; got float32",
        ),
        (lambda: torch_npu.npu_rms_norm(rand(32), rand(32)), "2 to 8 dimensions"),
        (lambda: torch_npu.npu_add_rms_norm(rand(2, 32), rand(1, 32), rand(32)), r"x2 must have shape \[2, 32\]"),
        (lambda: torch_npu.npu_swiglu(rand(2, 31)), "must be even"),
    ):
        with pytest.raises(LimitError, match=message):
            call()


def test_duo_swiglu_wants_32(duo) -> None:
    with pytest.raises(LimitError, match="multiple of 32; got 48"):
        torch_npu.npu_swiglu(rand(2, 48, dtype=FP16))


def test_duo_prompt_attention(duo) -> None:
    q = rand(1, 4, 2, 32, dtype=FP16)
    for wrong, message in (
        ({"sparse_mode": 3, "atten_mask": MASK.bool()}, "sparse_mode must be 0"),
        ({"actual_seq_lengths": [4]}, "actual_seq_lengths and actual_seq_lengths_kv must be None"),
        ({"num_key_value_heads": 1}, "heads"),
        ({"next_tokens": 5}, "next_tokens must be 0"),
    ):
        with pytest.raises(LimitError, match=message):
            torch_npu.npu_prompt_flash_attention(q, q, q, **{"num_heads": 2, "input_layout": "BSND"} | wrong)


def test_grouped_matmul_arguments(a2) -> None:
    def call(**changed):
        given = {"group_list": torch.tensor([2, 5]), "split_item": 2, "group_type": 0, "group_list_type": 0} | changed
        return torch_npu.npu_grouped_matmul([rand(5, 32)], [rand(2, 32, 16)], **given)

    call()
    for wrong, message in (
        ({"group_list": torch.tensor([5, 2])}, r"group_list must be cumulative \(not decreasing\); got \[5, 2\]"),
        ({"group_list": torch.tensor([3, 4]), "group_list_type": 1}, "must add up to x's 5 rows"),
        ({"group_list": torch.tensor([5])}, "one entry per weight, 2"),
        ({"group_type": -1}, "with group_type -1 group_list must be None"),
        ({"group_type": 2}, "group_type must be 0"),
        ({"split_item": 0}, "split_item must be 2 or 3"),
    ):
        with pytest.raises((LimitError, RuntimeError), match=message):
            call(**wrong)


def test_the_chip_can_be_switched() -> None:
    assert [activate(soc).acl_name for soc in (A2, DUO, A3, A2)] == [
        "Ascend910B4",
        "Ascend310P3",
        "Ascend910_9391",
        "Ascend910B4",
    ]
    assert torch_npu.npu.get_device_name(0) == "Ascend910B4"
