"""Several backends as one: each request to the one that has its conversation, or to the least busy one.

A conversation is known by its beginning (what stands before the first answer, pictures too), which its next turn holds
again. It stays where it was answered, because that backend's caches have its pictures and its tokens, unless that
one has more than `slack` requests above the least busy one: then it moves there, and stays there.
Everything else goes to the backend with the fewest unfinished requests; of equals to the one that was asked longest
ago.
Knows no HTTP; which backends there are is its owner's.
"""

import hashlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.engine.loop import QueueFull
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, EngineStats, Event, Failure, TextPrompt
from executor.serve.backends import Backend
from executor.serve.feed import Feed

logger = logging.getLogger(__name__)

MAX_CONVERSATIONS = 65536  # known at a time; the one that was asked longest ago is forgotten first
SAMPLE_CHARACTERS = 4096
"""A text of more than four times this is known by its length and three pieces of it: a picture's bytes are megabytes,
and this is the event loop's thread. Two conversations taken for one share a backend, nothing else."""


def conversation_of(ask: Ask) -> bytes | None:
    """Digest of what all turns of a conversation begin with; None where nothing is known to come again."""
    prompt = ask.prompt
    if isinstance(prompt, ChatPrompt):
        beginning: Any = list(itertools.takewhile(lambda each: each.get("role") != "assistant", prompt.messages))
    elif isinstance(prompt, TextPrompt) and prompt.media:
        beginning = list(prompt.media)
    else:
        return None
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, beginning)
    return digest.digest()


def _feed(digest: Any, tree: Any) -> None:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _feed(digest, key)
            _feed(digest, value)
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        digest.update(b"[%d" % len(tree))
        for value in tree:
            _feed(digest, value)
    else:
        text = tree if isinstance(tree, str) else repr(tree)
        size = len(text)
        if size > 4 * SAMPLE_CHARACTERS:
            middle = size // 2
            text = text[:SAMPLE_CHARACTERS] + text[middle : middle + SAMPLE_CHARACTERS] + text[-SAMPLE_CHARACTERS:]
        digest.update(b"%d:" % size + text.encode(errors="surrogatepass"))


def slack_of(max_num_seqs: int) -> int:
    """A quarter of what an engine answers at a time: below that, waiting costs less than reading pictures again."""
    return max(1, max_num_seqs // 4)


@dataclass
class _Asked:
    """A request on its way: which backend has it, and what may still be done when that one is lost."""

    ask: Ask
    feed: Feed
    inner: Feed | None = None
    has_begun: bool = False  # something of its answer has been handed on
    is_second: bool = False
    is_aborted: bool = False

    def abort(self) -> None:
        self.is_aborted = True
        if self.inner is not None:
            self.inner.abort()


class Router:
    """A Backend over backends. `max_unfinished`: of each backend that is there, and `max_queued` more of them all.

    `survives`: backends come and go; one that is lost is left out, and what it had not begun to answer is asked once
    more elsewhere. Else a backend's fault is that of all.
    """

    def __init__(
        self,
        backends: Sequence[Backend] = (),
        *,
        max_unfinished: int,
        max_queued: int,
        slack: int,
        survives: bool = False,
    ) -> None:
        self._backends: list[Backend] = list(backends)
        self._max_unfinished, self._max_queued = max_unfinished, max_queued
        self._slack, self._survives = slack, survives
        self._conversations: OrderedDict[bytes, Backend] = OrderedDict()
        self._asked_at: dict[int, int] = {}  # of a backend (its id): the number of the request that it got last
        self._count = itertools.count(1)
        self._num_unfinished = 0

    def add(self, backend: Backend) -> None:
        self._backends.append(backend)

    def remove(self, backend: Backend) -> None:
        """It gets no more requests; what it has is told to be lost by the backend itself."""
        if backend in self._backends:
            self._backends.remove(backend)
            self._asked_at.pop(id(backend), None)

    @property
    def backends(self) -> list[Backend]:
        """Those that answer."""
        return [backend for backend in self._backends if backend.fault is None]

    @property
    def num_unfinished(self) -> int:
        return self._num_unfinished

    @property
    def fault(self) -> str | None:
        if self._survives:
            return None
        return next((backend.fault for backend in self._backends if backend.fault is not None), None)

    def stats(self) -> EngineStats:
        return sum((backend.stats() for backend in self._backends), EngineStats())

    def ask(self, ask: Ask) -> Feed:
        if self.fault is not None:
            raise RuntimeError(self.fault)
        most = self._max_unfinished * len(self.backends) + self._max_queued
        if self._num_unfinished >= most:
            raise QueueFull(f"{most} requests are unfinished, which is as many as are allowed")
        asked = _Asked(ask, Feed())
        asked.feed.abort = asked.abort
        self._hand_over(asked)
        self._num_unfinished += 1
        return asked.feed

    def _hand_over(self, asked: _Asked) -> None:
        backend = self._choose(asked.ask)
        self._asked_at[id(backend)] = next(self._count)
        asked.inner = backend.ask(asked.ask)
        asked.inner.divert(lambda event: self._take(asked, event))

    def _choose(self, ask: Ask) -> Backend:
        backends = self.backends
        if not backends:
            raise QueueFull("no replica answers at the moment; they are being started again")
        least = min(backends, key=lambda each: (each.num_unfinished, self._asked_at.get(id(each), 0)))
        conversation = conversation_of(ask)
        if conversation is None:
            return least
        former = self._conversations.pop(conversation, None)
        if former not in backends or former.num_unfinished > least.num_unfinished + self._slack:
            former = least
        self._conversations[conversation] = former
        if len(self._conversations) > MAX_CONVERSATIONS:
            self._conversations.popitem(last=False)
        return former

    def _take(self, asked: _Asked, event: Event) -> None:
        """An event of a backend, for whoever asked."""
        asked.has_begun = asked.has_begun or isinstance(event, Delta)
        if isinstance(event, Failure) and event.kind == "lost" and self._again(asked):
            return
        if isinstance(event, Done | Failure):
            self._num_unfinished -= 1
        asked.feed.push(event)

    def _again(self, asked: _Asked) -> bool:
        """Ask once more what its backend has lost; whether that was possible."""
        if not self._survives or asked.has_begun or asked.is_second or asked.is_aborted:
            return False
        asked.is_second = True
        try:
            self._hand_over(asked)
        except RuntimeError as error:  # QueueFull is one
            logger.warning("request %s cannot be asked again: %s", asked.ask.id, error)
            return False
        logger.info("request %s is asked again: its replica was lost", asked.ask.id)
        return True
