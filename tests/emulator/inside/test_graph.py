"""torchair's real conversion: decode layers as graphs of known size, collectives, and what cannot be converted."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_npu
import torchair
from torch import Tensor

from emulator import graph
from tests.emulator.helpers import BF16

HIDDEN, DIM, INNER, BLOCKS, SIZE, BATCH = 512, 128, 256, 8, 128, 4


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Qwen3Layer:
    """A dense Qwen3 decode layer of one rank of eight, in the fewest ops that have converters."""

    heads, kv_heads = 4, 1

    def __init__(self) -> None:
        width = (self.heads + 2 * self.kv_heads) * DIM
        self.norms = meta(HIDDEN), meta(HIDDEN)
        self.qk_norms = meta(DIM), meta(DIM)
        self.qkv, self.out = meta(HIDDEN, width), meta(self.heads * DIM, HIDDEN)
        self.up, self.down = meta(HIDDEN, 2 * INNER), meta(INNER, HIDDEN)
        self.q_out = meta(BATCH, self.heads * DIM)
        self.caches = [meta(BLOCKS, self.kv_heads * DIM // 16, SIZE, 16) for _ in range(2)]

    def tensors(self) -> list[Tensor]:
        return [*self.norms, *self.qk_norms, self.qkv, self.out, self.up, self.down, self.q_out, *self.caches]


def layer(x: Tensor, residual: Tensor, step: tuple, w: list[Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin, slots, table, q_lens, kv_lens, mask = step
    norm1, norm2, q_norm, k_norm, qkv, o, up, down, q_out, k_cache, v_cache = w
    x, _, residual = torch_npu.npu_add_rms_norm(x, residual, norm1, 1e-6)
    sizes = [BATCH, 1, 6, DIM], [4, 1, 1]
    torch_npu.npu_qkv_rms_norm_rope_cache(x @ qkv, q_norm, k_norm, cos, sin, slots, q_out, k_cache, v_cache, *sizes)
    pages = [c.view(BLOCKS, 1, DIM // 16, SIZE, 16) for c in (k_cache, v_cache)]
    y, _ = torchair.ops.npu_fused_infer_attention_score_v2(
        q_out.view(BATCH, 4, DIM), *pages, atten_mask=mask, actual_seq_qlen=q_lens, actual_seq_kvlen=kv_lens,
        block_table=table,
        num_query_heads=4, num_key_value_heads=1, softmax_scale=0.1, input_layout="TND", sparse_mode=3, block_size=SIZE,
    )  # fmt: skip
    x = y.view(BATCH, -1) @ o
    dist.all_reduce(x)
    x, _, residual = torch_npu.npu_add_rms_norm(x, residual, norm2, 1e-6)
    x = torch_npu.npu_swiglu(x @ up) @ down
    dist.all_reduce(x)
    return x, residual


def step_inputs() -> tuple:
    return (
        meta(BATCH, DIM), meta(BATCH, DIM), meta(BATCH, dtype=torch.int64), meta(BATCH, 2, dtype=torch.int32),
        meta(BATCH, dtype=torch.int64), meta(BATCH, dtype=torch.int64), meta(2048, 2048, dtype=torch.int8),
    )  # fmt: skip


def decode(x: Tensor, residual: Tensor, step: tuple, layers: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    for weights in layers:
        x, residual = layer(x, residual, step, weights)
    return x, residual


@pytest.fixture
def graphs(a3):
    with graph.fake_world(8):
        made = []
        for count in (1, 2):
            layers = [Qwen3Layer().tensors() for _ in range(count)]
            made.append(graph.convert(decode, meta(BATCH, HIDDEN), meta(BATCH, HIDDEN), step_inputs(), layers))
    return made


def test_a_dense_qwen3_layer_has_eleven_kernels(graphs) -> None:
    added = graph.per_layer(*graphs)
    assert added == Counter(
        AddRmsNorm=2, MatMul=4, QkvRmsNormRopeCache=1, FusedInferAttentionScore=1, SwiGlu=1, HcomAllReduce=2
    )
    assert added.total() == 11 and graphs[1].collectives == {"HcomAllReduce": 4}


def qwen25_attention(x: Tensor, step: tuple, w: dict[str, Tensor]) -> Tensor:
    """Biased qkv, rotary halves, a plain cache written by the scatter op."""
    cos, sin, slots, table, q_lens, kv_lens, mask = step
    qkv = torch.addmm(w["bias"], x, w["qkv"])
    q, k, v = qkv.split([4 * DIM, DIM, DIM], dim=1)
    turn = cos.view(1, BATCH, 1, DIM), sin.view(1, BATCH, 1, DIM)
    q = torch_npu.npu_rotary_mul(q.reshape(1, BATCH, 4, DIM), *turn).view(BATCH, 4, DIM)
    k = torch_npu.npu_rotary_mul(k.reshape(1, BATCH, 1, DIM), *turn).view(BATCH, 1, DIM)
    torch_npu.npu_scatter_pa_kv_cache(k, v.reshape(BATCH, 1, DIM), w["k"], w["v"], slots, cache_mode="Norm")
    pages = [w[name].view(BLOCKS, SIZE, DIM) for name in "kv"]
    y, _ = torchair.ops.npu_fused_infer_attention_score_v2(
        q, *pages, atten_mask=mask, actual_seq_qlen=q_lens, actual_seq_kvlen=kv_lens, block_table=table,
        num_query_heads=4, num_key_value_heads=1, softmax_scale=0.1, input_layout="TND", sparse_mode=3, block_size=SIZE,
    )  # fmt: skip
    return y.view(BATCH, -1)


def qwen25_decode(x: Tensor, residual: Tensor, step: tuple, layers: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    for w in layers:
        x, _, residual = torch_npu.npu_add_rms_norm(x, residual, w["norm1"], 1e-6)
        x = qwen25_attention(x, step, w) @ w["o"]
        dist.all_reduce(x)
        x, _, residual = torch_npu.npu_add_rms_norm(x, residual, w["norm2"], 1e-6)
        x = torch_npu.npu_swiglu(x @ w["up"]) @ w["down"]
        dist.all_reduce(x)
    return x, residual


def qwen25_layer() -> dict[str, Tensor]:
    cache = (BLOCKS, SIZE, 1, DIM)
    shapes = {
        "norm1": (HIDDEN,),
        "norm2": (HIDDEN,),
        "qkv": (HIDDEN, 6 * DIM),
        "bias": (6 * DIM,),
        "o": (4 * DIM, HIDDEN),
    }
    shapes |= {"up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN), "k": cache, "v": cache}
    return {name: meta(*shape) for name, shape in shapes.items()}


def test_a_qwen25_layer_has_fourteen_kernels(a3) -> None:
    with graph.fake_world(8):
        made = [
            graph.convert(qwen25_decode, meta(BATCH, HIDDEN), meta(BATCH, HIDDEN), step_inputs(), layers)
            for layers in ([qwen25_layer()], [qwen25_layer(), qwen25_layer()])
        ]
    added = graph.per_layer(*made)
    assert added.total() == 14, added
    assert added["RotaryMul"] == 2 and added["ScatterPaKvCache"] == 1 and added["HcomAllReduce"] == 2


def moe_mlp(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Renormalised top-k experts over rows that routing sorts."""
    weights, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(x @ w["gate"], None, 2)
    weights = weights / weights.sum(-1, keepdim=True)
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, expert_num=8, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 8]
    )
    call = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    hidden = torch_npu.npu_swiglu(torch_npu.npu_grouped_matmul([rows], [w["up"]], **call)[0])
    out = torch_npu.npu_grouped_matmul([hidden], [w["down"]], **call)[0]
    return torch_npu.npu_moe_finalize_routing(out, None, None, None, weights, index, None, drop_pad_mode=2)


