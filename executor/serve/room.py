"""How much memory requests' bodies may take together: where there is no room, a body waits unread at its client's.

Invariants: the body that is read for the longest time always goes on, so that some body comes to its end; a small one
never waits. What is held is at most `max_bytes`, one body, and a piece of each that is being read.
"""

import asyncio

FREE_BYTES = 64 * 1024
"""A body up to this size is read whatever others hold: a text is not kept waiting by pictures."""


class Body:
    """One request's body."""

    def __init__(self) -> None:
        self.num_bytes = 0  # read so far
        self.is_held = True


class Room:
    """Everything in the event loop's thread."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0  # of all bodies that are held
        self._max_bytes = max_bytes
        self._reading: dict[Body, None] = {}  # large ones, the first to have come first
        self._waiting: dict[Body, asyncio.Future[None]] = {}

    async def wait(self, body: Body) -> None:
        """Until there is room for more of it."""
        if body.num_bytes <= FREE_BYTES or not body.is_held:
            return
        self._reading.setdefault(body)
        while self.num_bytes >= self._max_bytes and next(iter(self._reading)) is not body:
            self._waiting[body] = asyncio.get_running_loop().create_future()
            try:
                await self._waiting[body]
            except asyncio.CancelledError:
                self.leave(body)
                raise
            finally:
                self._waiting.pop(body, None)
        self._wake()

    def add(self, body: Body, num_bytes: int, *, is_last: bool) -> None:
        """So much more of it has been read."""
        if not body.is_held:
            return
        body.num_bytes += num_bytes
        self.num_bytes += num_bytes
        if is_last:
            self._reading.pop(body, None)
            self._wake()

    def leave(self, body: Body) -> None:
        """Nobody needs it any more."""
        if body.is_held:
            body.is_held = False
            self.num_bytes -= body.num_bytes
            self._reading.pop(body, None)
            self._wake()

    def _wake(self) -> None:
        """The one whose turn it is; it wakes the next when it goes on."""
        if not self._waiting:
            return
        body = next(iter(self._waiting if self.num_bytes < self._max_bytes else self._reading))
        future = self._waiting.get(body)
        if future is not None and not future.done():
            future.set_result(None)
