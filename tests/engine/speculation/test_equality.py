"""Answers with drafts are the answers without, whoever drafts and however wrong the drafts are."""

import random
from dataclasses import replace

import pytest

from executor.engine.speculation.speculator import Proposer, Speculator
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

GREEDY = SamplingParams(max_new_tokens=40)
NOISY = SamplingParams(max_new_tokens=40, temperature=1.5, seed=3)


class Oracle(Proposer):
    """Knows the answers, and is wrong at random places."""

    def __init__(self, answers, share_right=0.7, seed=0):
        self.answers, self.share_right, self.random = answers, share_right, random.Random(seed)
        self.observed = []

    def propose(self, plan, wanted):
        drafts = []
        for row, count in zip(plan.rows, wanted, strict=True):
            answer = self.answers[tuple(row.request.prompt.token_ids)]
            at = len(row.request.output_token_ids)
            right = answer[at : at + count] if count else ()
            drafts.append(tuple(t if self.random.random() < self.share_right else t ^ 1 for t in right))
        return drafts

    def observe(self, row, chosen):
        assert len(chosen) == len(row.draft_ids) + 1
        self.observed.append(row)


def with_drafts(engine, monkeypatch, proposer, num_tokens=7):
    monkeypatch.setattr(engine.scheduler, "max_yield", 1 + num_tokens)
    monkeypatch.setattr(engine.runner, "speculator", Speculator(proposer, num_tokens))
    return engine.runner.speculator


@pytest.fixture(scope="module")
def engine():
    with engine_over(REPO / "models" / "tiny" / "qwen3_vl") as engine:
        yield engine


@pytest.mark.parametrize("params", [GREEDY, NOISY])
@pytest.mark.parametrize("share_right", [0.0, 0.8, 1.0])
def test_answers_are_the_same(engine, monkeypatch, params, share_right):
    questions = ["What is this?", "Count from one to twenty.", "Say the same word again and again."]
    prompts = [engine.prompt(question) for question in questions]
    params = replace(params, ignore_eos=True)
    wanted = engine.generate(prompts, params)
    answers = {tuple(p.token_ids): each.token_ids[0] for p, each in zip(prompts, wanted, strict=True)}
    speculator = with_drafts(engine, monkeypatch, Oracle(answers, share_right))
    found = engine.generate(prompts, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    counts = speculator.counts
    assert counts.num_draft_tokens > 0
    assert (counts.num_accepted_tokens == counts.num_draft_tokens) == (share_right == 1.0)
    if share_right == 0.0:
        assert not counts.num_accepted_tokens
