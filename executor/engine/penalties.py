"""What repetition, presence and frequency penalties do to the logits of some tokens.

The repetition penalty counts the tokens of prompt and answer (as transformers does), presence and frequency those of
the answer only (as OpenAI and vLLM do). Only tokens that were seen change: their values are patched where the logits
lie, and put back afterwards; nothing else is read, nothing is copied.
The list of seen tokens of a batch stays on the device: while the requests stay the same, a step sends only its new
tokens. A row behind drafts has seen these as well: its list is made on the host, for the one step that needs it. What
the host has not read yet is patched behind the others, counted on the device.
Legend: N requests, R rows, V width of the logits' rows, M tokens seen by all rows that have penalties, S tokens seen by
one request, D its drafts.
"""

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from executor.device.ops import Send
from executor.engine.places import Places
from executor.schedule.request import Request

_Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of every seen token its place in the flat logits, its row's divisor, and what is taken off: [M] each."""


class Penalties:
    """Patches logits; keeps the histories of requests with penalties until `forget`."""

    def __init__(self, vocab_size: int, send: Send) -> None:
        """`send`: brings an array to where the logits are."""
        self.vocab_size = vocab_size
        self.send = send
        self._histories: dict[str, _History] = {}
        self._batch: _Batch | None = None

    @contextmanager
    def applied(self, scores: torch.Tensor, places: Places, unread: torch.Tensor | None = None) -> Iterator[None]:
        """`scores` float32 [R, V], contiguous, changed in place; inside the context only. `unread` int64 [N]: on the
        device, the token of each request behind those that it has; not together with drafts."""
        numbers = [number for number, request in enumerate(places.requests) if request.params.needs_history]
        if not numbers:
            yield
            return
        patches = [self._seen(numbers, places, scores.shape[-1])]
        if unread is not None:
            patches.append(self._batch.unread(unread))
        flat = scores.view(-1)
        picked = [flat[index] for index, *_ in patches]
        try:
            for (index, repetition, offset), before in zip(patches, picked, strict=True):
                changed = torch.where(before < 0, before * repetition, before / repetition)
                flat[index] = changed.sub_(offset)
            yield
        finally:
            for (index, *_), before in zip(patches, picked, strict=True):
                flat[index] = before

    def forget(self, request_id: str) -> None:
        """Frees what is kept for a request that is finished; nothing happens when nothing is kept."""
        if self._histories.pop(request_id, None) is not None:
            self._batch = None

    def check(self, live_ids: Collection[str]) -> None:
        """Asserts that nothing is kept for requests other than `live_ids`."""
        stale = sorted(self._histories.keys() - set(live_ids))
        assert not stale, f"penalty histories of requests that are gone: {stale}"

    def _seen(self, numbers: Sequence[int], places: Places, width: int) -> _Entries:
        """`numbers`: of the requests with penalties."""
        histories = [self._history(places.requests[number]) for number in numbers]
        changes = [history.catch_up() for history in histories]
        bases = [places.first[number] * width for number in numbers]
        if self._batch is None or not self._batch.holds(histories):
            self._batch = _Batch(histories, numbers, bases, self.send)
        else:
            self._batch.move(numbers, bases)
            self._batch.append(changes)
        entries = self._batch.entries()
        ahead = [
            history.ahead(drafts, base + width, width)
            for history, drafts, base in zip(histories, map(places.drafts_of, numbers), bases, strict=True)
            if drafts
        ]
        if not ahead:
            return entries
        more = _split(self.send(np.concatenate(ahead, axis=1)))
        return tuple(torch.cat(pair) for pair in zip(entries, more, strict=True))

    def _history(self, request: Request) -> "_History":
        history = self._histories.get(request.id)
        if history is None:
            history = self._histories[request.id] = _History(request, self.vocab_size)
        assert history.request is request, f"request id '{request.id}' is used again before forget()"
        return history


