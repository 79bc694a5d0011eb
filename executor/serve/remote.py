"""A replica in another process: `RemoteBackend` on the front door's side, `attend` on its own.

What travels: to the leader `ask` [number, ask], `abort` [number], `end`; to the front door `events` [[number, event]]
with all of a step, `stats` now and then, `fault` before it ends for a reason.
Invariants: every feed ends, with Failure("lost") when the connection does; aborts travel, and their events come back.
"""

import asyncio
import contextlib
import itertools
import logging
from functools import partial

from executor.engine.loop import QueueFull
from executor.errors import EngineEnded, UserError
from executor.serve import wire
from executor.serve.asks import Ask, Done, EngineStats, Event, Failure
from executor.serve.backends import Backend
from executor.serve.feed import Feed
from executor.serve.gate import Peer

logger = logging.getLogger(__name__)

STATS_S = 0.2
END_S = 10.0
"""How long a leader that has been let go may take to leave."""


class RemoteBackend:
    """Answers by way of `peer`, a leader that attends. `name` is for messages. Nothing comes before `run`."""

    def __init__(self, peer: Peer, name: str) -> None:
        self.name = name
        self.fault: str | None = None
        self._peer = peer
        self._feeds: dict[int, Feed] = {}
        self._numbers = itertools.count()
        self._stats = EngineStats()
        self._is_over = asyncio.Event()

    @property
    def num_unfinished(self) -> int:
        return len(self._feeds)

    def stats(self) -> EngineStats:
        """As of at most STATS_S ago."""
        return self._stats

    def ask(self, ask: Ask) -> Feed:
        if self.fault is not None:
            raise RuntimeError(f"{self.name} takes no requests any more: {self.fault}")
        number = next(self._numbers)
        self._feeds[number] = feed = Feed(partial(self._abort, number))
        self._peer.send({"ask": [number, wire.ask_to_tree(ask)]}, has_long=True)
        return feed

    def _abort(self, number: int) -> None:
        if number in self._feeds:
            self._peer.send({"abort": number})

    async def run(self) -> None:
        """Hand on what comes, until the connection ends; `fault` says why it has."""
        reason = "its process or the network is gone"
        while (message := await self._peer.receive()) is not None:
            for number, event in wire.events_from_tree(message.get("events", ())):
                self._take(number, event)
            if "stats" in message:
                self._stats = wire.stats_from_tree(message["stats"])
            reason = message.get("fault", reason)
        self.lose(reason)

    def lose(self, reason: str) -> None:
        """It answers nothing any more."""
        if self.fault is None:
            self.fault = f"{self.name} is lost: {reason}"
        feeds, self._feeds = self._feeds, {}
        self._stats = EngineStats()
        for feed in feeds.values():
            feed.push(Failure("lost", self.fault))
        self._peer.close()
        self._is_over.set()

    def _take(self, number: int, event: Event) -> None:
        is_last = isinstance(event, Done | Failure)
        feed = self._feeds.pop(number, None) if is_last else self._feeds.get(number)
        if feed is not None:
            feed.push(event)

    async def end(self) -> None:
        """Let the leader go: it aborts what is unfinished."""
        self._peer.send({"end": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._is_over.wait()


async def attend(peer: Peer, backend: Backend) -> None:
    """Answer what the front door asks by `backend`, until it says `end`.

    Raises RuntimeError for the backend's fault, and when the front door is gone.
    """
    attendant = _Attendant(peer, backend)
    serving = asyncio.ensure_future(attendant.serve())
    watching = asyncio.ensure_future(_watch(peer, backend))
    try:
        await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
        if backend.fault is not None:
            peer.send({"fault": backend.fault})
            await peer.flush()
            raise EngineEnded(f"the engine has ended: {backend.fault}")
        if not serving.result():
            raise RuntimeError("the front door is gone: its process or the network has ended")
    finally:
        for task in (serving, watching):
            task.cancel()
        await asyncio.gather(serving, watching, return_exceptions=True)
        peer.close()
        logger.info("%d requests were answered here", attendant.num_asked)


async def _watch(peer: Peer, backend: Backend) -> None:
    """Tell the stats where they have changed, until there is a fault."""
    told = None
    while backend.fault is None:
        stats = backend.stats()
        if stats != told:
            peer.send({"stats": wire.stats_to_tree(stats)})
            told = stats
        await asyncio.sleep(STATS_S)


class _Attendant:
    """What the leader has been asked. All of it is in the event loop's thread."""

    def __init__(self, peer: Peer, backend: Backend) -> None:
        self._peer, self._backend = peer, backend
        self._feeds: dict[int, Feed] = {}
        self._events: list[wire.Numbered] = []
        self.num_asked = 0

    async def serve(self) -> bool:
        """Returns whether it was told that this is the end."""
        while (message := await self._peer.receive()) is not None:
            if "ask" in message:
                self._ask(*message["ask"])
            if (feed := self._feeds.get(message.get("abort", -1))) is not None:
                feed.abort()
            if "end" in message:
                return True
        return False

    def _ask(self, number: int, tree: object) -> None:
        self.num_asked += 1
        try:
            feed = self._backend.ask(wire.ask_from_tree(tree))
        except UserError as error:
            self._put(number, Failure("refused", str(error)))
        except QueueFull as error:  # the front door counts; this is for a front door that counts otherwise
            self._put(number, Failure("fault", str(error)))
        except RuntimeError as error:
            self._put(number, Failure("lost", str(error)))
        else:
            self._feeds[number] = feed
            feed.divert(partial(self._put, number))

    def _put(self, number: int, event: Event) -> None:
        if isinstance(event, Done | Failure):
            self._feeds.pop(number, None)
        if not self._events:  # everything of a step comes in one callback of the event loop; this is the next one
            asyncio.get_running_loop().call_soon(self._send)
        self._events.append((number, event))

    def _send(self) -> None:
        events, self._events = self._events, []
        self._peer.send({"events": wire.events_to_tree(events)})
