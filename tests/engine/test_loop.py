"""Requests from any thread: prepared beside the engine, each with its own end, bounded, and over when the loop is."""

import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from executor.engine.detokenize import Detokenizer
from executor.engine.loop import EngineLoop, QueueFull
from executor.engine.prepare import Preparers
from executor.errors import UserError
from executor.schedule.request import FinishReason, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=1500, ignore_eos=True)
QUESTION = "Count the objects."


@pytest.fixture(scope="module")
def engine():
    return engine_over(REPO / "models" / "tiny" / "qwen3_vl", max_num_seqs=3)


@pytest.fixture(scope="module")
def answer(engine):
    return engine.generate(QUESTION, SHORT)[0]


@pytest.fixture
def loop(engine, answer):
    loop = EngineLoop(engine)
    yield loop
    loop.stop()
    assert not engine.has_work and loop.num_unfinished == 0
    engine.scheduler.check()


def test_answers_from_many_threads(loop, answer):
    loop.start()
    found = []

    def client():
        handle = loop.submit(QUESTION, SHORT)
        pieces = [output.text_delta for output in handle.outputs(60)]
        found.append(("".join(pieces), handle.completion.token_ids))

    threads = [threading.Thread(target=client) for _ in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(answer.text, answer.token_ids)] * 7


def test_preparing_holds_nobody_up_and_happens_elsewhere(loop, engine, answer):
    release, names = threading.Event(), []

    def slow():
        names.append(threading.current_thread().name)
        assert release.wait(60)
        return engine.prompt(QUESTION)

    quick, late = loop.submit(engine.prompt(QUESTION), SHORT), loop.submit(slow, SHORT)
    ended = []
    while quick not in ended:
        ended += loop.turn(5)
    assert late not in ended and not late.ended
    release.set()
    while late not in ended:
        ended += loop.turn(5)
    assert late.completion.token_ids == answer.token_ids
    assert len(names) == 1 and names[0].startswith("prepare: media ")
    assert late.prepare_s > quick.prepare_s


@pytest.mark.parametrize("error", [UserError("no such picture"), ZeroDivisionError("x"), AttributeError("y")])
def test_what_a_preparation_raises_is_its_own_request_s(loop, answer, error):
    def make():
        raise error

    bad, good = loop.start().submit(make, SHORT), loop.submit(QUESTION, SHORT)
    assert good.result(60).token_ids == answer.token_ids
    with pytest.raises(type(error), match=str(error)):
        bad.result(60)
    assert bad.failure is error


def test_what_the_engine_refuses_is_its_own_request_s(loop, answer):
    loop.start()
    long, odd = loop.submit("red " * 2100, SHORT), loop.submit(QUESTION, replace(SHORT, top_p=7))
    good = loop.submit(QUESTION, SHORT)
    with pytest.raises(UserError, match="maximum context length"):
        long.result(60)
    with pytest.raises(UserError, match="top_p"):
        odd.result(60)
    assert good.result(60).token_ids == answer.token_ids


def test_no_more_are_prepared_than_soon_run(loop, engine):
    prepared = []
    for number in range(9):
        loop.submit(lambda number=number: prepared.append(number) or QUESTION, ENDLESS)
    deadline = time.monotonic() + 60
    while engine.scheduler.num_running < 3 or engine.scheduler.num_waiting < 2:
        assert time.monotonic() < deadline
        loop.turn(0.1)
    for _ in range(5):
        loop.turn(0.1)
    assert sorted(prepared) == [0, 1, 2, 3, 4], "three run, and two are ahead"


def test_aborting_frees_a_request_wherever_it_is(loop, engine):
    handles = [loop.submit(QUESTION, ENDLESS) for _ in range(9)]
    loop.start()
    next(handles[0].outputs(60))
    handles[8].abort()  # not prepared
    handles[0].abort()
    for handle in (handles[8], handles[0]):
        with pytest.raises(RuntimeError, match="was aborted"):
            handle.result(60)
    assert loop.num_unfinished == 7


def test_a_request_has_its_time(loop, answer):
    loop.start()
    late, good = loop.submit(QUESTION, ENDLESS, timeout_s=0.2), loop.submit(QUESTION, SHORT)
    with pytest.raises(TimeoutError, match="in the time that it had"):
        late.result(60)
    assert good.result(60).token_ids == answer.token_ids
    with pytest.raises(TimeoutError, match="no output for 0.01 s"):
        loop.submit(lambda: time.sleep(0.5) or QUESTION, SHORT).result(0.01)


def test_the_queue_is_bounded(engine):
    with EngineLoop(engine, max_unfinished=2) as loop:
        loop.submit(QUESTION, ENDLESS), loop.submit(QUESTION, ENDLESS)
        with pytest.raises(QueueFull, match="2 requests are unfinished"):
            loop.submit(QUESTION, SHORT)
    assert not engine.has_work


