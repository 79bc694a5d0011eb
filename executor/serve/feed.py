"""From an engine's thread to an event loop: each request's events in order, with one wake-up for all of a step."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from executor.serve.asks import Done, Event, Failure


class Feed:
    """The events of one request, for one reader. The last one is a Done or a Failure."""

    def __init__(self, abort: Callable[[], None] = lambda: None) -> None:
        self.observer: Callable[[Event], None] | None = None  # sees every event before the reader
        self.abort = abort  # frees everything of the request within a step; nothing happens once it has ended
        self.has_ended = False  # nothing comes after a Done or a Failure
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[Event], None] | None = None

    def push(self, event: Event) -> None:
        """In the event loop's thread only. What comes after the last event is dropped."""
        if self.has_ended:
            return
        self.has_ended = isinstance(event, Done | Failure)
        if self.observer is not None:
            self.observer(event)
        if self._take is not None:
            self._take(event)
            return
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Event:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def divert(self, take: Callable[[Event], None]) -> None:
        """From now on `take` gets every event, those that are here already first; nobody else reads the feed."""
        self._take = take
        while self._events:
            take(self._events.popleft())

    def __aiter__(self) -> "Feed":
        self._is_over = False
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        event = await self.next()
        self._is_over = isinstance(event, Done | Failure)
        return event


class Joined:
    """Several requests' feeds as one: (which request, event) as they come, until the last one has ended."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._num_open = len(feeds)
        self._events = Feed()
        for index, feed in enumerate(feeds):
            feed.divert(partial(self._put, index))

    def abort(self) -> None:
        for feed in self._feeds:
            feed.abort()

    def _put(self, index: int, event: Event) -> None:
        self._events.push((index, event))

    def __aiter__(self) -> "Joined":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._num_open:
            raise StopAsyncIteration
        index, event = await self._events.next()
        self._num_open -= isinstance(event, Done | Failure)
        return index, event


class Crossing:
    """Takes events in any thread and hands them to their feeds in the event loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[Feed, Event]] = deque()
        self._is_called = False

    def put(self, feed: Feed, event: Event) -> None:
        self._events.append((feed, event))
        if not self._is_called and not self._loop.is_closed():  # at a server's end nobody reads any more
            self._is_called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before the events: what comes from now on calls again
        while self._events:
            feed, event = self._events.popleft()
            feed.push(event)