class _History:
    """Which tokens a request has seen, and what is taken off their scores. Lives on the host."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self.request = request
        self.vocab_size = vocab_size
        params = request.params
        self.repetition = np.float32(params.repetition_penalty)
        self.presence, self.frequency = np.float32(params.presence_penalty), np.float32(params.frequency_penalty)
        self._num_seen = 0
        self._counts: list[int] = []  # of each seen token in the answer
        self._slot_of: dict[int, int] = {}
        ids: list[int] = []
        # Without a repetition penalty the prompt's tokens are left as they are.
        if params.repetition_penalty != 1.0:
            # A prompt may hold ids beyond the logits (padded embeddings); they cannot be chosen.
            ids = [token_id for token_id in dict.fromkeys(request.prompt.token_ids) if token_id < vocab_size]
            self._counts = [0] * len(ids)
            self._slot_of = {token_id: slot for slot, token_id in enumerate(ids)}
        self._ids = np.array(ids, dtype=np.int64)  # with room at the end, as the offsets
        self._offsets = np.zeros(len(ids), dtype=np.float32)

    @property
    def ids(self) -> np.ndarray:
        """int64 [S]"""
        return self._ids[: len(self._counts)]

    @property
    def offsets(self) -> np.ndarray:
        """float32 [S]"""
        return self._offsets[: len(self._counts)]

    @property
    def counts(self) -> list[int]:
        """How often each of them has come in the answer: [S]."""
        return self._counts

    def catch_up(self) -> dict[int, tuple[int, float, int]]:
        """Take in the answer's new tokens; what has changed: slot -> (token id, what is taken off its score, how often
        it has come)."""
        output = self.request.output_token_ids
        assert len(output) >= self._num_seen, f"request '{self.request.id}' lost tokens"
        changed = {}
        for token_id in output[self._num_seen :]:
            if token_id >= self.vocab_size:
                continue
            slot = self._slot_of.setdefault(token_id, len(self._counts))
            if slot == len(self._counts):
                self._counts.append(0)
                if slot == len(self._ids):
                    room = 64 + len(self._ids)
                    self._ids, self._offsets = (np.resize(each, room) for each in (self._ids, self._offsets))
                self._ids[slot] = token_id
            self._counts[slot] += 1
            self._offsets[slot] = self._offset(self._counts[slot])
            changed[slot] = token_id, float(self._offsets[slot]), self._counts[slot]
        self._num_seen = len(output)
        return changed

    def ahead(self, drafts: Sequence[int], first: int, width: int) -> np.ndarray:
        """The entries of the rows behind each of `drafts`, as `_split` takes them: int64 [3, D * S'].

        `first`: where the first of these rows begins in the flat logits. S': the drafts' new tokens are in every row;
        where they are still to come their entry leaves the score as it is.
        """
        slots: dict[int, int] = {}  # of the drafts' new tokens
        counts: dict[int, int] = {}
        known = self._slot_of
        seen = [token_id for token_id in drafts if token_id < self.vocab_size]
        for token_id in seen:
            if token_id not in known:
                slots.setdefault(token_id, len(self._counts) + len(slots))
        num_known, num_all, num_rows = len(self._counts), len(self._counts) + len(slots), len(drafts)
        offsets = np.zeros((num_rows, num_all), dtype=np.float32)
        repetition = np.ones((num_rows, num_all), dtype=np.float32)
        offsets[:, :num_known] = self.offsets
        repetition[:, :num_known] = self.repetition
        for row, token_id in enumerate(drafts):
            if token_id >= self.vocab_size:
                continue
            slot = known.get(token_id)
            if slot is None:
                slot = slots[token_id]
                repetition[row:, slot] = self.repetition
            counts[slot] = counts.get(slot, self._counts[slot] if slot < num_known else 0) + 1
            offsets[row:, slot] = self._offset(counts[slot])
        ids = np.concatenate((self.ids, np.fromiter(slots, np.int64, len(slots))))
        index = ids + (first + width * np.arange(num_rows))[:, None]
        return np.stack([index.ravel(), _bits(repetition.ravel()), _bits(offsets.ravel())])

    def _offset(self, count: int) -> np.float32:
        """What is taken off the score of a token that has come `count` times."""
        return self.presence + self.frequency * np.float32(count)


class _Batch:
    """The seen tokens of some requests' first rows, on the device, in no particular order, with room for more."""

    def __init__(self, histories: Sequence[_History], numbers: Sequence[int], bases: Sequence[int], send: Send) -> None:
        """`numbers`: which of the step's requests the histories are of; `bases`: where their rows begin in the flat
        logits."""
        self._histories, self._send = tuple(histories), send
        self._at = list(numbers), list(bases)
        counts = [len(history.ids) for history in histories]
        self._size = sum(counts)
        # Of each history: where its first tokens stand, how many they are, and where each later one stands.
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        self._where = [(start, count, []) for start, count in zip(starts, counts, strict=True)]
        room = self._size + 64 * len(counts)
        host = np.zeros((5, room), dtype=np.int64)
        for number, (history, start, count) in enumerate(zip(histories, starts, counts, strict=True)):
            part = slice(start, start + count)
            host[0, part] = history.ids + bases[number]
            host[1, part] = _bits(np.full(count, history.repetition))
            host[2, part] = _bits(history.offsets)
            host[3, part] = number
            host[4, part] = history.counts
        table = send(host)
        self._owner, self._count = table[3].clone(), table[4].clone()
        of_rows = [[getattr(each, name) for each in histories] for name in ("repetition", "presence", "frequency")]
        rows = send(np.array([numbers, bases, *map(_bits, of_rows)], dtype=np.int64))
        self._numbers, self._starts = rows[0], rows[1]
        self._rules = [_floats(each) for each in rows[2:]]
        self._index, self._repetition, self._offset = _split(table)

    def holds(self, histories: Sequence[_History]) -> bool:
        """Whether it is of these."""
        return len(self._histories) == len(histories) and all(map(operator.is_, self._histories, histories))

    def move(self, numbers: Sequence[int], bases: Sequence[int]) -> None:
        """The rows stand elsewhere: there are others before them now, or these have more or fewer drafts."""
        at = list(numbers), list(bases)
        if at == self._at:
            return
        moved, self._numbers = self._send(np.array([np.subtract(bases, self._at[1]), numbers], dtype=np.int64))
        self._index += moved[self._owner]
        self._starts = self._starts + moved
        self._at = at

    def unread(self, token_ids: torch.Tensor) -> _Entries:
        """One entry for each history: its token of `token_ids` int64 [N], one for each of the step's requests."""
        index = self._starts + token_ids[self._numbers]
        known, counts = self._index[: self._size], self._count[: self._size]
        count = torch.where(index[:, None] == known, counts, 0).sum(dim=-1)
        repetition, presence, frequency = self._rules
        return index, repetition, (frequency * (count + 1)).add_(presence)

    def append(self, changes: Sequence[dict[int, tuple[int, float, int]]]) -> None:
        """Write what each history's `catch_up` returned: one copy to the device, whatever their number."""
        columns: list[tuple[int, int, float, float, int, int]] = []
        for number, ((start, count, later), changed) in enumerate(zip(self._where, changes, strict=True)):
            repetition, base = self._histories[number].repetition, self._at[1][number]
            for slot, (token_id, offset, times) in changed.items():
                if slot < count:
                    place = start + slot
                else:
                    if slot - count == len(later):
                        later.append(self._size)
                        self._size += 1
                    place = later[slot - count]
                columns.append((place, base + token_id, repetition, offset, number, times))
        if not columns:
            return
        if self._size > len(self._index):
            self._grow()
        places, index, repetition, offset, owner, times = zip(*columns, strict=True)
        host = np.array([index, _bits(repetition), _bits(offset), owner, times, places], dtype=np.int64)
        table = self._send(host)
        places, index, repetition, offset = table[5], *_split(table)
        self._index[places], self._repetition[places], self._offset[places] = index, repetition, offset
        self._owner[places], self._count[places] = table[3], table[4]

    def _grow(self) -> None:
        room = self._size - len(self._index) + 64 * len(self._histories)
        self._index, self._repetition, self._offset, self._owner, self._count = (
            torch.cat([old, old.new_zeros(room)])
            for old in (self._index, self._repetition, self._offset, self._owner, self._count)
        )

    def entries(self) -> _Entries:
        return self._index[: self._size], self._repetition[: self._size], self._offset[: self._size]


def _split(table: torch.Tensor) -> _Entries:
    """Of a table whose first rows are indices and the bits of two float32 numbers."""
    return table[0].clone(), _floats(table[1]), _floats(table[2])


def _bits(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """float32 numbers as int64 that travel in one table with indices."""
    return np.asarray(values, dtype=np.float32).view(np.int32).astype(np.int64)


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)
