"""Whatever a request asks for, drafts change nothing of its answer: tokens, logprobs, text, and why it ends."""

import json
import random
from concurrent.futures import Future
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from executor.engine.bad_words import BadWords
from executor.engine.grammar import GrammarFault
from executor.engine.matcher import Mask, Matcher
from executor.engine.noise import child_seed
from executor.engine.places import Places
from executor.engine.sampler import Sampler
from executor.engine.speculation.speculator import Proposer, Speculator
from executor.schedule.request import THINK_END, FinishReason, Grammar, Request, SamplingParams
from tests.engine.test_grammar import THING, calls, schema
from tests.engine.test_sampler import make_request, random_logits
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen3_vl"
MOST = 7  # drafts of a row


class Oracle(Proposer):
    """Knows the answers; right with some probability, else wrong in one of many ways, also beyond an answer's end."""

    is_free, num_trailing = True, 0

    def __init__(self, answers, share_right, seed, ends=()):
        """answers: (prompt's token ids, seed) -> token ids."""
        self.answers, self.share_right, self.random, self.ends = answers, share_right, random.Random(seed), ends

    def propose(self, plan, wanted):
        return [self._draft(row.request, count) for row, count in zip(plan.rows, wanted, strict=True)]

    def _draft(self, request, count):
        if not count or self.random.random() < 0.1:
            return ()
        answer = self.answers[tuple(request.prompt.token_ids), request.params.seed]
        at = len(request.output_token_ids)
        drafts = []
        for place in range(at, at + self.random.randint(1, count)):
            right = answer[place] if place < len(answer) else self.random.randrange(480)
            others = [self.random.randrange(480), right ^ 1, *self.ends, *request.params.stop_token_ids]
            drafts.append(right if self.random.random() < self.share_right else self.random.choice(others))
        return tuple(drafts)

    def observe(self, row, chosen):
        assert len(chosen) == len(row.draft_ids) + 1


def with_drafts(engine, monkeypatch, completions, prompts, share_right=0.7, seed=0):
    """The engine, from now on with drafts of an Oracle that knows these answers."""
    answers = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        for index, token_ids in enumerate(completion.token_ids):
            answers[tuple(prompt.token_ids), child_seed(completion.seed, index)] = token_ids
    oracle = Oracle(answers, share_right, seed, engine.processor.eos_token_ids)
    monkeypatch.setattr(engine.scheduler, "max_yield", 1 + MOST)
    monkeypatch.setattr(engine.runner, "speculator", Speculator(oracle, MOST))
    return engine.runner.speculator


def assert_same(found, wanted):
    """Two completions of one request."""
    assert found.token_ids == wanted.token_ids
    assert (found.texts, found.finish_reasons, found.error) == (wanted.texts, wanted.finish_reasons, wanted.error)
    assert (found.prompt_tokens, found.completion_tokens) == (wanted.prompt_tokens, wanted.completion_tokens)
    pairs = [*zip(found.logprobs, wanted.logprobs, strict=True), (found.prompt_logprobs, wanted.prompt_logprobs)]
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        for one, other in zip(ours or (), theirs or (), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.token_id, one.rank) == (other.token_id, other.rank)
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


# The sampler: a place ahead is that of a request which already has the drafts


