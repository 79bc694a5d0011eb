"""Whose turn it is to be prepared: bounds of what is held at a time, and nobody's turn is passed over for good."""

import random
from collections import Counter

import pytest

from executor.engine import lanes as module
from executor.engine.handle import Handle
from executor.engine.lanes import MAX_PIXEL_BYTES, MAX_PREPARING, Lanes
from executor.engine.loop import EngineLoop
from executor.engine.prepare import LANES, Lane
from executor.schedule.request import SamplingParams
from tests.engine.test_loop import QUESTION, SHORT, answer, engine, loop  # noqa: F401
from tests.reference import REPO

SEATS = 20


def waiting(lane: Lane, pixel_bytes: int = 0) -> Handle:
    handle = Handle(lambda: "", SamplingParams(), lane, on_event=None, on_abort=lambda _: None, deadline_s=None)
    handle.wanted_bytes = pixel_bytes
    return handle


def prepare(lanes: Lanes, handle: Handle) -> None:
    handle.pixel_bytes = handle.wanted_bytes
    lanes.prepared(handle)


def test_large_pictures_are_not_prepared_far_ahead() -> None:
    """Of 200 waiting ones a few at a time are with the threads, and as many as MAX_PIXEL_BYTES hold are ready."""
    lanes = Lanes(max_taken=258, max_ahead=2)
    for _ in range(200):
        lanes.add(waiting("media", MAX_PIXEL_BYTES // 8))
    ready = []
    while taken := list(lanes.take()):
        assert len(taken) <= MAX_PREPARING
        for handle in taken:
            prepare(lanes, handle)
        ready += taken
    assert 8 <= len(ready) < 8 + MAX_PREPARING
    for handle in ready:
        lanes.begun(handle)
        if taken := list(lanes.take()):
            break
    assert taken  # who is answered makes room, long before it has ended


def test_a_flood_of_texts_leaves_pictures_their_share() -> None:
    """Everybody is answered for the same time: among the first 400 are about as many pictures as their share says."""
    lanes, seats, order = Lanes(max_taken=SEATS, max_ahead=2), [], []
    rng = random.Random(0)
    for number in range(2000):
        lanes.add(waiting("media" if number % 4 == 0 else "text"))
    while len(order) < 400:
        for handle in lanes.take():
            prepare(lanes, handle)
            seats.append(handle)
        done = seats.pop(rng.randrange(len(seats)))
        lanes.release(done)
        order.append(done.lane)
    counts = Counter(order)
    assert counts["media"] >= 50 and counts["text"] >= 250, counts


def test_a_flood_of_pictures_leaves_texts_all_they_need() -> None:
    lanes = Lanes(max_taken=SEATS, max_ahead=2)
    for _ in range(100):
        lanes.add(waiting("media"))
    for _ in range(SEATS):
        for handle in lanes.take():
            prepare(lanes, handle)
    for _ in range(SEATS):
        lanes.add(waiting("text"))
    assert [handle.lane for handle in lanes.take()] == ["text"] * SEATS


def test_pixels_are_counted_until_a_step_has_read_them(loop: EngineLoop, monkeypatch) -> None:  # noqa: F811
    """With room for one, pictures come one after the other, and all are answered."""
    monkeypatch.setattr(module, "MAX_PIXEL_BYTES", 1)
    parts = [{"type": "image", "image": str(REPO / "dataset/media/objects.png")}, {"type": "text", "text": QUESTION}]
    handles = [loop.submit([{"role": "user", "content": parts}], SHORT) for _ in range(10)]
    handles[3].abort()
    most = 0
    while loop.num_unfinished:
        loop.turn(0.05)
        most = max(most, sum(handle.pixel_bytes > 0 for handle in handles))
    assert 1 <= most <= MAX_PREPARING and LANES["media"] <= MAX_PREPARING
    assert sum(handle.completion is not None for handle in handles) == 9
    assert loop._lanes._pixel_bytes == 0 and not any(loop._lanes._preparing.values())


@pytest.mark.parametrize("lane", LANES)
def test_who_has_ended_before_its_turn_is_not_taken(lane: Lane) -> None:
    lanes = Lanes(max_taken=SEATS, max_ahead=2)
    first, second = waiting(lane), waiting(lane)
    lanes.add(first)
    lanes.add(second)
    lanes.discard(first)
    assert list(lanes.take()) == [second]
