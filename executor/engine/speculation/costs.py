"""What decode steps cost on this machine, by how many tokens they compute: measured on the steps themselves.

Steps without drafts and steps that verify some may go different ways (a graph, another kernel), so that each kind has
its own curve. Of a size the median of the latest steps counts, once there are two: the first step of a size is often
slow. What is not known is thought cheap, so that it is tried: between two sizes in a line, and beyond the largest one
at no more; but steps grow to twice the largest size at most, since they may cost as much by the token.
Knows sizes and seconds only.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from statistics import median_low

NUM_SAMPLES = 7  # their median holds out against three odd ones
NUM_NEEDED = 2
FIRST_STALE_STEPS = 8  # verifying steps after which the cost without drafts is measured anew: the first steps of all
STALE_STEPS = 64  # are often slow. From then on after twice as many, up to so many
FORGOTTEN_STEPS = 1000  # without a step of its size a verifying step's cost is not known any more


class Curve:
    """Seconds by size. `steps`: a clock that counts all steps."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # known ones, ascending
        self._seconds: dict[int, float] = {}
        self._samples: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}  # size -> the step of its last sample

    def add(self, size: int, seconds: float, step: int) -> None:
        samples = self._samples.setdefault(size, deque(maxlen=NUM_SAMPLES))
        samples.append(seconds)
        self._last[size] = step
        if len(samples) >= NUM_NEEDED:
            if size not in self._seconds:
                insort(self._sizes, size)
            self._seconds[size] = median_low(samples)

    def drop(self, size: int) -> None:
        """What is known of a size."""
        self._last.pop(size, None)
        self._samples.pop(size, None)
        if self._seconds.pop(size, None) is not None:
            self._sizes.remove(size)

    def forget(self, before: int) -> None:
        """Sizes without a sample since a step."""
        for size in [size for size, step in self._last.items() if step < before]:
            self.drop(size)

    def at(self, size: int) -> float | None:
        """None where that size is not known."""
        return self._seconds.get(size)

    @property
    def largest(self) -> int:
        """Size that is known; 0 where none is."""
        return self._sizes[-1] if self._sizes else 0

    def between(self, size: int, floor: tuple[int, float]) -> float:
        """In a line between the neighbours. `floor`: a size that is not above, and its seconds; the least."""
        above = bisect_left(self._sizes, size)
        below = bisect_right(self._sizes, size) - 1
        low = floor
        if below >= 0 and self._sizes[below] > floor[0]:
            low = self._sizes[below], self._seconds[self._sizes[below]]
        if above == len(self._sizes):
            return max(floor[1], low[1])
        high = self._sizes[above], self._seconds[self._sizes[above]]
        share = 0.0 if high[0] == low[0] else (size - low[0]) / (high[0] - low[0])
        return max(floor[1], low[1] + share * (high[1] - low[1]))


class StepCosts:
    """The two curves."""

    def __init__(self) -> None:
        self._plain, self._verifying = Curve(), Curve()
        self._num_steps = 0
        self._num_since: dict[int, int] = {}  # rows -> verifying steps since a step of so many was without drafts
        self._stale_after: dict[int, int] = {}  # rows -> how many of these are too many

    def add(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """A decode step."""
        self._num_steps += 1
        if num_drafts:
            self._verifying.add(num_rows + num_drafts, seconds, self._num_steps)
            self._num_since[num_rows] = self._num_since.get(num_rows, 0) + 1
        else:
            if self._is_stale(num_rows):
                self._plain.drop(num_rows)
                self._stale_after[num_rows] = min(STALE_STEPS, 2 * self._stale_after.get(num_rows, FIRST_STALE_STEPS))
            self._plain.add(num_rows, seconds, self._num_steps)
            self._num_since[num_rows] = 0
        if self._num_steps % FORGOTTEN_STEPS == 0:
            self._verifying.forget(self._num_steps - FORGOTTEN_STEPS)

    def plain(self, num_rows: int) -> float | None:
        """Without drafts; None where that is to be measured first, or again."""
        return None if self._is_stale(num_rows) else self._plain.at(num_rows)

    def _is_stale(self, num_rows: int) -> bool:
        return self._num_since.get(num_rows, 0) >= self._stale_after.get(num_rows, FIRST_STALE_STEPS)

    def most_drafts(self, num_rows: int) -> int:
        """That a step may be tried with."""
        return 2 * max(num_rows, self._verifying.largest) - num_rows

    def most_measured(self, num_rows: int) -> int:
        """Drafts of the largest step that was measured."""
        return max(0, self._verifying.largest - num_rows)

    def bound(self, num_rows: int, num_drafts: int) -> float:
        """What a step takes where it costs as much by the token as the largest one that was measured."""
        largest = num_rows + self.most_measured(num_rows)
        return self.verifying(num_rows, largest - num_rows) * max(1.0, (num_rows + num_drafts) / largest)

    def verifying(self, num_rows: int, num_drafts: int) -> float:
        """Of rows whose cost without drafts is known; never less than that."""
        plain = self._plain.at(num_rows)
        assert plain is not None, f"no step of {num_rows} rows was measured"
        return self._verifying.between(num_rows + num_drafts, (num_rows, plain)) if num_drafts else plain
