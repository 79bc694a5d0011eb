"""The rows of a data set over leaders that come and go: each row to one of them, a lost one's again to others.

Invariant: a row is to be answered, held by one leader, or answered; it is answered once.
Knows no connections and no engines.
"""

import heapq
from collections import Counter
from collections.abc import Hashable, Iterable

MAX_LOSSES = 3
"""Leaders that may be lost while they answer a row, until the row is taken for what has killed them."""


class Dealer:
    """`rows` are places in the data set, dealt in their order."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._todo = sorted(rows)
        self._num_left = len(self._todo)
        self._held: dict[Hashable, set[int]] = {}
        self._seats: dict[Hashable, int] = {}
        self._losses: Counter[int] = Counter()

    @property
    def num_left(self) -> int:
        """Rows without an answer."""
        return self._num_left

    def join(self, leader: Hashable, seats: int) -> None:
        """From now on `leader` may hold as many rows as it has seats."""
        self._held[leader], self._seats[leader] = set(), seats

    def deal(self) -> dict[Hashable, list[int]]:
        """New rows for the leaders with free seats, evenly where there are few of them."""
        dealt: dict[Hashable, list[int]] = {}
        while self._todo:
            free = [leader for leader in self._held if len(self._held[leader]) < self._seats[leader]]
            if not free:
                break
            leader = min(free, key=lambda each: len(self._held[each]))
            row = heapq.heappop(self._todo)
            self._held[leader].add(row)
            dealt.setdefault(leader, []).append(row)
        return dealt

    def answered(self, leader: Hashable, row: int) -> bool:
        """Whether this is the answer that counts; one that is held by nobody or by another is not."""
        if row not in self._held.get(leader, ()):
            return False
        self._held[leader].remove(row)
        self._num_left -= 1
        return True

    def lose(self, leader: Hashable) -> list[int]:
        """`leader` is gone: its rows are dealt again. Returns those that have lost too many, and are given up."""
        given_up = []
        for row in sorted(self._held.pop(leader, ())):
            self._losses[row] += 1
            if self._losses[row] < MAX_LOSSES:
                heapq.heappush(self._todo, row)
            else:
                self._num_left -= 1
                given_up.append(row)
        self._seats.pop(leader, None)
        return given_up
