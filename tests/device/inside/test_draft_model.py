"""A draft model on emulated chips: the answers of the CPU without drafts, and in graph mode its steps are graphs.

What is read of a cache before it was written is NaN there, so a stale key would show.
"""

import pytest
import torch

from executor.schedule.request import SamplingParams
from tests.device.inside.npu import A2, A3, CPU, backend, engine_on, exact
from tests.models.test_generation import CASES
from tests.reference import random_checkpoint

NUM_TOKENS, NUM_DRAFTS = 12, 3
GREEDY = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request, tmp_path_factory):
    """(folder, prompts, the CPU's tokens)."""
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    with engine_on(CPU, folder, torch.float32) as engine:
        prompts = [engine.processor.build(messages) for messages in (CASES["text"], CASES["picture"], CASES["turns"])]
        return folder, prompts, tokens_of(engine, prompts)


def tokens_of(engine, prompts) -> list[list[int]]:
    return [list(done.token_ids[0]) for done in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("soc, mode", [(A3, "ge_graph"), (A2, "eager")])
def test_answers_are_the_cpus(family, tmp_path, soc, mode) -> None:
    folder, prompts, wanted = family
    speculative = {
        "method": "draft", "model_path": str(folder), "num_speculative_tokens": NUM_DRAFTS, "adaptive": False,
    }  # fmt: skip
    model = {"exe_mode": mode, "output_path": str(tmp_path)}
    # One size, which no batch fills: a graph is converted for each size, of each length and of the draft model.
    settings = {"model": model, "speculative": speculative, "num_blocks": 128, "graph_batch_sizes": (4,)}
    with exact(), engine_on(backend(soc), folder, torch.float32, **settings) as engine:
        runner, graphs = engine.runner.speculator.proposer.runner, []
        forward = runner.forward
        runner.forward = lambda plan: graphs.append(plan.graph) or forward(plan)
        assert tokens_of(engine, prompts) == wanted
        counts = engine.runner.speculator.counts
        assert counts.num_accepted_tokens >= 0.99 * counts.num_draft_tokens > 0
    # The first step of the draft model computes the prompts, and all others a token each.
    assert graphs[0] is None and len(graphs) > NUM_TOKENS / 2
    assert {graph is None for graph in graphs[1:]} == {mode == "eager"}
