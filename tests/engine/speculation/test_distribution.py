"""Sampled answers with drafts follow the model's own distribution, judged by transformers' probabilities.

A chi-square test over the first three tokens together. The bounds: with fixed seeds p must be above 0.001 for the
engine, and below 1e-9 for a verifier that is wrong in a known way, so the test can fail.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from executor.engine import results
from executor.engine.speculation.speculator import Proposer, Speculator
from executor.engine.speculation.verify import num_right
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen3_vl"
NUM_DRAWS, BATCH = 1200, 48
RIGHT, WRONG = 1e-3, 1e-9  # of p: above, and below
LEAST_EXPECTED = 5.0  # draws in a cell; the rarer triples are one cell together
PARAMS = SamplingParams(max_new_tokens=3, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    with engine_over(TINY, max_num_seqs=BATCH, num_blocks=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompt(engine):
    return engine.prompt("What is this?")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()


def next_probabilities(model, prompt, behind, temperature):
    """float64 [len(behind), V]: what may follow each of these continuations, all of one length."""
    ids = torch.tensor([[*prompt.token_ids, *each] for each in behind])
    with torch.inference_mode():
        logits = torch.cat([model(part).logits[:, -1] for part in ids.split(256)])
    return (logits.double() / temperature).softmax(-1)


@pytest.fixture(scope="module")
def triples(model, prompt):
    """(t1, t2, t3) -> its probability, of all that are likely enough to be a cell."""
    least = LEAST_EXPECTED / NUM_DRAWS
    known = {(): 1.0}
    for _ in range(3):
        rows = next_probabilities(model, prompt, list(known), PARAMS.temperature)
        longer = {}
        for (behind, share), row in zip(known.items(), rows, strict=True):
            for token_id in (row * share >= least).nonzero().flatten().tolist():
                longer[*behind, token_id] = share * float(row[token_id])
        known = longer
    return known


class Guess(Proposer):
    """Drafts what is likeliest: right as often as the model is sure."""

    def __init__(self, model, prompt):
        first = next_probabilities(model, prompt, [()], 1.0)[0].topk(60).indices.tolist()
        second = next_probabilities(model, prompt, [(token,) for token in first], 1.0).argmax(-1).tolist()
        pairs = list(zip(first, second, strict=True))
        third = next_probabilities(model, prompt, pairs, 1.0).argmax(-1).tolist()
        self.following = {(token,): after for token, *after in zip(first, second, third, strict=True)}

    def propose(self, plan, wanted):
        drafts = [self.following.get(tuple(row.request.output_token_ids), ()) for row in plan.rows]
        return [tuple(each[:count]) for each, count in zip(drafts, wanted, strict=True)]


@pytest.fixture(scope="module")
def guess(model, prompt):
    return Guess(model, prompt)


@pytest.fixture
def speculator(engine, guess, monkeypatch):
    monkeypatch.setattr(engine.scheduler, "max_yield", 3)
    monkeypatch.setattr(engine.runner, "speculator", Speculator(guess, 2))
    return engine.runner.speculator


def draws(engine, prompt, count=NUM_DRAWS):
    answers = []
    for first in range(0, count, BATCH):
        params = [replace(PARAMS, seed=seed) for seed in range(first, first + BATCH)]
        answers += [each.token_ids[0] for each in engine.generate([prompt] * BATCH, params)]
    return answers


def p_value(answers, triples) -> float:
    """Of the hypothesis that these answers were drawn from `triples`: chi-square, all other triples as one cell."""
    counts = dict.fromkeys([*triples, None], 0)
    for answer in answers:
        counts[answer if answer in triples else None] += 1
    shares = triples | {None: 1 - sum(triples.values())}
    distance = sum(
        (counts[cell] - len(answers) * share) ** 2 / (len(answers) * share) for cell, share in shares.items()
    )
    half = torch.tensor([(len(shares) - 1) / 2, distance / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_answers_with_drafts_follow_the_models_distribution(engine, prompt, triples, speculator, monkeypatch):
    assert len(triples) >= 15 and 0.3 < sum(triples.values()) < 1
    found = draws(engine, prompt)
    assert 0.1 < speculator.counts.acceptance_rate < 0.9
    assert p_value(found, triples) > RIGHT
    monkeypatch.setattr(engine.scheduler, "max_yield", 1)
    assert draws(engine, prompt, 5 * BATCH) == found[: 5 * BATCH]


def keeps_one_more(draft_ids, chosen):
    """A verifier that takes the token behind the first wrong draft, too: drawn as if the draft had been right."""
    return min(len(draft_ids), num_right(draft_ids, chosen) + 1)


def test_a_biased_verifier_is_found_out(engine, prompt, triples, speculator, monkeypatch):
    monkeypatch.setattr(results, "num_right", keeps_one_more)
    assert p_value(draws(engine, prompt), triples) < WRONG
