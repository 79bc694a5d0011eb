"""The account of the vision encoder's cache: whose embeddings are there, who needs them, which to drop.

Embeddings are known by their media's digest. They are held by the requests whose rows still read them, and stay after
that until the room is needed, least recently used first. The account decides; the runner encodes and drops what a
plan says. What a plan has asked for counts as there when that plan is `settle`d, and only if it was encoded. Held
embeddings exceed the capacity only when one request alone needs more than all of it.

Knows nothing of queues, blocks or embeddings themselves.
"""

import bisect
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from executor.schedule.request import MediaItem, Request, Span


@dataclass
class _Held:
    num_tokens: int
    holders: set[tuple[str, int]] = field(default_factory=set)  # (request id, its own number for this use)


class EncoderCache:
    """Room for `capacity_tokens` embeddings."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self._held: dict[bytes, _Held] = {}
        self._idle: OrderedDict[bytes, int] = OrderedDict()  # digest -> tokens, least recently used first
        self._held_tokens = 0
        self._idle_tokens = 0
        self._encode: dict[bytes, MediaItem] = {}
        self._release: dict[bytes, None] = {}
        self._planned: dict[bytes, MediaItem] = {}  # handed out by `drain` and not settled yet
        self._planned_release: tuple[bytes, ...] = ()
        self._doubtful: dict[bytes, None] = {}  # of plans that failed: to be dropped in case they are there
        self.num_queries = 0  # media that requests have asked for
        self.num_hits = 0  # and that were there, or on their way already

    @property
    def num_tokens(self) -> int:
        return self._held_tokens + self._idle_tokens

    def knows(self, digest: bytes) -> bool:
        """Whether these embeddings are there or on their way; from any thread, true for the moment."""
        return digest in self._held or digest in self._idle

    def take(self, request_id: str, media: Sequence[tuple[int, MediaItem]], *, may_exceed: bool) -> bool:
        """Hold the embeddings of all these (number, media) for a request, or of none when there is no room.

        The number tells a request's uses of one media apart.

        `may_exceed`: the request cannot go on without them, so they are also taken when they are too many for the
        cache, as soon as no other request holds any.
        """
        missing = {item.digest: item.num_tokens for _, item in media if item.digest not in self._held}
        fits = not missing or self._held_tokens + sum(missing.values()) <= self.capacity_tokens
        if not fits and not (may_exceed and self._holds_alone(request_id)):
            return False
        for number, item in media:
            self._hold((request_id, number), item)
        self._trim()
        return True

    def give_back(self, request_id: str, number: int, digest: bytes) -> None:
        """The request needs what it took under `number` no more."""
        held = self._held[digest]
        held.holders.remove((request_id, number))
        if not held.holders:
            del self._held[digest]
            self._held_tokens -= held.num_tokens
            if digest in self._encode:  # of no use to anybody, and not there yet
                del self._encode[digest]
                return
            self._idle[digest] = held.num_tokens
            self._idle_tokens += held.num_tokens
            self._trim()

    def drain(self) -> tuple[tuple[MediaItem, ...], tuple[bytes, ...]]:
        """What to encode and which digests to drop before that, since the last call. `settle` says how it went."""
        self._planned, self._planned_release = self._encode, (*self._release, *self._doubtful)
        self._encode, self._release, self._doubtful = {}, {}, {}
        return tuple(self._planned.values()), self._planned_release

    def settle(self, missing: Collection[bytes] = ()) -> None:
        """What `drain` handed out is encoded, all but `missing`: what is still held of those is asked for again."""
        for digest in missing:
            item = self._planned.get(digest)
            if item is None:
                continue
            self._release.pop(digest, None)
            if digest in self._held:
                self._encode[digest] = item
            elif digest in self._idle:
                self._idle_tokens -= self._idle.pop(digest)
        self._planned, self._planned_release = {}, ()

    def undo(self) -> None:
        """What `drain` handed out has not been done, or nobody knows how far: it is asked for again."""
        self._doubtful = dict.fromkeys((*self._planned, *self._planned_release))
        self.settle(tuple(self._planned))

    def forget_idle(self) -> None:
        """Have embeddings that nobody holds dropped by the next plan, whoever asks for them then."""
        self._doubtful |= dict.fromkeys((*self._idle, *self._release))
        self._idle.clear()
        self._release.clear()
        self._idle_tokens = 0

    def check(self, held: set[tuple[str, int, bytes]]) -> None:
        """Assert all invariants, given every (request id, number, digest) that requests hold."""
        counted = {(*holder, digest) for digest, entry in self._held.items() for holder in entry.holders}
        assert counted == held, f"encoder cache: held by {counted}, needed by {held}"
        assert all(entry.holders for entry in self._held.values())
        assert not self._held.keys() & self._idle.keys()
        assert self._held_tokens == sum(entry.num_tokens for entry in self._held.values())
        assert self._idle_tokens == sum(self._idle.values())
        assert self.num_tokens <= self.capacity_tokens or not self._idle
        assert self._held_tokens <= self.capacity_tokens or any(
            all(any(holder == request_id for holder, _ in entry.holders) for entry in self._held.values())
            for request_id, _, _ in counted
        ), "more is held than fits, and not for one request alone"
        assert self._encode.keys() <= self._held.keys(), "is to be encoded for nobody"
        there = (self._held.keys() | self._idle.keys() | self._release.keys()) - self._encode.keys()
        assert not self._doubtful.keys() & there, "both there and doubtful"
        assert not self._release.keys() & (self._held.keys() | self._idle.keys())

    def _holds_alone(self, request_id: str) -> bool:
        return all(holder == request_id for entry in self._held.values() for holder, _ in entry.holders)

    def _hold(self, holder: tuple[str, int], item: MediaItem) -> None:
        digest = item.digest
        self.num_queries += 1
        self.num_hits += digest in self._held or digest in self._idle or digest in self._release
        if digest not in self._held:
            self._held[digest] = _Held(item.num_tokens)
            self._held_tokens += item.num_tokens
            if digest in self._idle:
                self._idle_tokens -= self._idle.pop(digest)
            elif digest in self._release:  # dropped on paper only: no plan has said so yet
                del self._release[digest]
            else:
                self._encode[digest] = item
        self._held[digest].holders.add(holder)

    def _trim(self) -> None:
        while self._idle and self.num_tokens > self.capacity_tokens:
            digest, num_tokens = self._idle.popitem(last=False)
            self._idle_tokens -= num_tokens
            self._release[digest] = None


class MediaReads:
    """One request's use of the cache: holds the embeddings that its next tokens read, for as long as they do.

    Spans of one media that follow each other (a video's frames) are held together, under the index of the last one.
    """

    def __init__(self, request: Request, cache: EncoderCache) -> None:
        spans = request.prompt.spans
        self._request = request
        self._cache = cache
        self._span_ends = [span.start + span.num_tokens for span in spans]
        self._last_spans = _last_spans(spans)
        self._held: set[int] = set()

    @property
    def holds_any(self) -> bool:
        return bool(self._held)

    def take(self, start: int, num_tokens: int, whole: bool, may_take: bool) -> int:
        """Hold what tokens [start, start + num_tokens) read; returns how many of them can be computed now.

        `whole`: all or none. Without `may_take` only what is held already can be read.
        """
        spans = self._request.prompt.spans
        first = bisect.bisect_right(self._span_ends, start)
        last = bisect.bisect_left(spans, start + num_tokens, lo=first, key=lambda span: span.start)
        first_span: dict[int, int] = {}  # of each media that is read and not held yet
        for index in range(first, last):
            if self._last_spans[index] not in self._held:
                first_span.setdefault(self._last_spans[index], index)
        for group in [list(first_span)] if whole and first_span else [[index] for index in first_span]:
            num_before = 0 if whole else max(0, spans[first_span[group[0]]].start - start)
            media = [(index, self._media(index)) for index in group]
            if not may_take or not self._cache.take(self._request.id, media, may_exceed=num_before == 0):
                return num_before
            self._held.update(group)
        return num_tokens

    def give_back(self, num_computed_tokens: int) -> None:
        """Let go what is read to its end by the first `num_computed_tokens` tokens."""
        for index in tuple(self._held):
            if self._span_ends[index] <= num_computed_tokens:
                self._held.remove(index)
                self._cache.give_back(self._request.id, index, self._media(index).digest)

    def check(self, num_computed_tokens: int) -> set[tuple[str, int, bytes]]:
        """What is held, as `EncoderCache.check` takes it; asserts that it is still needed."""
        assert all(self._span_ends[index] > num_computed_tokens for index in self._held), "held longer than needed"
        return {(self._request.id, index, self._media(index).digest) for index in self._held}

    def _media(self, span_index: int) -> MediaItem:
        prompt = self._request.prompt
        return prompt.media[prompt.spans[span_index].media_index]


def _last_spans(spans: Sequence[Span]) -> list[int]:
    """For every span, the index of the last one in its run of spans of the same media."""
    last_spans = list(range(len(spans)))
    for index in reversed(range(len(spans) - 1)):
        if spans[index].media_index == spans[index + 1].media_index:
            last_spans[index] = last_spans[index + 1]
    return last_spans
