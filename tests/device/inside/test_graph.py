"""Decode graphs: the tokens of eager steps, the nodes of the design, and what happens where a graph cannot be made."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch_npu

from emulator import graph
from executor.device.npu.attention import FusedAttention
from executor.device.npu.graph import configure
from executor.schedule.request import SamplingParams
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, CPU, backend, engine_on, exact
from tests.models.test_generation import CASES
from tests.reference import FAMILIES, random_checkpoint

NUM_TOKENS = 20  # past a block's end
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder, prompts, the CPU's tokens of all prompts together)."""
    name = request.param
    folder = random_checkpoint(tmp_path_factory.mktemp(name), name)
    engine = engine_on(CPU, folder, torch.float32)
    prompts = [engine.processor.build(messages) for messages in CASES.values()]
    return folder, prompts, tokens_of(engine, prompts)


def tokens_of(engine, prompts, params=GREEDY) -> list[list[int]]:
    return [list(done.token_ids[0]) for done in engine.generate(prompts, params)]


def graph_engine(folder, tmp_path, soc=A3, mode="ge_graph", strict=True, **scheduler):
    model = {"exe_mode": mode, "strict_graph": strict, "output_path": str(tmp_path)}
    # Functional forms of ops copy the cache: it is no larger than the prompts need.
    return engine_on(backend(soc), folder, torch.float32, model=model, **{"num_blocks": 128} | scheduler)


@pytest.mark.parametrize(  # batches larger than every graph are a matter of no family
    "family, soc, sizes",
    mostly_long(
        [(family, soc, sizes) for family in FAMILIES for soc in (A2, A3) for sizes in ((2, 8), (3,))],
        [("qwen2_5_vl", A2, (2, 8)), ("qwen3_vl", A3, (2, 8)), ("qwen3_vl_moe", A2, (2, 8)), ("qwen3_vl", A2, (3,))],
    ),
    indirect=["family"],
)
def test_graph_tokens_are_the_cpus(family, tmp_path, soc, sizes) -> None:
    """Padded batches, batches larger than every graph (they run eagerly), blocks that fill up."""
    folder, prompts, wanted = family
    with exact():
        engine = graph_engine(folder, tmp_path, soc, graph_batch_sizes=sizes)
        replayed = count_calls(engine.runner.graphs)
        assert tokens_of(engine, prompts) == wanted
        engine.scheduler.check()
    assert replayed[0] >= NUM_TOKENS - 1 - (len(prompts) > max(sizes)) * NUM_TOKENS


def test_one_after_another(family, tmp_path) -> None:
    """A request's blocks do not stay in the table for the next one; the prefix cache feeds decode steps too."""
    folder, prompts, wanted = family
    with exact():
        engine = graph_engine(folder, tmp_path, graph_batch_sizes=(1, 4))
        for num_tokens in (NUM_TOKENS, 5):
            params = replace(GREEDY, max_new_tokens=num_tokens)
            found = [tokens_of(engine, [prompt], params)[0] for prompt in prompts]
            assert found == [tokens[:num_tokens] for tokens in wanted]


def count_calls(graphs) -> list[int]:
    """How often the graphs are replayed from now on."""
    count, fill = [0], graphs._fill

    def counted(rows, shape, *given):
        count[0] += 1
        return fill(rows, shape, *given)

    graphs._fill = counted
    return count


def test_only_token_ids_come_back(family, tmp_path, monkeypatch) -> None:
    """Around the graph a decode step reads the device once: the sampled ids."""
    folder, prompts, _ = family
    read: list[tuple[str, tuple[int, ...]]] = []
    with exact():
        engine = graph_engine(folder, tmp_path, graph_batch_sizes=(8,))
        for prompt in prompts[:2]:
            engine.add(prompt, GREEDY)
        engine.step(), engine.step()
        logits, given = torch.zeros(8, engine.vocab_size), []
        engine.runner.graphs._graphs[8, 1] = lambda *inputs: given.append(inputs) or logits
        for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "cpu"):
            plain = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda x, *a, _n=name, _p=plain: read.append((_n, tuple(x.shape))) or _p(x, *a)
            )
        engine.step()
        monkeypatch.undo()
        engine.step()
    assert read == [("tolist", (2,))]
    first, second = ([*tensors, *q_outs] for *tensors, q_outs, _ in given)
    assert all(one is other for one, other in zip(first, second, strict=True)), "a replay's inputs are made once"


def test_nodes_of_the_engines_own_graph(family, tmp_path) -> None:
    """The tiny models' layers have the nodes that the true models have: fixed here for one rank."""
    folder, _, _ = family
    engine = engine_on(
        backend(A3),
        folder,
        torch.bfloat16,
        model={"exe_mode": "ge_graph", "output_path": str(tmp_path)},
        graph_batch_sizes=(4,),
    )
    made = graph.convert(engine.runner.step.decode, *engine.runner.graphs._inputs[4, 1], configure=configure)
    layers = len(engine.runner.kv)
    kernels = made.kernels
    assert kernels["FusedInferAttentionScore"] == layers
    assert kernels["AddRmsNorm"] == 2 * layers and kernels["RmsNorm"] == 1
    if engine.runner.model.num_taps:
        assert kernels["QkvRmsNormRopeCache"] == layers
    else:
        assert kernels["ScatterPaKvCache"] == layers and kernels["RotaryMul"] == 2 * layers
    assert not made.collectives and not kernels["TensorMove"] and not kernels["Transpose"]


def test_a_graph_that_fails_is_told_and_eager_steps_go_on(family, tmp_path, monkeypatch, caplog) -> None:
    folder, prompts, wanted = family
    plain = FusedAttention.paged

    def unconvertible(self, q, cache, step, scale):
        out = plain(self, q, cache, step, scale)
        if not torch.compiler.is_compiling():
            return out
        return torch_npu.npu_top_k_top_p(out, None, torch.ones(len(out), dtype=torch.int32))

    monkeypatch.setattr(FusedAttention, "paged", unconvertible)
    with exact(), caplog.at_level(logging.WARNING):
        engine = graph_engine(folder, tmp_path, strict=False)
        assert engine.runner.graphs is None
        assert tokens_of(engine, prompts[:2]) == wanted[:2]
        (told,) = [r.getMessage() for r in caplog.records if "no ge_graph graphs" in r.getMessage()]
        assert "eagerly" in told and "npu_top_k_top_p" in told
        with pytest.raises(RuntimeError, match="strict_graph"):
            graph_engine(folder, tmp_path, strict=True)


def test_acl_graphs_come_as_far_as_the_capture(family, tmp_path, acl_updates) -> None:
    """Everything before the chip's own part: one graph, in which the lengths of attention are what a replay updates."""
    folder, _, _ = family
    with exact(), pytest.raises(RuntimeError, match="(?i)capture"):
        graph_engine(folder, tmp_path, mode="npugraph_ex", graph_batch_sizes=(2,))
    ((rulers, updated),) = acl_updates
    named = Counter(name.removesuffix("_1")[:38] for name in rulers)
    assert sum(named.values()) > 0 and all("npu_fused_infer_attention_score_v2" in name for name in rulers)
    assert {key for keys in updated.values() for key in keys} >= {"actual_seq_kvlen"}
