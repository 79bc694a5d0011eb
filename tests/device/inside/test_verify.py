"""Drafts verified on emulated chips: the answers of the CPU without drafts, out of graphs of fixed lengths."""

import contextlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from executor.device.npu import graph as npu_graph
from executor.engine.speculation.ngram import NgramProposer
from executor.recipe import graph_sizes
from executor.schedule.request import Prompt, SamplingParams
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, CPU, DUO, backend, engine_on, exact
from tests.engine.speculation.test_equality import Oracle
from tests.models.test_generation import CASES
from tests.reference import FAMILIES, random_checkpoint

NUM_DRAFTS = 5
DRAFTS = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "adaptive": False}
LENGTH = 1 + NUM_DRAFTS
GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
NOISY = replace(GREEDY, temperature=1.5, seed=3)


def short_prompt(token_ids) -> Prompt:
    """Text, with fewer tokens than a graph's rows have."""
    return Prompt(list(token_ids), np.tile(np.arange(len(token_ids)), (3, 1)), position_delta=0)


def answers(engine, prompts, params) -> list[list[int]]:
    return [list(done.token_ids[0]) for done in engine.generate(prompts, params)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(folder, prompts, the CPU's answers without drafts, greedy and sampled)."""
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    engine = engine_on(CPU, folder, torch.float32)
    prompts = [engine.processor.build(CASES[case]) for case in ("text", "picture", "turns")]
    prompts += [short_prompt([7]), short_prompt([9, 11, 9])]
    return folder, prompts, {params: answers(engine, prompts, params) for params in (GREEDY, NOISY)}


def verifying(soc, folder, tmp_path, sizes=(2, 6), mode="ge_graph", **scheduler):
    model = {"exe_mode": mode, "strict_graph": True, "output_path": str(tmp_path)}
    engine = engine_on(
        backend(soc), folder, torch.float32, model=model, speculative=DRAFTS, graph_batch_sizes=sizes, num_blocks=64,
        **scheduler,
    )  # fmt: skip
    assert isinstance(engine.runner.speculator.proposer, NgramProposer)
    return engine


def knows(engine, prompts, wanted, share_right=0.7) -> Oracle:
    """Let the engine's drafts be those of an oracle that is sometimes wrong."""
    known = {tuple(prompt.token_ids): answer for prompt, answer in zip(prompts, wanted, strict=True)}
    oracle = engine.runner.speculator.proposer = RaggedOracle(known, share_right)
    return oracle


class RaggedOracle(Oracle):
    """Drafts of every length, none among them: rows of a graph are padded by different numbers of tokens."""

    def propose(self, plan, wanted):
        return super().propose(plan, [self.random.randint(0, count) for count in wanted])


class CyclingOracle(Oracle):
    """One draft more in every step, up to all of them, then none."""

    num_steps = 0

    def propose(self, plan, wanted):
        self.num_steps += 1
        return super().propose(plan, [min(count, self.num_steps % LENGTH) for count in wanted])


def counted(engine) -> Counter:
    """From now on: of every step with rows that go on token by token, its graph (None: eager), whether it has drafts,
    the tokens of its longest row, and how often."""
    steps, forward = Counter(), engine.runner.forward

    def noted(plan, *scores):
        if plan.rows and all(row.num_tokens == 1 and row.request.output_token_ids for row in plan.rows):
            longest = max(row.num_inputs for row in plan.rows)
            steps[plan.graph, longest > 1, longest] += 1
        return forward(plan, *scores)

    engine.runner.forward = noted
    return steps


def spoil(engine) -> None:
    """What nobody has written yet is no number, and before every step the spare slots are none."""
    fill, num_blocks = engine.runner.graphs._fill, engine.scheduler.pool.num_blocks
    for layer in engine.runner.kv:
        layer.k.fill_(float("nan")), layer.v.fill_(float("nan"))

    def spoiled(rows, shape, *given):
        for layer in engine.runner.kv:
            layer.k[num_blocks:].fill_(float("nan")), layer.v[num_blocks:].fill_(float("nan"))
        return fill(rows, shape, *given)

    engine.runner.graphs._fill = spoiled


def of_family(*always):
    """The families that a test is asked of in every run. Graphs are made of what no family decides but attention and
    its cache: a family is asked of here and there, and each by several tests; all of all with -m long."""
    return pytest.mark.parametrize("family", mostly_long(FAMILIES, always), indirect=True)


@pytest.mark.parametrize(
    "family, soc, params",
    mostly_long(
        [(family, *form) for family in FAMILIES for form in ((A2, GREEDY), (A3, NOISY))],
        [("qwen2_5_vl", A3, NOISY), ("qwen3_vl_moe", A2, GREEDY)],
    ),
    indirect=["family"],
)
def test_answers_out_of_graphs_are_the_cpus(family, tmp_path, soc, params) -> None:
    """Rows of all lengths, prompts shorter than a row, blocks that fill up; memory that holds no numbers elsewhere."""
    folder, prompts, wanted = family
    with exact(), torch.inference_mode():
        engine = verifying(soc, folder, tmp_path)
        oracle, steps = knows(engine, prompts, wanted[params]), counted(engine)
        spoil(engine)
        assert answers(engine, prompts, params) == wanted[params]
        assert answers(engine, prompts[3:], params) == wanted[params][3:]
        engine.scheduler.check()
    assert oracle.observed and {graph for graph, *_ in steps} >= {(6, LENGTH), (2, LENGTH)}
    for graph, has_drafts, _ in steps:
        assert graph is not None and graph.q_len == (LENGTH if has_drafts else 1)


@of_family("qwen3_vl")
def test_lookups_are_verified_by_the_shortest_graph_that_holds_them(family, tmp_path, monkeypatch) -> None:
    folder, prompts, wanted = family
    monkeypatch.setattr(graph_sizes, "FREE_TOKENS", 8)
    with exact():
        engine = verifying(A3, folder, tmp_path, sizes=(4,))
        assert set(engine.runner.graphs.shapes) == {(4, 1), (4, 2), (4, 4), (4, 6)}
        steps = counted(engine)
        known = {tuple(prompt.token_ids): answer for prompt, answer in zip(prompts, wanted[GREEDY], strict=True)}
        engine.runner.speculator.proposer = CyclingOracle(known, share_right=0.5)
        assert answers(engine, prompts[1:4], GREEDY) == wanted[GREEDY][1:4]
        engine.runner.speculator.proposer = NgramProposer(1, 3)
        assert answers(engine, prompts[:3], GREEDY) == wanted[GREEDY][:3]
    assert {graph.q_len for graph, *_ in steps} == {1, 2, 4, 6}
    for graph, _, longest in steps:
        assert graph.q_len == min(length for length in (1, 2, 4, 6) if length >= longest)


@of_family("qwen3_vl_moe")
def test_the_last_tokens_of_a_full_context(family, tmp_path) -> None:
    """The table of a graph is as wide as the longest request, and no wider."""
    folder, prompts, _ = family
    prompt = short_prompt(range(20, 40))
    (wanted,) = answers(engine_on(CPU, folder, torch.float32, max_model_len=32), [prompt], GREEDY)
    with exact():
        engine = verifying(A3, folder, tmp_path, sizes=(1,), max_model_len=32)
        knows(engine, [prompt], [wanted])
        assert engine.runner.graphs._table.shape == (1, 2)
        assert answers(engine, [prompt], GREEDY) == [wanted] and len(wanted) == 12


@of_family("qwen2_5_vl")
def test_batches_beyond_all_graphs_are_verified_eagerly(family, tmp_path, monkeypatch) -> None:
    """More rows than any size, or more tokens than a graph that verifies has."""
    folder, prompts, wanted = family
    monkeypatch.setattr(graph_sizes, "VERIFY_TOKENS", 2 * LENGTH)
    with exact():
        engine = verifying(A2, folder, tmp_path, sizes=(2, 4))
        knows(engine, prompts, wanted[GREEDY])
        steps = counted(engine)
        assert answers(engine, prompts, GREEDY) == wanted[GREEDY]
        assert answers(engine, prompts[:3], GREEDY) == wanted[GREEDY][:3]
    assert set(engine.runner.graphs.shapes) == {(2, 1), (4, 1), (2, LENGTH)}
    assert {(graph, has_drafts) for graph, has_drafts, _ in steps} >= {(None, True), ((2, LENGTH), True)}


@of_family("qwen3_vl_moe")
def test_acl_graphs_of_a_length_come_as_far_as_the_capture(family, tmp_path, monkeypatch, acl_updates) -> None:
    """Everything before the chip's own part: replays update the cached tokens, the query lengths are the graph's."""
    folder, _, _ = family
    only = graph_sizes.graph_shapes
    with exact(), pytest.raises(RuntimeError, match="(?i)capture"):
        monkeypatch.setattr(
            "executor.commands.build.graph_shapes", lambda recipe: [s for s in only(recipe) if s.q_len > 1]
        )
        verifying(A2, folder, tmp_path, sizes=(2,), mode="npugraph_ex")
    ((rulers, updated),) = acl_updates
    assert rulers and all("npu_fused_infer_attention_score_v2" in name for name in rulers)
    assert {key for keys in updated.values() for key in keys} >= {"actual_seq_kvlen"}


@of_family("qwen2_5_vl", "qwen3_vl")
def test_what_acl_graphs_are_made_of_gives_the_cpus_answers(family, tmp_path, monkeypatch) -> None:
    """Without the capture, which is the chip's: the step over buffers that stay in place, its lengths as numbers."""
    folder, prompts, wanted = family
    monkeypatch.setattr(npu_graph, "acl_graph", uncaptured)
    with exact(), torch.inference_mode():
        engine = verifying(A2, folder, tmp_path, mode="npugraph_ex")
        knows(engine, prompts, wanted[GREEDY])
        steps = counted(engine)
        spoil(engine)
        assert answers(engine, prompts, GREEDY) == wanted[GREEDY]
    assert {graph and graph.q_len for graph, *_ in steps} == {1, LENGTH}


def uncaptured(decode, folder):
    """What graph.acl_graph gives, computed call by call."""

    def run(token_ids, positions, slots, kv_lens, block_table, q_outs, lengths):
        return decode(token_ids, positions, slots, lengths, block_table, q_outs)

    return run


@pytest.mark.parametrize("soc", [A2, DUO])
def test_eager_steps_verify_as_well(family, soc) -> None:
    """300I DUO has no graphs: its chunks' attention takes the rows with drafts. In half precision there is no equality
    with fp32 to ask for: the same chip without drafts is asked."""
    folder, prompts, wanted = family
    dtype = torch.float16 if soc == DUO else torch.float32
    with contextlib.nullcontext() if soc == DUO else exact():
        plain = answers(engine_on(backend(soc), folder, dtype), prompts, GREEDY)
        engine = engine_on(backend(soc), folder, dtype, speculative=DRAFTS)
        oracle = knows(engine, prompts, plain)
        assert answers(engine, prompts, GREEDY) == plain
        engine.scheduler.check()
    assert oracle.observed and (soc == DUO or plain == wanted[GREEDY])
