"""Adaptive drafting on tables of costs: it gains where drafts are right, and costs hardly anything where none is."""

import random

import pytest

from executor.engine.speculation.speculator import Proposer, Speculator
from executor.engine.speculation.verify import num_right
from executor.schedule.plan import Plan, Row
from executor.schedule.request import Prompt, Request, SamplingParams

WRONG = 10**6
PROMPT = Prompt([1, 2, 3], None, 0)


def steep(num_rows, num_drafts):
    """As on a CPU without AVX-512: 8 tokens take 2.4 times as long as one."""
    return 0.1 * (1 + 0.2 * (num_rows + num_drafts - 1))


def flat(num_rows, num_drafts):
    """As on an accelerator that streams weights."""
    return 0.02 * (1 + 0.002 * (num_rows + num_drafts - 1))


def stepped(num_rows, num_drafts):
    """Any draft takes the step out of its graph."""
    return 0.02 * (1 + 0.002 * num_rows) * (1.8 if num_drafts else 1.0)


def dear(num_rows, num_drafts):
    return 0.1 * (num_rows + num_drafts)


class Table(Proposer):
    """A proposer whose drafts are right with a chance that depends on the place of the answer."""

    def __init__(self, chance, is_free=True, seed=0, propose_s=0.0):
        self.chance, self.is_free, self.random = chance, is_free, random.Random(seed)
        self.propose_s, self.num_proposed = propose_s, 0

    def propose(self, plan, wanted):
        self.num_proposed += sum(map(bool, wanted))
        return [self._draft(row.request, count) for row, count in zip(plan.rows, wanted, strict=True)]

    def _draft(self, request, count):
        at = len(request.output_token_ids)
        chances = [self.chance(request, at + each) for each in range(count)]
        return tuple(at + n if self.random.random() < chance else WRONG for n, chance in enumerate(chances))


def run(proposer, cost, num_tokens, num_requests=1, answer_tokens=None, noise=0.0, num_drafts=7, is_adaptive=True):
    """Tokens by second, as a share of those without drafts. Each answer's tokens are their places."""
    speculator = Speculator(proposer, num_drafts, is_adaptive=is_adaptive)
    noises = random.Random(1)
    requests, made, spent_s, plain_s, number = [], 0, 0.0, 0.0, 0
    answer_tokens = answer_tokens or num_tokens
    while made < num_tokens * num_requests:
        while len(requests) < num_requests:
            requests.append(Request(str(number), PROMPT, SamplingParams()))
            number += 1
        rows = [Row(each, each.num_tokens - 1, 1, 1 + num_drafts) for each in requests]
        before = proposer.num_proposed
        plan = speculator.extended(Plan(tuple(rows), is_decode=True))
        chosen = [
            list(range(len(row.request.output_token_ids), len(row.request.output_token_ids) + len(row.draft_ids) + 1))
            for row in plan.rows
        ]
        kept = [each[: num_right(row.draft_ids, each) + 1] for row, each in zip(plan.rows, chosen, strict=True)]
        total = sum(len(row.draft_ids) for row in plan.rows)
        assert all(len(row.draft_ids) <= num_drafts for row in plan.rows)
        seconds = cost(num_requests, total) * (1 + noise * noises.expovariate(1))
        seconds += proposer.propose_s * (proposer.num_proposed - before)
        if total:
            speculator.observe(plan, chosen, kept)
        speculator.measured(plan, seconds)
        spent_s += seconds
        for row, tokens in zip(plan.rows, kept, strict=True):
            row.request.output_token_ids += tokens
            made += len(tokens)
            plain_s += len(tokens) * cost(num_requests, 0) * (1 + noise) / num_requests
            if len(row.request.output_token_ids) >= answer_tokens:
                speculator.forget(row.request)
        requests = [each for each in requests if len(each.output_token_ids) < answer_tokens]
    return plain_s / spent_s, speculator


@pytest.mark.parametrize("cost", [steep, flat, stepped, dear])
@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("answer_tokens", [24, 400])
@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("chance", [0.0, 0.05])
def test_never_much_slower(cost, num_requests, answer_tokens, is_free, chance):
    proposer = Table(lambda request, place: chance, is_free)
    gain, _ = run(proposer, cost, 800, num_requests, answer_tokens)
    assert gain > 0.97


@pytest.mark.parametrize("seed", range(8))
def test_never_much_slower_with_noise(seed):
    proposer = Table(lambda request, place: 0.05, seed=seed)
    gain, _ = run(proposer, steep, 800, noise=0.2)
    assert gain > 0.97


@pytest.mark.parametrize(
    ("cost", "chance", "least"),
    [
        (steep, 0.95, 1.9),
        (steep, 0.8, 1.25),
        (flat, 0.8, 3.5),
        (flat, 0.5, 1.8),
        (stepped, 0.9, 2.6),
        (dear, 0.9, 0.97),
    ],
)
@pytest.mark.parametrize("is_free", [True, False])
def test_gains_what_the_table_allows(cost, chance, least, is_free):
    gain, _ = run(Table(lambda request, place: chance, is_free), cost, 800)
    best = max((1 - chance ** (k + 1)) / (1 - chance) * cost(1, 0) / cost(1, k) for k in range(8))
    assert gain > max(least, 0.9 * best)
