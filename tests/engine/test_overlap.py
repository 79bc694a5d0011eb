"""An engine that queues a step before it has read the tokens of the last answers as one that reads them first."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from executor.engine import sampler as sampling
from executor.engine.sampler import Drawn
from executor.schedule.request import FinishReason, Prompt, SamplingParams
from tests.cases import mostly_long
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO

QUESTIONS = (
    "What is this?",
    "Count from one to twenty.",
    "Say the same word again and again, and then say it once more, and another time.",
    "Name a color.",
)
PLAIN = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request):
    with engine_over(REPO / "models" / "tiny" / request.param, max_num_batched_tokens=96) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    left = list(engine._answers_of)
    for request_id in left:
        engine.abort(request_id)
    engine.step()
    assert not left, left


class Launches:
    """How many steps were queued behind one that had not been read."""

    def __init__(self, engine, monkeypatch) -> None:
        self.num_ahead = self.num_steps = 0
        self.num_void = self.num_in_vain = 0
        launch, collect = engine.runner.launch, engine.runner.collect

        def launched(plan):
            self.num_steps += 1
            self.num_ahead += plan.continues is not None
            return launch(plan)

        def collected(step, *, is_last):
            result = collect(step, is_last=is_last)
            self.num_void += len(result.void)
            self.num_in_vain += sum(row.request.finished for row in step.plan.rows)
            return result

        monkeypatch.setattr(engine.runner, "launch", launched)
        monkeypatch.setattr(engine.runner, "collect", collected)


def random_params(rng: random.Random) -> SamplingParams:
    chosen = SamplingParams(
        max_new_tokens=rng.choice((1, 2, 9, 17, 40, 40)),
        ignore_eos=rng.random() < 0.5,
        temperature=rng.choice((0.0, 0.0, 0.8, 1.5)),
        top_k=rng.choice((0, 5)),
        top_p=rng.choice((1.0, 0.9)),
        seed=rng.randrange(1000),
        logprobs=rng.choice((None, None, 0, 3)),
        stop=rng.choice(((), (), ("e",), ("an", "or"))),
        n=rng.choice((1, 1, 2)),
    )
    extra = rng.choice(
        (
            {},
            {},
            {},
            {},
            {"presence_penalty": 0.7},
            {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
            {"bad_words": ("the",)},
            {"min_new_tokens": 1},
        )
    )
    extra |= rng.choice(({}, {}, {"logit_bias": ((17, 3.0),)}, {"prompt_logprobs": 1}))
    return replace(chosen, **extra)


def drive(engine, seed: int) -> dict[str, tuple]:
    """Random requests that arrive while others are answered, some of them aborted: what each of them came to."""
    rng = random.Random(seed)
    waiting = [(f"{number}", rng.choice(QUESTIONS), random_params(rng)) for number in range(30)]
    aborts = {name: rng.randrange(1, 12) for name, _, params in waiting if params.n == 1 and rng.random() < 0.4}
    found: dict[tuple[str, int], list] = {}
    engine.scheduler.forget()
    running: set[tuple[str, int]] = set()
    while waiting or running:
        while waiting and (len(running) < 6 or rng.random() < 0.2):
            name, question, params = waiting.pop(0)
            engine.add(question, params, name)
            running |= {(name, index) for index in range(params.n)}
        for output in engine.step():
            key = output.request_id, output.index
            tokens, texts, logprobs, ends = found.setdefault(key, ([], [], [], []))
            tokens += output.token_ids
            texts.append(output.text_delta)
            logprobs += output.logprobs
            if output.finished:
                ends.append((output.finish_reason, output.request.stop_reason))
                running.discard(key)
            elif len(tokens) >= aborts.get(key[0], 1000):
                engine.abort(key[0])
                ends.append((FinishReason.ABORT, None))
                running.discard(key)
        engine.scheduler.check()
    assert not engine.scheduler.has_work
    return {key: (tokens, "".join(texts), logprobs, ends) for key, (tokens, texts, logprobs, ends) in found.items()}


@pytest.mark.parametrize(  # the loop knows no family: with few blocks and with many once a family
    "seed, blocks", mostly_long([(seed, blocks) for seed in range(2) for blocks in (256, 14)], [(0, 256), (1, 14)])
)
def test_random_requests_have_the_same_answers(engine, monkeypatch, caplog, seed, blocks):
    """Lengths, stops, aborts, preemptions, cached prefixes, seeds, penalties, logprobs."""
    if blocks < 256:
        monkeypatch.setattr(engine.scheduler, "pool", type(engine.scheduler.pool)(blocks, 16, True))
    monkeypatch.setattr(engine, "overlaps", False)
    wanted = drive(engine, seed)
    monkeypatch.setattr(engine, "overlaps", True)
    launches = Launches(engine, monkeypatch)
    found = drive(engine, seed)
    assert found.keys() == wanted.keys()
    for key, (tokens, text, logprobs, ends) in wanted.items():
        ours = found[key]
        assert ours[0] == tokens and ours[1] == text and ours[3] == ends, key
        for one, other in zip(ours[2], logprobs, strict=True):
            assert one.token_id == other.token_id and one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert launches.num_ahead > 0.2 * launches.num_steps and not caplog.records
    reasons = Counter(end[0] for *_, ends in wanted.values() for end in ends)
    assert reasons[FinishReason.ABORT] and reasons[FinishReason.LENGTH] > 5 and reasons[FinishReason.STOP] > 5
    engine.runner.sampler.check(())


def ask(engine, params=PLAIN) -> list[tuple]:
    done = engine.generate(QUESTIONS[:3], params)
    return [(each.token_ids, each.texts, each.finish_reasons, each.error) for each in done]


@pytest.fixture
def answers(engine, monkeypatch):
    """What is answered without, of an engine that overlaps from then on; and its launches."""

    def answers(params=PLAIN):
        monkeypatch.setattr(engine, "overlaps", False)
        wanted = ask(engine, params)
        monkeypatch.setattr(engine, "overlaps", True)
        return wanted, Launches(engine, monkeypatch)

    return answers


def test_rows_whose_filters_leave_more_than_was_guessed_are_computed_again(engine, answers, monkeypatch):
    params = replace(PLAIN, temperature=0.9, top_k=9, top_p=0.95, seed=4, logprobs=2)
    wanted, launches = answers(params)
    likely, rng, opened = sampling.likely_survivors, random.Random(1), []

    def doubting(scores, *rest):
        ids, candidates, is_open = likely(scores, *rest)
        count = rest[-1].count
        opened.append(count)
        return (
            ids,
            candidates,
            is_open | torch.tensor([rng.random() < (0.1 if count < 1024 else 0.01) for _ in is_open]),
        )

    monkeypatch.setattr(sampling, "likely_survivors", doubting)
    assert ask(engine, params) == wanted
    assert launches.num_void and launches.num_ahead > 5 and 1024 in opened
    engine.runner.sampler.check(())


def test_penalties_count_a_token_that_the_host_has_not_read(engine, answers):
    """Tokens that come again and again, new ones, and those of the prompt."""
    for params in (
        replace(PLAIN, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4),
        replace(PLAIN, frequency_penalty=-0.5, temperature=0.7, seed=2),
        replace(PLAIN, repetition_penalty=0.9, logprobs=1),
    ):
        wanted, launches = answers(params)
        assert ask(engine, params) == wanted
        assert launches.num_ahead > 30
        if params.repetition_penalty > 1:
            assert wanted != answers()[0]


def test_rows_that_stand_in_another_order_in_the_next_step_have_their_own_tokens(engine, monkeypatch):
    """A long prompt comes to its end behind the row of a short one, which was admitted later and is decoded already."""
    long, short = (
        Prompt(list(range(40, 40 + count)), np.tile(np.arange(count), (3, 1)), position_delta=0) for count in (200, 9)
    )

    def tokens() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        engine.scheduler.forget()
        engine.add(long, PLAIN, "long")
        engine.step()
        engine.add(short, PLAIN, "short")
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        return found

    monkeypatch.setattr(engine, "overlaps", False)
    wanted, continues = tokens(), []
    monkeypatch.setattr(engine, "overlaps", True)
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda plan: continues.append(plan.continues) or launch(plan))
    assert tokens() == wanted
    assert (1, 0) in continues


def spoil(engine, monkeypatch, is_bad) -> None:
    forward = engine.runner.forward

    def spoilt(plan, *rest):
        logits = forward(plan, *rest)
        for number, row in enumerate(plan.rows):
            if is_bad(row):
                logits[number] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "forward", spoilt)


def test_logits_that_are_not_finite_fail_their_request_alone(engine, answers, monkeypatch):
    wanted, launches = answers()
    victim = engine.prompt(QUESTIONS[1]).token_ids
    spoil(engine, monkeypatch, lambda row: row.request.prompt.token_ids == victim and row.start == len(victim) + 6)
    found = ask(engine)
    assert found[0] == wanted[0] and found[2] == wanted[2]
    (tokens,), _, reasons, error = found[1]
    assert tokens == wanted[1][0][0][:7] and reasons == (FinishReason.ERROR,) and "NaN" in error
    assert f"after {len(victim) + 7} tokens" in error and launches.num_void


def test_what_is_computed_in_vain_changes_no_answer(engine, answers, monkeypatch):
    (token_ids,) = ask(engine)[0][0]
    params = replace(PLAIN, stop_token_ids=(token_ids[5],))
    wanted, launches = answers(params)
    assert wanted[0][2] == (FinishReason.STOP,)
    num_prompt, num_output = len(engine.prompt(QUESTIONS[0]).token_ids), len(wanted[0][0][0])
    first = engine.prompt(QUESTIONS[0]).token_ids
    spoil(
        engine,
        monkeypatch,
        lambda row: row.request.prompt.token_ids == first and row.start >= num_prompt + num_output - 1,
    )
    assert ask(engine, params) == wanted
    assert launches.num_in_vain


@pytest.mark.parametrize("count", mostly_long((3, 4, 5), [4]))
def test_a_step_that_cannot_be_launched_is_begun_again(engine, answers, monkeypatch, count):
    wanted, launches = answers()
    forward, calls = engine.runner.forward, []

    def failing(plan, *rest):
        calls.append(plan)
        if len(calls) == count:
            forward(plan, *rest)
            raise RuntimeError("out of memory")
        return forward(plan, *rest)

    monkeypatch.setattr(engine.runner, "forward", failing)
    assert ask(engine) == wanted and launches.num_ahead > 10


def test_tokens_that_cannot_be_read_are_computed_again_row_by_row(engine, answers, monkeypatch):
    wanted, launches = answers()
    read, calls = Drawn.read, []

    def failing(drawn, **options):
        calls.append(options)
        if len(calls) in (4, 9):
            raise RuntimeError("the device is lost")
        return read(drawn, **options)

    monkeypatch.setattr(Drawn, "read", failing)
    assert ask(engine) == wanted and launches.num_ahead > 10


def test_an_interrupted_call_leaves_nothing_running(engine, answers, monkeypatch):
    wanted, _ = answers()
    launch, calls = engine.runner.launch, []

    def failing(plan):
        calls.append(plan)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", failing)
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert calls[-1].continues and not engine.has_work
    engine.scheduler.check()
    assert ask(engine) == wanted


def test_a_step_that_raises_is_taken_back(engine, answers, monkeypatch):
    wanted, _ = answers()
    collect, calls = engine.runner.collect, []

    def failing(step, **options):
        calls.append(step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return collect(step, **options)

    monkeypatch.setattr(engine.runner, "collect", failing)
    for question in QUESTIONS[:3]:
        engine.add(question, PLAIN)
    found, tokens = 0, {}
    while engine.has_work:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            found += 1
            continue
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert found == 1 and sorted(tokens.values()) == sorted(list(each[0][0]) for each in wanted)


def test_a_stream_that_is_left_and_an_engine_that_is_closed(answers, engine):
    wanted, launches = answers(replace(PLAIN, max_new_tokens=9))
    stream = engine.stream(QUESTIONS[0], PLAIN)
    assert [next(stream).token_ids for _ in range(3)] == [(token_id,) for token_id in wanted[0][0][0][:3]]
    stream.close()
    assert launches.num_ahead and not engine.has_work and engine.step() == []
    assert ask(engine, replace(PLAIN, max_new_tokens=9)) == wanted
    with engine_over(REPO / "models" / "tiny" / "qwen3_vl") as other:
        assert not other.overlaps, "on the host itself a step has ended when its call returns"
        other.overlaps = True
        other.add(QUESTIONS[0], PLAIN)
        assert len(other.step()) == len(other.step()) == 1


def test_the_counts_and_the_watch_are_of_what_was_computed(engine, answers, monkeypatch):
    answers()
    watched, before = [], engine.runner.clock.times()
    engine.watch = lambda plan, num_kept: watched.append((plan, sum(num_kept)))
    ask(engine)
    engine.watch = None
    times = engine.runner.clock.times().since(before)
    assert times.num_prefill_steps + times.num_decode_steps == len(watched) >= PLAIN.max_new_tokens
    computed = Counter((row.request.id, row.start) for plan, _ in watched for row in plan.rows if row.max_yield)
    assert set(computed.values()) == {1} and len(computed) == 3 * PLAIN.max_new_tokens
    assert sum(count for _, count in watched) == 3 * PLAIN.max_new_tokens