def ruled(rng: random.Random, number: int, vocab_size: int) -> Request:
    """A request that asks for anything, over a small alphabet, so that histories and words repeat."""
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        seed=number,
        logprobs=rng.choice([None, 0, 3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
        min_new_tokens=rng.choice([0, 0, 4, 30]),
        stop_token_ids=rng.choice([(), (11, 12)]),
        ignore_eos=rng.random() < 0.2,
        logit_bias={rng.randrange(vocab_size): rng.uniform(-9, 9) for _ in range(rng.choice([0, 0, 3]))},
        allowed_token_ids=tuple(rng.sample(range(vocab_size), 40)) if rng.random() < 0.2 else None,
    )
    prompt = [rng.randrange(vocab_size + 5) for _ in range(rng.randint(1, 30))]
    output = [rng.randrange(12) for _ in range(rng.randint(0, 20))]
    request = make_request(params, prompt, output, request_id=str(number))
    words = [tuple(rng.randrange(12) for _ in range(rng.randint(1, 3))) for _ in range(rng.choice([0, 0, 1, 4]))]
    request.bad_words = BadWords(words) if words else None
    return request


def drafts_of(rng: random.Random) -> tuple[int, ...]:
    count = rng.choice([0, 0, 1, 3, 7])
    return tuple(rng.randrange(12) if rng.random() < 0.9 else rng.randrange(100, 140) for _ in range(count))


@pytest.mark.parametrize("seed", range(6))
def test_places_ahead_are_those_of_requests_that_have_the_drafts(seed):
    rng, vocab_size, ends = random.Random(seed), 256, (3, 7)
    sampler = Sampler(vocab_size, "cpu", ends)
    everybody = [ruled(rng, number, vocab_size) for number in range(10)]
    present = list(everybody)
    for step in range(9):
        if step % 4 == 3:  # the same requests for a while, then others
            present = rng.sample(everybody, rng.randint(1, 8))
        drafts = [drafts_of(rng) for _ in present] if step % 3 else None
        places = Places(present, drafts=drafts)
        logits = random_logits(places.num_rows, vocab_size, seed=step)
        before = logits.clone()
        with sampler.adjusted(logits, places):
            adjusted = logits.clone()
        assert torch.equal(logits, before)
        sampled = sampler.sample(logits, present, drafts=drafts)
        assert torch.equal(logits, before)
        for row, number in enumerate(places.owner):
            request = present[number]
            ahead = places.drafts_of(number)[: row - places.first[number]]
            alone = make_request(
                request.params, request.prompt.token_ids, [*request.output_token_ids, *ahead], request_id="alone"
            )
            alone.bad_words = request.bad_words
            fresh, own = Sampler(vocab_size, "cpu", ends), logits[row : row + 1].clone()
            with fresh.adjusted(own, Places([alone])):
                assert torch.equal(own[0], adjusted[row]), (step, row, ahead)
            expected = fresh.sample(logits[row : row + 1].clone(), [alone])
            assert sampled.token_ids[row] == expected.token_ids[0]
            assert bool(sampled.failures.get(row)) == bool(expected.failures)
            right = sampled.token_ids[places.first[number] : row] == list(ahead)
            assert sampled.logprobs[row] == (expected.logprobs[0] if right else None)
        for request in present:
            request.output_token_ids.extend(rng.randrange(12) for _ in range(rng.randint(1, 4)))
    for request in everybody:
        sampler.forget(request.id)
    sampler.check(())


# Grammars


AT = {"properties": {"at": {"enum": [1, 22, 333]}}, "required": ["at"]}
LAZY = calls({"name": "f", "parameters": AT}, is_lazy=True)
GRAMMARS = {
    "schema": (schema(THING), '{"name": "abc", "box": [12, 3], "tone": "dark"}'),
    "regex": (Grammar("regex", "(ab|a|[0-9]{2,5} )*"), "abaab123 12 ab"),
    "choice": (Grammar("choice", '["a square is red", "a square is blue"]'), "a square is blue"),
    "lazy calls": (
        LAZY,
        'Well: <tool_call>\n{"name": "f", "arguments": {"at": 22}}\n</tool_call> and <tool_call>\n{"name": "f", '
        '"arguments": {"at":333}}\n</tool_call> so',
    ),
    "one lazy call": (
        replace(LAZY, source=json.dumps(json.loads(LAZY.source) | {"parallel": False})),
        'Well: <tool_call>\n{"name": "f", "arguments": {"at": 22}}\n</tool_call>',
    ),
    "behind reasoning": (
        Grammar("choice", '["red", "blue"]', after=THINK_END), f"it may be red{THINK_END}\nblue",
    ),
    "behind reasoning, without the lead": (
        Grammar("json_schema", json.dumps(THING), after=THINK_END),
        THINK_END + '{"name":"ab","box":[1,2],"tone":"light"}',
    ),
}  # fmt: skip


def barred_of(matcher: Matcher, ahead=()) -> list[int] | None:
    mask = matcher.barred(ahead)
    return None if mask is None else np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_ahead_are_those_of_an_answer_that_has_the_drafts(engine, monkeypatch, name):
    """Along an allowed text, with wrong drafts at random places: what they leave, and the masks behind each of them."""
    monkeypatch.setattr("executor.engine.grammar.LEAD", "\n")  # two are no token of the tiny tokenizer
    grammar, text = GRAMMARS[name]
    params = SamplingParams(grammar=grammar, stop_token_ids=(5,), max_new_tokens=100)
    token_ids = engine.processor.tokenizer.encode(text, add_special_tokens=False)
    masks: list[list[int] | None] = []
    plain = engine.matchers.begin(params)
    is_over = False
    for token_id in token_ids:
        assert not is_over
        masks.append(barred_of(plain))
        assert masks[-1] is None or token_id not in masks[-1]
        is_over = plain.take([token_id])
    masks.append(None if is_over else barred_of(plain))
    assert is_over == (name in ("schema", "choice", "one lazy call") or "reasoning" in name)
    rng, num_cut = random.Random(name), 0
    for _ in range(6):
        matcher, at = engine.matchers.begin(params), 0
        while at < len(token_ids):
            drafts = list(token_ids[at : at + rng.randint(0, MOST)])
            num_right = len(drafts)
            if drafts and rng.random() < 0.5:
                num_right = rng.randrange(len(drafts))
                drafts[num_right] = rng.choice([5, 488, *range(480)])
                if drafts[num_right] == token_ids[at + num_right]:
                    num_right += 1
            if rng.random() < 0.3:  # asked again, with others behind the same
                matcher.allowed([*drafts[: rng.randint(0, MOST)], *rng.sample(range(480), 2)])
            kept = tuple(drafts[: matcher.allowed(drafts)])
            num_cut += len(drafts) - len(kept)
            for count in range(min(num_right, len(kept)) + 1):
                assert barred_of(matcher, kept[:count]) == masks[at + count]
            if len(kept) < min(num_right, len(drafts)):  # right drafts are only cut where the answer ends
                assert is_over and at + len(kept) + 1 == len(token_ids)
            for place, token_id in enumerate(kept[num_right : num_right + 1], start=num_right):
                assert masks[at + place] is None or token_id not in masks[at + place], "a wrong draft that may come"
            step = rng.randint(1, min(num_right, len(kept)) + 1)
            assert matcher.take(token_ids[at : at + step]) == (is_over and at + step == len(token_ids))
            at += step
    assert num_cut > 0


def test_a_mask_ahead_that_fails_is_no_fault_of_the_answer(engine, monkeypatch):
    """Behind a wrong draft nobody asks for it; the answer's own masks are as ever."""
    made = []
    monkeypatch.setattr(engine.matchers, "submit", lambda mask: made.append(mask) or Future())
    matcher = engine.matchers.begin(SamplingParams(grammar=Grammar("regex", "[ab]{40}")))
    a, b = engine.processor.tokenizer.encode("a") + engine.processor.tokenizer.encode("b")
    wanted, computed = barred_of(matcher), Mask.__call__
    assert matcher.allowed([a, b, a]) == 3 and len(made) == 4
    assert matcher.allowed([a, b, a]) == 3 and len(made) == 4, "masks are not computed twice"

    def fails(self):
        if self is made[2]:
            raise GrammarFault("no mask")
        return computed(self)

    monkeypatch.setattr(Mask, "__call__", fails)
    assert barred_of(matcher, (a,)) == wanted
    with pytest.raises(GrammarFault, match="no mask"):
        matcher.barred((a, b))
    assert not matcher.take([a, a])
    assert barred_of(matcher) == wanted


# Whole answers


QUESTIONS = ["What is this?", "Count from one to twenty.", "Say the same word again and again.", "Is it red?"]
WORDS = ["e", "yellow", " the", "11", "a yellow", "the word", " circle", "top left", "yellow yellow", "NN", " cross"]
SCHEMA = Grammar("json_schema", json.dumps(THING))
AFTER = Grammar("choice", json.dumps(["a square is red", "blue"]), after=THINK_END)
MATTERS = {  # what a request may ask for -> a random value of it
    "temperature": lambda rng: rng.choice([0.7, 1.0, 1.6]),
    "top_k": lambda rng: rng.choice([3, 20, 200]),
    "top_p": lambda rng: rng.choice([0.5, 0.9]),
    "min_p": lambda rng: rng.choice([0.05, 0.3]),
    "repetition_penalty": lambda rng: rng.choice([0.9, 1.05, 1.5]),
    "presence_penalty": lambda rng: rng.choice([-1.0, 1.5]),
    "frequency_penalty": lambda rng: rng.choice([-0.5, 0.4, 2.0]),
    "stop": lambda rng: tuple(rng.sample(WORDS, rng.randint(1, 2))),
    "stop_token_ids": lambda rng: tuple(rng.sample(range(480), 40)),
    "ignore_eos": lambda rng: True,
    "min_new_tokens": lambda rng: rng.choice([2, 9]),
    "logprobs": lambda rng: rng.choice([0, 2]),
    "prompt_logprobs": lambda rng: rng.choice([0, 2]),
    "n": lambda rng: 2,
    "logit_bias": lambda rng: {rng.randrange(480): rng.uniform(-5, 8) for _ in range(5)} | {488: rng.uniform(-2, 9)},
    "allowed_token_ids": lambda rng: (488, *rng.sample(range(480), 100)),
    "bad_words": lambda rng: tuple(rng.sample(WORDS, 6)),
    "grammar": lambda rng: rng.choice([SCHEMA, Grammar("regex", "(ab|a|[0-9]{2,5} )*"), LAZY, AFTER]),
    "include_stop_str_in_output": lambda rng: True,
    "skip_special_tokens": lambda rng: False,
    "max_new_tokens": lambda rng: rng.choice([1, 2, 7, 40]),
    "seed": lambda rng: rng.randrange(1 << 40),
}


def test_all_that_a_request_may_ask_for_is_among_the_matters():
    assert MATTERS.keys() == {field.name for field in fields(SamplingParams)}


def random_params(rng, *names) -> SamplingParams:
    """With these, and some others."""
    chosen = {*names, *rng.sample([*MATTERS], rng.randint(0, 5))}
    if "grammar" in names:
        chosen -= {"allowed_token_ids"}  # together they mostly leave nothing
    if rng.random() < 0.6:  # else most answers are a few tokens
        chosen |= {"ignore_eos", "temperature"}
    params = {"max_new_tokens": 25, "seed": rng.randrange(100)}
    params |= {name: MATTERS[name](rng) for name in sorted(chosen)}
    params["min_new_tokens"] = min(params.get("min_new_tokens", 0), params["max_new_tokens"])
    return SamplingParams(**params)


@pytest.mark.parametrize("name", MATTERS)
def test_answers_are_those_without_drafts(engine, monkeypatch, name):
    """Six requests at a time with one matter in common, and any others."""
    rng = random.Random(name)
    reasons, num_accepted, num_wrong = set(), 0, 0
    for turn in range(2):
        prompts = [engine.prompt(f"{question} {turn}.{number}") for number, question in enumerate((QUESTIONS * 2)[:6])]
        asked = [random_params(rng, name) for _ in prompts]
        wanted = engine.generate(prompts, asked)
        with monkeypatch.context() as patch:
            speculator = with_drafts(engine, patch, wanted, prompts, rng.choice([0.5, 0.9]), turn)
            found = engine.generate(prompts, asked)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
        reasons.update(reason for each in wanted for reason in each.finish_reasons)
        num_accepted += speculator.counts.num_accepted_tokens
        num_wrong += speculator.counts.num_draft_tokens - speculator.counts.num_accepted_tokens
    assert num_accepted and num_wrong
    assert reasons & {FinishReason.STOP, FinishReason.LENGTH}


def test_each_output_has_the_logprobs_and_text_of_its_tokens(engine, monkeypatch):
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, logprobs=1, temperature=1.0, seed=4, stop="yellow7")
    prompts = [engine.prompt(question) for question in QUESTIONS]
    wanted = engine.generate(prompts, params)
    with_drafts(engine, monkeypatch, wanted, prompts, 0.9)
    for prompt, completion in zip(prompts, wanted, strict=True):
        outputs = list(engine.stream(prompt, params))
        assert max(len(output.token_ids) for output in outputs) > 2
        for output in outputs:
            assert [each.token_id for each in output.logprobs] == list(output.token_ids)
        assert sum((output.token_ids for output in outputs), ()) == completion.token_ids[0]
        assert "".join(output.text_delta for output in outputs) == completion.text
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)


