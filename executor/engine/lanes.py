"""Who waits to be prepared, and whose turn it is: first come, first served in each lane, and no lane behind another.

Only about as many requests are taken as can run: of every lane but that of media `max_taken`. With media, whose pixels
are megabytes, as many as leave `max_taken` in all, and one in MEDIA_SHARE of that whatever the others are, so that a
flood of texts does not keep a picture waiting; few of them at a time are being prepared, and none while pixels that no
step has read yet take MAX_PIXEL_BYTES. A lane's handles are taken in the order in which they came; one that has ended
is forgotten at once. Not for several threads at once.
"""

from collections.abc import Iterator

from executor.engine.handle import Handle
from executor.engine.prepare import LANES, Lane

MEDIA_SHARE = 4
MAX_PIXEL_BYTES = 512 * 1024 * 1024
MAX_PREPARING = 2 * LANES["media"]  # with media: what each thread is at, and what it does next


class Lanes:
    def __init__(self, max_taken: int, max_ahead: int) -> None:
        self._max_taken, self._max_ahead = max_taken, max_ahead
        self._waiting: dict[Lane, dict[Handle, None]] = {lane: {} for lane in LANES}
        self._taken: dict[Lane, int] = dict.fromkeys(LANES, 0)  # being prepared, or in the engine
        self._preparing: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._pixel_bytes = 0  # prepared, and not begun to be answered

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
                self._preparing[lane] += 1
                yield handle

    def prepared(self, handle: Handle) -> None:
        """One that was taken has its prompt, or never will."""
        self._preparing[handle.lane] -= 1
        self._pixel_bytes += handle.pixel_bytes

    def begun(self, handle: Handle) -> None:
        """A prepared one is being answered: its pixels have been read."""
        self._pixel_bytes -= handle.pixel_bytes
        handle.pixel_bytes = 0

    def release(self, handle: Handle) -> None:
        """One that was taken, and prepared, holds nothing any more."""
        self.begun(handle)
        self._taken[handle.lane] -= 1
        assert self._taken[handle.lane] >= 0, f"more released than taken: {self._taken}"

    def _has_room(self, lane: Lane) -> bool:
        if lane != "media":
            return self._taken[lane] < self._max_taken
        if self._preparing[lane] >= MAX_PREPARING or self._pixel_bytes >= MAX_PIXEL_BYTES:
            return False
        share = max(self._max_ahead, self._max_taken // MEDIA_SHARE)
        return sum(self._taken.values()) < self._max_taken or self._taken[lane] < share