def test_the_experts_of_a_layer_have_nine_kernels(a3) -> None:
    weights = {"gate": meta(HIDDEN, 8), "up": meta(8, HIDDEN, 2 * INNER), "down": meta(8, INNER, HIDDEN)}
    kernels = graph.convert(moe_mlp, meta(BATCH, HIDDEN), weights).kernels
    wanted = Counter(
        MatMul=1, MoeGatingTopKSoftmax=1, ReduceSum=1, RealDiv=1, MoeInitRoutingV3=1, GroupedMatmul=2, SwiGlu=1
    )
    assert kernels == wanted + Counter(MoeFinalizeRoutingV2=1), kernels


def test_a_graph_can_be_saved(graphs, tmp_path) -> None:
    graphs[0].save(tmp_path / "folder" / "graph.pbtxt")
    text = (tmp_path / "folder" / "graph.pbtxt").read_text()
    assert 'type: "QkvRmsNormRopeCache"' in text and 'type: "HcomAllReduce"' in text


def test_literals_are_not_counted(a2) -> None:
    def step(x: Tensor, w: Tensor, groups: Tensor) -> Tensor:
        return torch_npu.npu_grouped_matmul([x], [w], group_list=groups, split_item=2, group_type=0)[0]

    made = graph.convert(step, meta(8, 32), meta(4, 32, 16), meta(4, dtype=torch.int64))
    assert made.kernels == {"GroupedMatmul": 1}
    assert {op.type for op in made.proto.op} & {"Fill", "Cast"}, "the absent optional lists are there, and left out"


def test_an_op_without_a_converter_is_named(a2) -> None:
    def step(x: Tensor, k: Tensor) -> Tensor:
        return torch_npu.npu_top_k_top_p(x, None, k)

    with pytest.raises(RuntimeError, match=r"npu\.npu_top_k_top_p\.default has no converter in torchair"):
        graph.convert(step, meta(2, 64), meta(2, dtype=torch.int32))


def test_a_shape_that_depends_on_data_is_refused(a2) -> None:
    with pytest.raises(RuntimeError, match="cannot convert this step"):
        graph.convert(lambda x: x[x > 0] * 2, meta(4))


def test_conversion_leaves_torchair_as_it_was(a2) -> None:
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter

    before = compat_ir.is_cann_compat, fx2ge_converter.GeConcreteGraph.export
    graph.convert(lambda x: x + 1, meta(4))
    assert before == (compat_ir.is_cann_compat, fx2ge_converter.GeConcreteGraph.export)


def test_the_graph_of_cpu_tensors_is_that_of_meta_tensors(a2) -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        return torch_npu.npu_swiglu(x @ w)

    shapes = (4, 32), (32, 64)
    on_meta = graph.convert(step, *(meta(*s) for s in shapes)).kernels
    assert (
        on_meta
        == graph.convert(step, *(torch.zeros(s, dtype=BF16) for s in shapes)).kernels
        == {"MatMul": 1, "SwiGlu": 1}
    )


def test_torchairs_options_can_be_given(a2) -> None:
    seen = []

    def configure(config) -> None:
        config.experimental_config.frozen_parameter = True
        seen.append(config)

    assert graph.convert(lambda x: x + x, meta(4), configure=configure).kernels.total() == 1
    assert len(seen) == 1


def test_no_thread_of_torch_npu_polls() -> None:
    """A queue of launches would bring two threads, one of which looks for work 10,000 times a second."""
    graph.convert(lambda x: torch_npu.npu_swiglu(x), meta(4, 64))
    names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert not names & {"acl_thread", "release_thread"}, names
