"""Engines that draft give the answers of engines that do not: every family and proposer, however it is computed."""

from dataclasses import replace

import pytest

from executor.schedule.request import SamplingParams
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """The folder, and what an engine without drafts answers."""
    folder = REPO / "models" / "tiny" / request.param
    with engine_over(folder) as engine:
        return folder, {name: answers(engine, params) for name, params in PARAMS.items()}


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


@pytest.mark.parametrize(
    ("method", "enable_prefix_caching"), [("ngram", True), ("lookahead", False), ("adaptive", True)]
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


@pytest.mark.parametrize("method", METHODS)
def test_neither_chunks_nor_preemption_change_an_answer(family, method):
    folder, known = family
    tight = {"num_blocks": 10, "max_num_batched_tokens": 24, "enable_prefix_caching": False}
    with engine_over(folder, speculative=METHODS[method], max_num_seqs=3, **tight) as engine:
        found = answers(engine, PARAMS["greedy"])
        assert engine.scheduler.num_preemptions
        assert engine.runner.speculator.counts.num_accepted_tokens
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