def test_callbacks_are_told_everything_in_order(loop, answer):
    told, done = [], threading.Event()

    def tell(event):
        told.append(event)
        if event is handle.completion or event is handle.failure:
            done.set()

    handle = loop.submit(QUESTION, SHORT, on_event=tell)
    loop.start()
    assert done.wait(60)
    assert "".join(output.text_delta for output in told[:-1]) == answer.text
    assert told[-1] is handle.completion and told[-1].token_ids == answer.token_ids


def test_stop_answers_what_is_there_or_aborts_it(engine, answer):
    loop = EngineLoop(engine).start()
    handles = [loop.submit(QUESTION, SHORT) for _ in range(5)]
    loop.stop(drain=True)
    assert [handle.completion.token_ids for handle in handles] == [answer.token_ids] * 5
    with pytest.raises(RuntimeError, match="takes no requests any more"):
        loop.submit(QUESTION, SHORT)
    loop = EngineLoop(engine).start()
    late = loop.submit(QUESTION, ENDLESS)
    next(late.outputs(60))
    loop.stop(drain=True, timeout_s=0.1)
    with pytest.raises(RuntimeError, match="aborted"):
        late.result(1)
    assert not engine.has_work


def test_a_step_that_fails_for_everybody_is_told_to_everybody_and_the_next_are_served(
    loop, engine, answer, monkeypatch
):
    faults = iter([True, True])
    execute = engine.runner.execute

    def failing(plan):
        assert not next(faults, False), "a defect"
        return execute(plan)

    monkeypatch.setattr(engine.runner, "execute", failing)
    handles = [loop.submit(engine.prompt(QUESTION), SHORT) for _ in range(2)]
    loop.start()
    for handle in handles:
        with pytest.raises(RuntimeError, match="the step failed: AssertionError: a defect"):
            handle.result(60)
    while next(faults, None):  # whether both were in one step or each in one
        pass
    assert loop.submit(QUESTION, SHORT).result(60).token_ids == answer.token_ids


def test_an_engine_that_fails_again_and_again_is_given_up(engine, answer, monkeypatch):
    def failing(plan):
        raise AssertionError("broken")

    loop = EngineLoop(engine).start()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", failing)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                loop.submit(QUESTION, SHORT).result(60)
        deadline = time.monotonic() + 60
        while loop.fault is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match="takes no requests any more: broken"):
        loop.submit(QUESTION, SHORT)
    loop.stop()
    assert engine.generate(QUESTION, SHORT)[0].token_ids == answer.token_ids