def test_an_abort_between_steps_with_drafts_leaves_nothing(engine, monkeypatch):
    params = SamplingParams(max_new_tokens=60, ignore_eos=True, presence_penalty=1.0, grammar=GRAMMARS["regex"][0])
    prompts = [engine.prompt(question) for question in QUESTIONS]
    wanted = engine.generate(prompts, params)
    with_drafts(engine, monkeypatch, wanted, prompts)
    ids = [engine.add(prompt, params) for prompt in prompts]
    for request_id in ids:
        engine.step()
        engine.step()
        engine.abort(request_id)
        engine.scheduler.check()


# Faults


FREE = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=8, logprobs=0)


@pytest.mark.parametrize("lasts", [False, True])
def test_a_fault_behind_a_draft_comes_with_the_step_that_meets_it_first(engine, monkeypatch, lasts):
    """What was found before it is kept; a fault that does not last is none."""
    prompts = [engine.prompt(question) for question in QUESTIONS]
    wanted = engine.generate(prompts, FREE)
    forward, met = engine.runner.forward, []
    broken = {prompt: len(prompt.token_ids) + 9 + number for number, prompt in enumerate(prompts[:3])}

    def breaks(plan, *rest):
        logits, at = forward(plan, *rest), 0
        for row in plan.rows:
            for place in range((len(row.draft_ids) + 1) if row.max_yield else 0):
                is_there = row.request.num_tokens + place == broken.get(row.request.prompt)
                if is_there and (lasts or (place and row.request not in met)):
                    met.append(row.request)
                    logits[at] = float("nan")
                at += 1
        return logits

    with_drafts(engine, monkeypatch, wanted, prompts, 0.95)
    monkeypatch.setattr(engine.runner, "forward", breaks)
    if lasts:
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "max_yield", 1)
            wanted = engine.generate(prompts, FREE)
        assert [bool(each.error) for each in wanted] == [True, True, True, False]
        met.clear()
    for found, expected in zip(engine.generate(prompts, FREE), wanted, strict=True):
        assert_same(found, expected)
    assert met


