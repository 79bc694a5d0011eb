"""Adaptive drafting on tables of costs: it gains where drafts are right, and costs hardly anything where none is."""

import random

import pytest

from executor.engine.speculation.costs import FIRST_STALE_STEPS, FORGOTTEN_STEPS, STALE_STEPS, StepCosts
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
    gain, _ = run(proposer, cost, 400 if num_requests > 1 else 800, num_requests, answer_tokens)
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
        (flat, 0.5, 1.7),
        (stepped, 0.9, 2.6),
        (dear, 0.9, 0.97),
    ],
)
@pytest.mark.parametrize("is_free", [True, False])
def test_gains_what_the_table_allows(cost, chance, least, is_free):
    gain, _ = run(Table(lambda request, place: chance, is_free), cost, 800)
    best = max((1 - chance ** (k + 1)) / (1 - chance) * cost(1, 0) / cost(1, k) for k in range(8))
    assert gain > max(least, 0.9 * best)


def test_without_adaptivity_there_are_always_as_many_as_can_be_had():
    gain, speculator = run(Table(lambda request, place: 0.0), steep, 50, is_adaptive=False)
    assert speculator.counts.num_draft_tokens == 7 * 50 and gain < 0.45


def test_each_request_is_judged_by_itself():
    """Of four requests two repeat themselves: they alone have drafts, and all gain by it."""
    proposer = Table(lambda request, place: 0.95 if int(request.id) % 2 else 0.0)
    gain, speculator = run(proposer, flat, 400, num_requests=4)
    assert speculator.counts.acceptance_rate > 0.6 and gain > 2
    idle = [speculator.adaptive._states[name].num_idle for name in ("0", "2") if name in speculator.adaptive._states]
    assert all(each > 50 for each in idle)


@pytest.mark.parametrize("is_free", [True, False])
def test_a_request_comes_back_when_it_begins_to_repeat_itself(is_free):
    proposer = Table(lambda request, place: 0.95 if place > 400 else 0.0, is_free)
    gain, _ = run(proposer, steep, 800)
    best = 2 / (1 + 1 / 2.8)  # half of it at a gain of 2.8
    assert gain > 0.9 * best


def test_the_time_of_the_proposer_counts():
    """Drafts that take as long as they save are not made."""
    proposer = Table(lambda request, place: 0.9, is_free=False, propose_s=0.12)
    gain, speculator = run(proposer, flat, 800)
    assert gain > 0.97 and speculator.counts.num_drafts < 60


def test_slow_first_steps_do_not_make_drafts_look_good_for_long():
    """Steps without drafts come first, and the first steps of all are slow. Right drafts that cost what they save."""
    steps = []

    def cold(num_rows, num_drafts):
        steps.append(num_drafts)
        return (0.1 if num_drafts else 0.1 * (4 if len(steps) < 8 else 1)) + 0.12 * num_drafts

    gain, _ = run(Table(lambda request, place: 1.0, is_free=False), cold, 600)
    assert gain > 0.95


def test_tokens_behind_the_drafts_must_cost_nothing():
    for cost, is_worth in ((steep, False), (lambda rows, drafts: 0.1, True)):
        gain, speculator = run(Trailing(lambda request, place: 0.0), cost, 1500)
        assert gain > 0.97 and (speculator.counts.num_draft_tokens > 1500) == is_worth


class Trailing(Table):
    num_trailing = 7

    def trailing(self, row, draft_ids, count):
        return (WRONG,) * count


@pytest.mark.parametrize("cost", [steep, flat, stepped, dear])
@pytest.mark.parametrize("kind", [Table, Trailing])
@pytest.mark.parametrize("num_tokens", [16, 64])
def test_the_first_short_answer_pays_nothing_for_what_is_not_known_yet(cost, kind, num_tokens):
    """Drafts that cost nothing to make are held against the answer before a step computes one, and a token that will
    hardly be right is not computed to find out what it costs, before steps have saved up for it."""
    gain, speculator = run(kind(lambda request, place: 0.0), cost, num_tokens)
    assert gain > 0.99 and not speculator.counts.num_draft_tokens


def test_an_answer_that_copies_begins_to_gain_within_a_few_tokens():
    for num_tokens, least in ((16, 1.2), (64, 2.2)):
        gain, _ = run(Table(lambda request, place: 1.0), lambda rows, drafts: 0.1 + 0.001 * drafts, num_tokens)
        assert gain > least


def test_a_slow_first_step_of_a_size_is_not_held_against_it():
    seen = set()

    def slow_at_first(num_rows, num_drafts):
        is_first = (num_rows, num_drafts) not in seen
        seen.add((num_rows, num_drafts))
        return flat(num_rows, num_drafts) * (10 if is_first else 1)

    gain, _ = run(Table(lambda request, place: 0.9), slow_at_first, 1500)
    assert gain > 2.5


def test_costs_are_of_the_latest_steps_and_in_between_in_a_line():
    costs = StepCosts()
    assert costs.plain(1) is None
    for seconds in (9.0, 1.0, 1.0, 5.0, 1.0):
        costs.add(1, 0, seconds)
    assert costs.plain(1) == 1.0 and costs.verifying(1, 7) == 1.0, "what is not known is tried"
    for _ in range(3):
        costs.add(1, 4, 3.0)
    assert [costs.verifying(1, count) for count in (0, 2, 4, 7)] == [1.0, 2.0, 3.0, 3.0]
    wanted, seconds = FIRST_STALE_STEPS, 1.0
    while wanted <= STALE_STEPS:
        for _ in range(wanted - 3 * (seconds == 1.0)):
            assert costs.plain(1) == seconds
            costs.add(1, 4, 4.0)
        assert costs.plain(1) is None, "it is measured anew"
        wanted, seconds = 2 * wanted, seconds + 1
        costs.add(1, 0, seconds)
        costs.add(1, 0, seconds)
    assert costs.plain(1) == seconds and costs.verifying(1, 4) == max(4.0, seconds)
    for _ in range(3):
        costs.add(1, 0, 2.0)
    for _ in range(2 * FORGOTTEN_STEPS):
        costs.add(1, 0, 2.0)
    assert costs.verifying(1, 4) == 2.0
