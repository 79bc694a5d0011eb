"""Counts of several engines add up, parts of them included, whatever fields there are."""

from dataclasses import dataclass, field

from executor.engine.totals import Totals


@dataclass(frozen=True, slots=True)
class Part(Totals):
    num_steps: int = 0
    step_s: float = 0.0
    by_place: tuple[int, ...] = ()


@dataclass(slots=True)
class Whole(Totals):
    num_requests: int = 0
    part: Part = field(default_factory=Part)


def test_they_add_up_part_by_part():
    first, second = Whole(2, Part(3, 0.5, (1, 2))), Whole(5, Part(7, 0.25, (4,)))
    total = sum([first, second], Whole())
    assert total == Whole(7, Part(10, 0.75, (5, 2)))
    assert total.since(first).part == Part(7, 0.25, (4, 0)) and total.since(first).num_requests == 5
    assert (first, Whole()) == (Whole(2, Part(3, 0.5, (1, 2))), Whole(0, Part())), "none is changed"
