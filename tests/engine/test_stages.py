"""Stages: what is inside another one takes its time from it, and an engine's stages add up to no more than passed."""

import threading
import time
from contextlib import contextmanager

import pytest

from executor.engine.loop import EngineLoop
from executor.engine.stages import STAGES, StageClock, StageTimes
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

PICTURE = {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}
QUESTION = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What do you see?"}]}]
ANSWER = SamplingParams(max_new_tokens=8, ignore_eos=True)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch) -> Time:
    by_hand = Time()
    monkeypatch.setattr("executor.engine.stages.time", by_hand)
    return by_hand


def test_a_stage_inside_another_takes_its_time_from_it(hand):
    clock = StageClock()
    with clock.stage("host"):
        hand.now = 1.0
        with clock.stage("vision"):
            hand.now = 3.0
        with clock.stage("host"):  # again, inside itself
            hand.now = 3.5
            with clock.stage("sampling", "decode"):
                hand.now = 4.0
        hand.now = 8.0
    hand.now = 20.0
    with clock.stage("decode"):
        hand.now = 21.0
    assert clock.times() == StageTimes(vision_s=2.0, decode_s=1.5, host_s=5.5)


def test_a_stage_that_raises_is_left(hand):
    clock = StageClock()
    with pytest.raises(ValueError), clock.stage("host"), clock.stage("vision"):
        hand.now = 1.0
        raise ValueError
    hand.now = 5.0
    with clock.stage("decode"):
        hand.now = 6.0
    assert clock.times() == StageTimes(vision_s=1.0, decode_s=1.0)


def test_what_runs_beside_takes_nothing_from_a_stage(hand):
    clock, inside, done = StageClock(), threading.Event(), threading.Event()

    def prepare() -> None:
        with clock.beside("media"):
            inside.set()
            done.wait(10)

    with clock.stage("decode"):
        thread = threading.Thread(target=prepare)
        thread.start()
        assert inside.wait(10)
        hand.now = 2.0
        done.set()
        thread.join()
    assert clock.times() == StageTimes(media_s=2.0, decode_s=2.0)


def test_spans_have_the_stages_names_whatever_they_are_booked_to(hand):
    clock, seen = StageClock(), []

    @contextmanager
    def span(name):
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    with clock.stage("host"):
        clock.span = span  # in the middle: the stage that is open has no span
        with clock.stage("sampling", "decode"), clock.beside("media"):
            clock.span = None
    assert seen == ["+sampling", "+media", "-media", "-sampling"]


@pytest.fixture(scope="module")
def engine():
    return engine_over(REPO / "models" / "tiny" / "qwen3_vl", max_num_seqs=4)


def check(times: StageTimes, passed_s: float, num_decode_steps: int) -> None:
    seconds = times.by_stage()
    assert list(seconds) == list(STAGES)
    assert {stage for stage, value in seconds.items() if value > 0} == {*STAGES} - {"draft"}, seconds
    assert sum(seconds.values()) - times.media_s <= passed_s
    assert (times.num_prefill_steps, times.num_decode_steps) == (1, num_decode_steps)


def test_an_answer_goes_through_every_stage(engine):
    before, started = engine.runner.clock.times(), time.perf_counter()
    engine.generate([QUESTION], ANSWER)
    check(engine.runner.clock.times().since(before), time.perf_counter() - started, 7)


def test_a_loops_stages_leave_its_waiting_out(engine):
    before, started = engine.runner.clock.times(), time.perf_counter()
    other = [{"role": "user", "content": [PICTURE | {"image": PICTURE["image"].replace("objects", "word")}]}]
    with EngineLoop(engine).start() as loop:
        time.sleep(0.5)
        loop.submit(lambda: engine.processor.build(other), ANSWER).result(60)
        time.sleep(0.5)
    check(engine.runner.clock.times().since(before), time.perf_counter() - started - 0.9, 7)
