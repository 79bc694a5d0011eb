"""What graphs are given for a step: answers stay the same, whatever their shapes, drafts and the memory elsewhere.

The graphs here are the step itself, run on the CPU; those of a chip are in tests/device/inside.
"""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from executor.device.cpu.ops import CpuOps
from executor.engine.graphs import DecodeGraphs, needed_shape
from executor.schedule.plan import GraphShape, Row
from executor.schedule.request import Prompt, Request, SamplingParams
from tests.engine.speculation.test_equality import Oracle, with_drafts
from tests.engines import engine_over
from tests.reference import REPO

MOST = 7  # drafts of a row
SHAPES = [GraphShape(rows, q_len) for rows in (1, 3, 8) for q_len in (1, 3, 8)]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
NOISY = replace(GREEDY, temperature=1.5, seed=3)


class GraphOps(CpuOps):
    """A CPU whose graphs are what they are made of; lengths come as numbers."""

    def static_attention(self, q_len, kv_lens, block_table, block_size):
        return self.prepare_attention([q_len] * len(block_table), kv_lens, block_table.tolist(), block_size)

    def capture(self, decode, mode, folder):
        def run(token_ids, positions, slots, kv_lens, block_table, q_outs, lengths):
            assert kv_lens.tolist() == lengths and len(set(slots.tolist())) == len(slots) == q_outs[0].shape[0]
            return decode(token_ids, positions, slots, lengths, block_table, q_outs)

        return run


class RaggedOracle(Oracle):
    """Drafts of every length, none among them."""

    def propose(self, plan, wanted):
        return super().propose(plan, [self.random.randint(0, count) for count in wanted])


def text(*token_ids: int) -> Prompt:
    """Some of them shorter than a graph's rows."""
    return Prompt(list(token_ids), np.tile(np.arange(len(token_ids)), (3, 1)), position_delta=0)


PROMPTS = [text(7), text(9, 11, 9), text(*range(40, 54)), text(*range(60, 93)), text(*range(5, 12))]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def engine(request):
    """An engine, with the answers of PROMPTS without graphs and drafts; from then on with graphs."""
    with engine_over(REPO / "models" / "tiny" / request.param, num_blocks=40, max_model_len=96) as engine:
        engine.wanted = {
            params: [list(done.token_ids[0]) for done in engine.generate(PROMPTS, params)] for params in (GREEDY, NOISY)
        }
        runner, attention = engine.runner, engine.runner.model.language_model.layers[0].self_attn
        sizes = 40 + 4, 16, attention.num_kv_heads, attention.head_dim
        runner.kv = runner.step.kv = runner.device.kv_cache(len(runner.kv), *sizes, torch.float32)
        runner.device.__class__ = GraphOps
        folder = SimpleNamespace(path=REPO)
        runner.graphs = DecodeGraphs(runner.step, runner.device, "", SHAPES, 40, 96, folder)
        runner.graphs.capture()
        yield engine


def replayed(engine, monkeypatch) -> list[tuple[GraphShape, GraphShape]]:
    """From now on: of every replay its graph, and what the rows need."""
    found, fill = [], engine.runner.graphs._fill

    def noted(rows, shape, *given):
        found.append((shape, needed_shape(rows)))
        return fill(rows, shape, *given)

    monkeypatch.setattr(engine.runner.graphs, "_fill", noted)
    return found


def spoil(engine, monkeypatch) -> None:
    """What nobody has written is no number, and in spare slots there is none before any step."""
    fill = engine.runner.graphs._fill
    engine.scheduler.forget()
    for layer in engine.runner.kv:
        layer.k.fill_(float("nan")), layer.v.fill_(float("nan"))

    def spoiled(rows, shape, *given):
        for layer in engine.runner.kv:
            layer.k[40:].fill_(float("nan")), layer.v[40:].fill_(float("nan"))
        return fill(rows, shape, *given)

    monkeypatch.setattr(engine.runner.graphs, "_fill", spoiled)


@pytest.mark.parametrize("params", [GREEDY, NOISY])
@pytest.mark.parametrize("seed", range(4))
def test_answers_out_of_graphs_are_those_of_eager_steps(engine, monkeypatch, params, seed) -> None:
    """Rows of all lengths in graphs of all shapes, requests shorter than a row, blocks that fill up, answers that end
    at the longest context; nothing is read that has not been written."""
    order = random.Random(seed).sample(range(len(PROMPTS)), 1 + seed)
    prompts, wanted = [PROMPTS[at] for at in order], [engine.wanted[params][at] for at in order]
    known = {tuple(prompt.token_ids): answer for prompt, answer in zip(prompts, wanted, strict=True)}
    spoil(engine, monkeypatch)
    replays = replayed(engine, monkeypatch)
    speculator = with_drafts(engine, monkeypatch, RaggedOracle(known, 0.8, seed), MOST)
    found = [list(done.token_ids[0]) for done in engine.generate(prompts, params)]
    assert found == wanted
    assert 0 < speculator.counts.num_accepted_tokens < speculator.counts.num_draft_tokens
    engine.scheduler.check()
    assert {shape.q_len for shape, _ in replays} == {1, 3, 8}
    for shape, needed in replays:
        fitting = [each for each in SHAPES if each.rows >= needed.rows and each.q_len >= needed.q_len]
        assert shape.num_tokens == min(each.num_tokens for each in fitting)


def test_a_graph_may_be_larger_than_its_rows_need(engine, monkeypatch) -> None:
    """As it is where other replicas have more rows, or longer ones."""
    monkeypatch.setattr(engine.runner.graphs, "shapes", (GraphShape(8, 8),))
    replays = replayed(engine, monkeypatch)
    found = [list(done.token_ids[0]) for done in engine.generate(PROMPTS[:2], GREEDY)]
    assert found == engine.wanted[GREEDY][:2]
    assert set(replays) >= {((8, 8), (2, 1))}
    assert len(engine.runner.graphs([], GraphShape(3, 8))) == 0, "a replica without rows helps the others"


def test_only_rows_of_answers_under_way_are_decode_steps() -> None:
    row = Row(Request("r", PROMPTS[1], GREEDY), 3, 1, 1)
    assert needed_shape([row]) == (1, 1) and needed_shape([]) == (0, 1)
    assert needed_shape([row, row._replace(max_yield=4, draft_ids=(1, 2))]) == (2, 3)
    for other in (row._replace(start=2), row._replace(num_tokens=2), row._replace(max_yield=0)):
        assert needed_shape([row, other]) is None
