"""What a grammar leaves no choice of is drafted for nothing, and changes no answer."""

import json
from dataclasses import replace

import pytest

from executor.engine.speculation.speculator import Proposer, Speculator
from executor.schedule.request import THINK_END, Grammar, SamplingParams
from tests.engine.test_grammar import calls
from tests.engines import engine_over
from tests.reference import REPO

CHOICE = Grammar("choice", json.dumps(["a square is red", "a square is blue"]))
RECORD = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "number_of_corners": {"enum": [3, 4]}},
    "required": ["colour", "number_of_corners"],
    "additionalProperties": False,
}
CASES = {
    "choice": CHOICE,
    "regex": Grammar("regex", "a square is (red|blue) and flat"),
    "json": Grammar("json_schema", json.dumps(RECORD)),
}


class Nothing(Proposer):
    """Proposes nothing."""

    is_free, num_trailing = True, 0

    def propose(self, plan, wanted):
        return [()] * len(wanted)

    def observe(self, row, chosen):
        pass

    def forget(self, request):
        pass


@pytest.fixture(scope="module")
def engine():
    with engine_over(REPO / "models" / "tiny" / "qwen3_vl") as engine:
        yield engine


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_forced_tokens_are_kept_and_the_answer_is_the_same(engine, monkeypatch, name, temperature):
    params = SamplingParams(max_new_tokens=64, temperature=temperature, seed=3, grammar=CASES[name], logprobs=1)
    questions = ["Is it red?", "Is it blue?"]
    wanted = engine.generate(questions, params)
    monkeypatch.setattr(engine.scheduler, "max_yield", 8)
    monkeypatch.setattr(engine.runner, "speculator", Speculator(Nothing(), 7))
    found = engine.generate(questions, params)
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [each.finish_reasons for each in found] == [each.finish_reasons for each in wanted]
    assert [len(each.logprobs[0]) for each in found] == [len(each.token_ids[0]) for each in wanted]
    counts = engine.speculation
    assert counts.num_accepted_tokens >= 4 and counts.acceptance_rate > 0.6


def test_what_is_forced_is_what_the_masks_leave(engine):
    """Along an answer: the first forced token is always allowed, and behind the choice there is none."""
    tokenizer = engine.processor.tokenizer
    matcher = engine.matchers.begin(SamplingParams(grammar=CHOICE))
    token_ids = tokenizer.encode("a square is ", add_special_tokens=False)
    num_forced = 0
    for token_id in token_ids:
        forced, barred = matcher.forced(), matcher.barred()
        num_forced += len(forced) > 0
        assert not forced or not barred[forced[0]]
        matcher.take([token_id])
    assert num_forced >= len(token_ids) - 2
    assert matcher.forced() == (), "red or blue"


def test_nothing_is_forced_where_the_text_is_free(engine):
    lazy = calls({"name": "f", "parameters": {}}, is_lazy=True)
    for grammar in (lazy, replace(CHOICE, after=THINK_END)):
        assert engine.matchers.begin(SamplingParams(grammar=grammar)).forced() == ()
