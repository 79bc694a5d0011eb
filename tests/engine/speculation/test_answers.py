"""Engines that draft give the answers of engines that do not: every family and proposer, however it is computed."""

import functools
from dataclasses import replace
from itertools import product

import pytest

from executor.schedule.request import SamplingParams
from tests.cases import mostly_long
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO

MEDIA = REPO / "dataset" / "media"
LONG = SamplingParams(max_new_tokens=40, ignore_eos=True)
PARAMS = {
    "greedy": LONG,
    "sampled": replace(LONG, temperature=0.7, seed=5),
    "noisy": replace(LONG, temperature=2.0, top_k=40, top_p=0.95, seed=6, max_new_tokens=24),
    "n": replace(LONG, temperature=0.9, seed=7, n=3, max_new_tokens=20),
    "ends": SamplingParams(max_new_tokens=48),
    "short": replace(LONG, max_new_tokens=3),
    "logprobs": replace(LONG, logprobs=2, max_new_tokens=12),
    "stop": replace(LONG, stop=("e", "circle,")),
}
METHODS = {
    "ngram": {"method": "ngram", "ngram_min": 1, "adaptive": False},
    "lookahead": {"method": "lookahead", "adaptive": False},
    "adaptive": {"method": "lookahead", "num_speculative_tokens": 15},
}


def questions(engine):
    picture = {"type": "image", "image": str(MEDIA / "objects.png")}
    texts = ("What do you see?", "red red red red red red red", "Count the objects. 1 2 3 1 2 3 1 2")
    asked = [[{"role": "user", "content": [picture, {"type": "text", "text": text}]}] for text in texts[:2]]
    asked.append([{"role": "user", "content": texts[2]}])
    return [engine.processor.build(each) for each in asked]


def answers(engine, params):
    completions = engine.generate(questions(engine), params)
    return [(each.token_ids, each.texts, each.finish_reasons, each.logprobs) for each in completions]


@functools.cache
def without_drafts(name):
    """The family's folder, and what an engine without drafts answers."""
    folder = REPO / "models" / "tiny" / name
    with engine_over(folder) as engine:
        return folder, {name: answers(engine, params) for name, params in PARAMS.items()}


@pytest.fixture(params=FAMILIES)
def family(request):
    return without_drafts(request.param)


def judged(engine, known):
    """All answers of an engine that drafts, one kind of request after the other, and then streamed."""
    for name, params in PARAMS.items():
        found = answers(engine, params)
        for ours, theirs in zip(found, known[name], strict=True):
            assert ours[:3] == theirs[:3], name
            if params.logprobs is not None:
                assert len(ours[3][0]) == len(ours[0][0])
                for mine, other in zip(ours[3][0], theirs[3][0], strict=True):
                    assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        engine.scheduler.check()
    prompt = questions(engine)[0]
    pieces = list(engine.stream(prompt, LONG))
    assert tuple(token for each in pieces for token in each.token_ids) == known["greedy"][0][0][0]
    assert "".join(each.text_delta for each in pieces) == known["greedy"][0][1][0]


@pytest.mark.parametrize(  # a proposer sees tokens, of no family: each of each once, and each family twice
    ("family", "method", "enable_prefix_caching"),
    mostly_long(
        [
            (family, *form)
            for family in FAMILIES
            for form in (("ngram", True), ("lookahead", False), ("adaptive", True))
        ],
        [("qwen2_5_vl", "ngram", True), ("qwen3_vl", "lookahead", False), ("qwen3_vl_moe", "adaptive", True)],
    ),
    indirect=["family"],
)
def test_answers_are_the_same(family, method, enable_prefix_caching):
    folder, known = family
    with engine_over(folder, speculative=METHODS[method], enable_prefix_caching=enable_prefix_caching) as engine:
        judged(engine, known)
        counts = engine.runner.speculator.counts
        assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
        assert sum(counts.num_accepted_per_pos) == counts.num_accepted_tokens
        proposer = engine.runner.speculator.proposer
        assert not any(held for held in vars(proposer).values() if isinstance(held, dict))


@pytest.mark.parametrize(
    ("family", "method"),
    mostly_long(
        product(FAMILIES, METHODS),
        [("qwen2_5_vl", "lookahead"), ("qwen3_vl", "adaptive"), ("qwen3_vl_moe", "ngram")],
    ),
    indirect=["family"],
)
def test_neither_chunks_nor_preemption_change_an_answer(family, method):
    folder, known = family
    with engine_over(folder, speculative=METHODS[method], max_num_batched_tokens=24) as engine:
        found = answers(engine, PARAMS["greedy"])
        assert engine.runner.speculator.counts.num_accepted_tokens
        assert [each[:3] for each in found] == [each[:3] for each in known["greedy"]]
        lengths = [len(prompt.token_ids) for prompt in questions(engine)]
    # All are begun in the first step, and their answers need more than the blocks that are left then.
    num_blocks = sum(-(-length // 16) for length in lengths) + len(lengths)
    tight = {"num_blocks": num_blocks, "enable_prefix_caching": False}
    with engine_over(folder, speculative=METHODS[method], max_num_seqs=3, **tight) as engine:
        found = answers(engine, PARAMS["greedy"])
        assert engine.scheduler.num_preemptions
        assert [each[:3] for each in found] == [each[:3] for each in known["greedy"]]


def test_a_step_computed_again_row_by_row_changes_no_answer(family, monkeypatch):
    folder, known = family
    with engine_over(folder, speculative=METHODS["lookahead"]) as engine:
        forward, count = engine.runner.forward, [0]

        def fails_now_and_then(plan, *scores):
            count[0] += len(plan.rows) > 1
            if len(plan.rows) > 1 and count[0] % 3 == 0:
                raise RuntimeError("a kernel refuses")
            return forward(plan, *scores)

        monkeypatch.setattr(engine.runner, "forward", fails_now_and_then)
        found = answers(engine, PARAMS["sampled"])
        assert count[0] > 5
        assert [each[:3] for each in found] == [each[:3] for each in known["sampled"]]
