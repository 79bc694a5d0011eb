"""Requests over backends: shared evenly, a conversation stays, a lost backend's requests are asked again."""

import pytest

from executor.engine.loop import QueueFull
from executor.schedule.request import SamplingParams
from executor.serve.asks import Ask, ChatPrompt, Delta, EngineStats, Failure, TextPrompt, TokenPrompt
from executor.serve.router import Router, conversation_of
from tests.serve.fakes import DONE, FakeBackend, ask_of, taken

PICTURE = "data:image/png;base64," + "A" * 100_000


def routed(num: int = 2, **settings: object) -> tuple[Router, list[FakeBackend]]:
    backends = [FakeBackend(f"replica {number}") for number in range(num)]
    settings = {"max_unfinished": 8, "max_queued": 4, "slack": 2} | settings
    return Router(backends, **settings), backends


def test_new_conversations_are_shared_evenly_whether_they_overlap_or_not() -> None:
    router, backends = routed(3)
    for number in range(6):
        router.ask(ask_of(f"r{number}", f"question {number}"))
    assert [len(backend.asked) for backend in backends] == [2, 2, 2]
    for backend in backends:
        for request_id in list(backend.feeds):
            backend.end(request_id)
    assert router.num_unfinished == 0
    for number in range(6, 12):
        router.ask(ask_of(f"r{number}", f"question {number}"))
        next(each for each in backends if f"r{number}" in each.feeds).end(f"r{number}")
    assert [len(backend.asked) for backend in backends] == [4, 4, 4]


@pytest.mark.parametrize("picture", ["", PICTURE], ids=["text", "picture"])
def test_a_conversation_stays_where_it_was_answered(picture: str) -> None:
    router, backends = routed(2)
    router.ask(ask_of("other", "another question"))
    router.ask(ask_of("first", "what is it?", picture=picture))
    backends[1].end("first")
    backends[0].end("other")
    router.ask(ask_of("a", "hello"))
    router.ask(ask_of("b", "good morning"))
    router.ask(ask_of("second", "what is it?", "a cat", "what colour?", picture=picture))
    assert "second" in backends[1].feeds, "though both are equally busy, and the other was asked longer ago"


def test_a_conversation_moves_when_its_replica_is_much_busier_and_stays_there() -> None:
    router, backends = routed(2, slack=2)
    for number in range(3):
        router.ask(ask_of(f"same{number}", "hello", "you", f"turn {number}"))
    assert [len(backend.feeds) for backend in backends] == [3, 0], "three more than the other: within one of the slack"
    router.ask(ask_of("moved", "hello", "you", "again"))
    assert "moved" in backends[1].feeds
    for backend in backends:
        for request_id in list(backend.feeds):
            backend.end(request_id)
    router.ask(ask_of("later", "hello", "you", "and then?"))
    assert "later" in backends[1].feeds


def test_what_a_conversation_is_known_by() -> None:
    first = ask_of("1", "what?", picture=PICTURE)
    assert conversation_of(first) == conversation_of(ask_of("2", "what?", "this", "and?", picture=PICTURE))
    assert conversation_of(first) != conversation_of(ask_of("3", "who?", picture=PICTURE))
    changed = PICTURE[:52_000] + "B" + PICTURE[52_001:]
    assert conversation_of(first) != conversation_of(ask_of("4", "what?", picture=changed))
    assert conversation_of(ask_of("5", "lone \ud800")) is not None
    assert conversation_of(Ask("6", ChatPrompt([{"role": "user", "content": None}]), SamplingParams())) is not None
    assert conversation_of(Ask("7", TextPrompt("a text"), SamplingParams())) is None
    assert conversation_of(Ask("8", TokenPrompt([1, 2]), SamplingParams())) is None
    parts = [{"type": "image_url", "image_url": {"url": PICTURE}}]
    assert conversation_of(Ask("9", TextPrompt("a", parts), SamplingParams())) == conversation_of(
        Ask("10", TextPrompt("b", parts), SamplingParams())
    )


def test_a_full_queue_is_refused_and_an_end_makes_room() -> None:
    router, backends = routed(2, max_unfinished=2, max_queued=1)
    for number in range(5):
        router.ask(ask_of(f"r{number}", str(number)))
    with pytest.raises(QueueFull, match="5 requests"):
        router.ask(ask_of("more"))
    backends[0].end(next(iter(backends[0].feeds)))
    router.ask(ask_of("more"))
    assert router.stats() == EngineStats(num_running=5, num_blocks=20)


def test_an_abort_reaches_the_backend_that_has_the_request() -> None:
    router, backends = routed(2)
    router.ask(ask_of("a", "a"))
    feed = router.ask(ask_of("b", "b"))
    feed.abort()
    assert (backends[0].aborted, backends[1].aborted) == ([], ["b"])


def test_a_job_ends_with_its_first_replica() -> None:
    router, backends = routed(2)
    events = taken(router.ask(ask_of("a", "a")))
    backends[0].lose()
    assert [event.kind for event in events] == ["lost"]
    assert router.fault == "replica 0 is lost"
    with pytest.raises(RuntimeError, match="replica 0 is lost"):
        router.ask(ask_of("b"))


def test_what_a_lost_backend_had_not_begun_is_asked_again_once() -> None:
    router, backends = routed(2, survives=True)
    begun, waiting = taken(router.ask(ask_of("begun", "1"))), router.ask(ask_of("elsewhere", "2"))
    silent = taken(router.ask(ask_of("silent", "3")))
    backends[0].say("begun", "He")
    backends[0].lose()
    assert [type(event) for event in begun] == [Delta, Failure]
    assert begun[1].kind == "lost" and silent == []
    assert set(backends[1].feeds) == {"elsewhere", "silent"} and router.fault is None
    backends[1].end("silent")
    assert silent == [DONE] and router.num_unfinished == 1

    third = FakeBackend("replica 2")
    router.remove(backends[0])
    router.add(third)
    router.ask(ask_of("new", "4"))
    assert "new" in third.feeds
    backends[1].lose()
    assert "elsewhere" in third.feeds
    events = taken(waiting)
    third.lose()
    assert [event.kind for event in events] == ["lost"], "asked again once, not for ever"
    with pytest.raises(QueueFull, match="no replica answers"):
        router.ask(ask_of("late"))
    assert router.num_unfinished == 0


def test_an_aborted_request_is_not_asked_again() -> None:
    router, backends = routed(2, survives=True)
    feed = router.ask(ask_of("a", "a"))
    events = taken(feed)
    feed.abort()
    backends[0].lose()
    assert [event.kind for event in events] == ["lost"] and not backends[1].asked