@pytest.mark.parametrize("fails", ["every second step", "every row with drafts"])
def test_a_step_computed_again_has_no_drafts_and_is_not_observed(engine, monkeypatch, fails):
    prompts = [engine.prompt(question) for question in QUESTIONS]
    asked = [FREE, replace(FREE, grammar=GRAMMARS["regex"][0]), replace(FREE, repetition_penalty=1.2), FREE]
    wanted = engine.generate(prompts, asked)
    forward, steps, num_verified = engine.runner.forward, [], 0

    def breaks(plan, *rest):
        nonlocal num_verified
        steps.append(plan)
        num_with_drafts = sum(bool(row.draft_ids) for row in plan.rows)
        if num_with_drafts if fails == "every row with drafts" else len(plan.rows) > 1 and len(steps) % 2:
            raise RuntimeError("a kernel refuses")
        num_verified += num_with_drafts
        return forward(plan, *rest)

    monkeypatch.setattr(engine.runner, "forward", breaks)
    speculator, clock = with_drafts(engine, monkeypatch, wanted, prompts, 0.9), engine.runner.clock
    num_before = clock.num_decode_steps + clock.num_prefill_steps
    for found, expected in zip(engine.generate(prompts, asked), wanted, strict=True):
        assert_same(found, expected)
    assert sum(bool(row.draft_ids) for plan in steps for row in plan.rows) > num_verified
    assert bool(num_verified) == (fails == "every second step")
    assert speculator.counts.num_drafts == num_verified
    assert clock.num_decode_steps + clock.num_prefill_steps - num_before < len(steps)