def test_preparing_threads_compute_with_one_core_and_change_no_other_s():
    before, seen, done = torch.get_num_threads(), [], threading.Event()
    torch.set_num_threads(2)
    try:
        preparers = Preparers({"media": 2})
        for _ in range(2):
            preparers.submit("media", lambda: seen.append(torch.get_num_threads()) or (len(seen) == 2 and done.set()))
        assert done.wait(10)
        preparers.stop()
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [1, 1, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_preparing_threads_have_ended_when_they_are_stopped():
    """A thread that came back from C++ while the interpreter is taken down would abort the process."""
    preparers, begun, done = Preparers({"media": 2}), threading.Event(), []

    def slow():
        begun.set()
        time.sleep(0.1)
        done.append("slow")

    for _ in range(2):
        preparers.submit("media", slow)
    begun.wait()
    for _ in range(20):
        preparers.submit("media", lambda: done.append("queued"))
    preparers.stop()
    assert not any(thread.is_alive() for thread in preparers.threads)
    assert "slow" in done and done.count("queued") < 20
    preparers.stop()  # once more is the same


def test_a_program_that_forgets_its_loop_ends_as_any_other():
    """The engine's thread and a preparing one are at work when the main thread returns."""
    code = (
        "from executor.commands.build import build_engine; from executor.engine.loop import EngineLoop; "
        "from executor.recipe.schema import load_recipe; from executor.schedule.request import SamplingParams; "
        "loop = EngineLoop(build_engine(load_recipe('config/quickstart.yaml'))).start(); "
        "ask = [{'role': 'user', 'content': [{'type': 'video', 'video': 'dataset/media/clip.mp4'}, "
        "{'type': 'text', 'text': 'What moves?'}]}]; "
        "many = [loop.submit(lambda: ask, SamplingParams(max_new_tokens=999, ignore_eos=True)) for _ in range(9)]; "
        "next(many[0].outputs()); print('said')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "said\n"), done.stderr


def test_a_text_waits_behind_no_picture(loop, answer):
    """Whatever the lane of media is at, and however many wait there."""
    release = threading.Event()

    def slow():
        assert release.wait(60)
        return QUESTION

    pictures = [loop.submit(slow, SHORT) for _ in range(9)]
    text = loop.submit(lambda: QUESTION, SHORT, lane="text")
    grammar = loop.submit(lambda: QUESTION, SHORT, lane="grammar")
    loop.start()
    assert text.result(60).token_ids == grammar.result(60).token_ids == answer.token_ids
    assert not any(picture.ended for picture in pictures)
    release.set()
    assert [picture.result(60).token_ids for picture in pictures] == [answer.token_ids] * 9


def test_texts_without_end_leave_pictures_their_turn(loop, answer):
    stop = threading.Event()

    def again(event):
        if event is not None and not isinstance(event, tuple) and not stop.is_set():  # it has ended
            loop.submit(QUESTION, SHORT, on_event=again)

    loop.start()
    for _ in range(12):
        loop.submit(QUESTION, SHORT, on_event=again)
    picture = loop.submit(lambda: QUESTION, SHORT)
    assert picture.result(60).token_ids == answer.token_ids
    stop.set()


def test_what_is_given_up_while_it_waits_is_forgotten_at_once(loop):
    """Its maker may hold a file's bytes; hundreds that hang up while others run must not add up."""

    class Content:
        def __call__(self):
            raise AssertionError("nobody asks for it any more")

    running = [loop.submit(QUESTION, ENDLESS) for _ in range(5)]
    while loop.engine.scheduler.num_running < 3:
        loop.turn(0.1)
    contents = [Content() for _ in range(200)]
    gone = [weakref.ref(content) for content in contents]
    handles = [loop.submit(content, SHORT, lane="text", timeout_s=1000) for content in contents]
    del contents
    for handle in handles[:100]:
        handle.abort()
    loop.turn()
    assert [ref() is None for ref in gone] == [True] * 100 + [False] * 100
    for handle in handles[100:]:
        handle.abort()
    loop.turn()
    assert all(ref() is None for ref in gone) and loop.num_unfinished == 5
    del running


def test_deadlines_are_kept_in_their_order_also_when_nothing_runs(loop, engine):
    block = threading.Event()

    def slow():
        assert block.wait(60)
        return QUESTION

    late = [loop.submit(slow, SHORT, timeout_s=seconds) for seconds in (0.3, 0.1, 0.2)]
    ended = []
    started = time.monotonic()
    while len(ended) < 3:
        ended += loop.turn(60)
    block.set()
    assert ended == [late[1], late[2], late[0]] and time.monotonic() - started < 30
    assert all(isinstance(handle.failure, TimeoutError) for handle in late)


def test_deadlines_of_what_has_ended_do_not_add_up(loop, engine, monkeypatch):
    monkeypatch.setattr("executor.engine.loop.MAX_STALE", 10)
    for _ in range(50):
        loop.submit(QUESTION, SHORT, lane="text", timeout_s=1000).abort()
        loop.turn()
    assert len(loop._deadlines) <= 12 and not loop._timed


@pytest.mark.parametrize("place", [3, 8])
def test_a_text_that_fails_beside_the_engine_is_its_own_request_s(loop, answer, monkeypatch, place):
    """Also where its last token fails, when the engine has let go of it."""
    push, names, chosen = Detokenizer.push, [], []

    def failing(self, token_ids):
        names.append(threading.current_thread().name)
        chosen.append(self)
        if self is chosen[0] and chosen.count(self) == place:
            raise ValueError("no such token")
        return push(self, token_ids)

    monkeypatch.setattr(Detokenizer, "push", failing)
    bad, good = loop.submit(QUESTION, SHORT), loop.submit(QUESTION, SHORT)
    loop.start()
    found = [handle.result(60) for handle in (bad, good)]
    (failed,) = (each for each in found if each.error is not None)
    assert "cannot be read as text: ValueError: no such token" in failed.error
    assert failed.finish_reason is FinishReason.ERROR and answer.text.startswith(failed.text)
    assert {each.text for each in found if each is not failed} == {answer.text}
    assert set(names) == {"teller"}


def test_giving_a_request_up_costs_as_much_as_its_answers(loop):
    """Not as much as all that wait: 250 clients that leave at once, each with 128 answers, held everybody up."""

    class Unread(type(loop.engine.scheduler._waiting)):
        def __iter__(self):
            raise AssertionError("somebody looks at everyone who waits")

    many = replace(ENDLESS, n=40)
    handles = [loop.submit(QUESTION, many) for _ in range(3)]
    while len(loop.engine._answers) < 120:
        loop.turn(0.05)
    scheduler = loop.engine.scheduler
    scheduler._waiting = Unread(scheduler._waiting)
    handles[1].abort()
    while not handles[1].ended:
        loop.turn(0.05)
    assert {answer.parent_id for answer in loop.engine._answers.values()} == set(loop.engine._answers_of)
    assert len(loop.engine._answers) == 80 and scheduler.num_waiting + scheduler.num_running == 80
    del Unread.__iter__
