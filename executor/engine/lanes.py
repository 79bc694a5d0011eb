"""Who waits to be prepared, and whose turn it is: first come, first served in each lane, and no lane behind another.

What is prepared holds pixels, so only about as many requests are taken as can run: `max_taken` with media, all others
counted, and `max_ahead` whatever the others are; of every other lane `max_taken`. A lane's handles are taken in the
order in which they came; one that has ended is forgotten at once. Not for several threads at once.
"""

from collections.abc import Iterator

from executor.engine.handle import Handle
from executor.engine.prepare import LANES, Lane


class Lanes:
    def __init__(self, max_taken: int, max_ahead: int) -> None:
        self._max_taken, self._max_ahead = max_taken, max_ahead
        self._waiting: dict[Lane, dict[Handle, None]] = {lane: {} for lane in LANES}
        self._taken: dict[Lane, int] = dict.fromkeys(LANES, 0)  # being prepared, or in the engine

    def add(self, handle: Handle) -> None:
        self._waiting[handle.lane][handle] = None

    def discard(self, handle: Handle) -> None:
        """It waits no longer, if it did."""
        self._waiting[handle.lane].pop(handle, None)

    def take(self) -> Iterator[Handle]:
        """Those whose turn it is; each counts until it is `released`."""
        for lane, waiting in self._waiting.items():
            while waiting and self._has_room(lane):
                handle = next(iter(waiting))
                del waiting[handle]
                self._taken[lane] += 1
                yield handle

    def release(self, handle: Handle) -> None:
        """One that was taken holds nothing any more."""
        self._taken[handle.lane] -= 1
        assert self._taken[handle.lane] >= 0, f"more released than taken: {self._taken}"

    def _has_room(self, lane: Lane) -> bool:
        if lane != "media":
            return self._taken[lane] < self._max_taken
        return sum(self._taken.values()) < self._max_taken or self._taken[lane] < self._max_ahead
