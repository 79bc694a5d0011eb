"""The int8 KV cache on emulated chips: ops against the CPU's, engines against the CPU's engine, the decode graph."""

import logging
from collections import Counter

import pytest
import torch

from emulator.graph import per_layer
from emulator.record import Recorder
from executor.device.npu import int8_cache
from executor.device.ops import KVScales
from executor.device.table import INT8_READ_TOKENS
from executor.schedule.request import SamplingParams
from tests.device.inside.npu import A2, A3, CPU, backend, engine_on, exact, true_size
from tests.device.inside.test_ops import ROWS
from tests.device.inside.test_verify import RaggedOracle, counted
from tests.emulator.helpers import close, rand
from tests.models.test_generation import CASES
from tests.quant.c8 import add_scales, observed
from tests.reference import random_checkpoint

BLOCK_SIZE = 32
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=0.0)
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def scales_of(heads: int, dim: int, dtype: torch.dtype) -> KVScales:
    """Symmetric, exact in `dtype`: then the CPU and the ops mean the same numbers."""
    k, v = ((rand(heads, dim, dtype=torch.float32, seed=seed).exp() / 40).to(dtype).float() for seed in (1, 2))
    return KVScales(k, torch.zeros_like(k), v, torch.zeros_like(v))


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("soc, dtype", [(A2, torch.bfloat16), (A3, torch.float16)])
def test_what_is_written_and_read(soc, dtype, case, heads) -> None:
    """Every row reads what it reads on the CPU; the numbers in the cache are the CPU's."""
    device, (q_lens, kv_lens) = backend(soc), ROWS[case]
    num_heads, num_kv_heads = heads
    dim, scale = 128, 0.05
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(-(-kv_len // BLOCK_SIZE))] for kv_len in kv_lens]
    scales = [scales_of(num_kv_heads, dim, dtype)]
    (cache,), (true,) = (
        each.kv_cache(1, 64, BLOCK_SIZE, num_kv_heads, dim, kind, normed=True, scales=scales)
        for each, kind in ((device, dtype), (CPU, torch.float32))
    )
    slots = [
        b[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for b, n in zip(tables, kv_lens, strict=True) for i in range(n)
    ]
    slots = torch.tensor(slots)
    k, v = (rand(len(slots), num_kv_heads, dim, dtype=dtype, seed=seed) for seed in (3, 4))
    device.kv_write(k, v, cache, slots)
    CPU.kv_write(k.float(), v.float(), true, slots)
    for ours, theirs in ((cache.k, true.k), (cache.v, true.v)):
        assert ours.dtype == torch.int8
        assert torch.equal(ours.flatten(0, 1)[slots], theirs.flatten(0, 1)[slots])
    q = rand(sum(q_lens), num_heads, dim, dtype=dtype)
    with Recorder() as recorded:
        step = device.prepare_attention(q_lens, kv_lens, tables, BLOCK_SIZE)
        got = device.paged_attention(q, cache, step, scale)
        again = device.paged_attention(q, cache, step, scale)
    assert torch.equal(got, again) and not recorded.violations
    wanted = CPU.paged_attention(q.float(), true, CPU.prepare_attention(q_lens, kv_lens, tables, BLOCK_SIZE), scale)
    close(got, wanted, scale=4)


def test_prompts_are_read_together_up_to_a_bound() -> None:
    most = INT8_READ_TOKENS
    lens = [most // 2, 3, most // 2, most + 5, 1, 7]
    table = torch.arange(6 * (most // 16 + 1)).view(6, -1).numpy()
    found = int8_cache.split([2, 1, 2, 2, 2, 2], lens, table, 16, torch.device("cpu"))
    assert [each.kv_ends for each in found.prompts] == [[most // 2, most], [most + 5], [1, 8]]
    assert [each.tokens.tolist() for each in found.prompts] == [[0, 1, 3, 4], [5, 6], [7, 8, 9, 10]]
    assert found.singles.tolist() == [2] and found.single_lens == [3] and found.single_rows.tolist() == [1]
    assert found.prompts[1].slots.tolist() == [table[3, 0] * 16 + i for i in range(most + 5)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder with scales, prompts, the CPU's tokens with an int8 cache)."""
    source = random_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    engine = engine_on(CPU, source, torch.float32)
    prompts = [engine.processor.build(CASES[case]) for case in ("text", "picture", "turns")]
    folder = add_scales(tmp_path_factory.mktemp("c8") / request.param, source, observed(engine, prompts, GREEDY))
    engine = engine_on(CPU, folder, torch.float32, block_size=BLOCK_SIZE)
    return folder, prompts, tokens_of(engine, prompts)


def tokens_of(engine, prompts) -> list[list[int]]:
    return [list(done.token_ids[0]) for done in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("soc, chunk", [(A2, 8192), (A3, 33)])
def test_an_engine_answers_as_the_cpu_does(family, soc, chunk) -> None:
    """In fp32, see npu.exact; whole prompts, and chunks of prompts among decoding rows."""
    folder, prompts, wanted = family
    with exact():
        engine = engine_on(backend(soc), folder, torch.float32, block_size=BLOCK_SIZE, max_num_batched_tokens=chunk)
        assert {layer.k.dtype for layer in engine.runner.kv} == {torch.int8}
        for _ in range(2):  # the second time out of the prefix cache
            assert tokens_of(engine, prompts) == wanted
        engine.scheduler.check()


def test_graph_tokens_are_the_cpus(family, tmp_path) -> None:
    folder, prompts, wanted = family
    model = {"exe_mode": "ge_graph", "strict_graph": True, "output_path": str(tmp_path)}
    with exact():
        engine = engine_on(
            backend(A3), folder, torch.float32, model=model, block_size=BLOCK_SIZE, num_blocks=64,
            graph_batch_sizes=(4,),
        )  # fmt: skip
        assert tokens_of(engine, prompts) == wanted
    assert engine.runner.graphs is not None


@pytest.mark.parametrize("mode", ["eager", "ge_graph"])
def test_drafts_are_verified_eagerly(family, tmp_path, caplog, mode) -> None:
    """Rows with drafts are read as prompts are, among rows without, which decode; graphs have one token a row."""
    folder, prompts, wanted = family
    model = {"exe_mode": mode, "strict_graph": True, "output_path": str(tmp_path)}
    drafts = {"method": "ngram", "num_speculative_tokens": 5, "adaptive": False}
    with exact(), caplog.at_level(logging.INFO):
        engine = engine_on(
            backend(A3), folder, torch.float32, model=model, speculative=drafts, block_size=BLOCK_SIZE, num_blocks=64,
            graph_batch_sizes=(4,),
        )  # fmt: skip
        told = [r.getMessage() for r in caplog.records if "steps that verify drafts run eagerly" in r.getMessage()]
        assert len(told) == (mode == "ge_graph")
        known = {tuple(prompt.token_ids): answer for prompt, answer in zip(prompts, wanted, strict=True)}
        oracle = engine.runner.speculator.proposer = RaggedOracle(known)
        steps = counted(engine)
        assert tokens_of(engine, prompts) == wanted
    assert oracle.observed and {graph for graph, has_drafts, _ in steps if has_drafts} == {None}
    if mode == "ge_graph":
        assert {graph for graph, has_drafts, _ in steps if not has_drafts} == {(4, 1)}


def test_acl_graphs_update_the_lengths_of_int8_attention(family, tmp_path, acl_updates) -> None:
    """As far as the capture, which is the chip's: one graph, in which a replay sets every request's cached tokens."""
    folder, _, _ = family
    model = {"exe_mode": "npugraph_ex", "strict_graph": True, "output_path": str(tmp_path)}
    with exact(), pytest.raises(RuntimeError, match="(?i)capture"):
        engine_on(
            backend(A2), folder, torch.float32, model=model, block_size=BLOCK_SIZE, num_blocks=64,
            graph_batch_sizes=(2,),
        )  # fmt: skip
    ((rulers, updated),) = acl_updates
    assert rulers and all("npu_fused_infer_attention_score" in name and "_v2" not in name for name in rulers)
    assert {key for keys in updated.values() for key in keys} >= {"actual_seq_lengths_kv"}


@pytest.mark.parametrize(
    "name, soc, nodes", [("Qwen3-VL-8B-Instruct", A2, 16), ("Qwen2.5-VL-7B-Instruct", A3, 14)]
)  # float caches: 9 and 12
def test_nodes_of_a_decode_layer(name, soc, nodes) -> None:
    """Norm, rotation, quantization and write are kernels of their own: no one kernel does them into these blocks."""
    with true_size(name, soc, int8_cache=True) as traces:
        one, two = traces.decode_graph(1), traces.decode_graph(2)
        assert traces.decode_calls(tensors=True).violations == []
        prefill = traces.prefill_calls(256, 128, 0)
    layer: Counter[str] = per_layer(one, two)
    assert layer["Quantize"] == 2 and layer["ScatterPaKvCache"] == layer["FusedInferAttentionScore"] == 1, layer
    assert layer.total() == nodes, layer
    assert not prefill.violations and prefill.counts["npu_quantize"] == 4
