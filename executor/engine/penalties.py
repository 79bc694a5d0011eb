"""What repetition, presence and frequency penalties do to the logits of some tokens.

The repetition penalty counts the tokens of prompt and answer (as transformers does), presence and frequency those of
the answer only (as OpenAI and vLLM do). Only tokens that were seen change: their values are patched where the logits
lie, and put back afterwards; nothing else is read, nothing is copied.
The list of seen tokens of a batch stays on the device: while the rows stay the same, a step sends only its new tokens.
Legend: R rows, V width of the logits' rows, M tokens seen by all rows that have penalties.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from executor.schedule.request import Request


class Penalties:
    """Patches logits; keeps the histories of requests with penalties until `forget`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._histories: dict[str, _History] = {}
        self._batch: _Batch | None = None

    @contextmanager
    def applied(self, scores: torch.Tensor, requests: Sequence[Request]) -> Iterator[None]:
        """`scores` float32 [R, V], contiguous, changed in place; inside the context only."""
        seen = self._seen(requests, scores.shape[-1])
        if seen is None:
            yield
            return
        index, repetition, offset = seen
        flat = scores.view(-1)
        picked = flat[index]
        try:
            changed = torch.where(picked < 0, picked * repetition, picked / repetition)
            flat[index] = changed.sub_(offset)
            yield
        finally:
            flat[index] = picked

    def forget(self, request_id: str) -> None:
        """Frees what is kept for a request that is finished; nothing happens when nothing is kept."""
        if self._histories.pop(request_id, None) is not None:
            self._batch = None

    def check(self, live_ids: Collection[str]) -> None:
        """Asserts that nothing is kept for requests other than `live_ids`."""
        stale = sorted(self._histories.keys() - set(live_ids))
        assert not stale, f"penalty histories of requests that are gone: {stale}"

    def _seen(self, requests: Sequence[Request], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Of every seen token its place in the flat logits, its row's divisor, and what is taken off: [M] each."""
        rows = [row for row, request in enumerate(requests) if request.params.needs_history]
        if not rows:
            return None
        histories = [self._history(requests[row]) for row in rows]
        places = [row * width for row in rows]
        if self._batch is None or not self._batch.holds(histories, places):
            for history in histories:
                history.catch_up()
            self._batch = _Batch(histories, places, self.device)
        else:
            self._batch.append([history.catch_up() for history in histories])
        return self._batch.entries()

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
        self._presence, self._frequency = np.float32(params.presence_penalty), np.float32(params.frequency_penalty)
        self._num_seen = 0
        self.ids: list[int] = []
        self.offsets: list[float] = []
        self._counts: list[int] = []  # in the answer
        self._slot_of: dict[int, int] = {}
        # Without a repetition penalty the prompt's tokens are left as they are.
        if params.repetition_penalty != 1.0:
            # A prompt may hold ids beyond the logits (padded embeddings); they cannot be chosen.
            self.ids = [token_id for token_id in dict.fromkeys(request.prompt.token_ids) if token_id < vocab_size]
            self.offsets, self._counts = [0.0] * len(self.ids), [0] * len(self.ids)
            self._slot_of = {token_id: slot for slot, token_id in enumerate(self.ids)}

    def catch_up(self) -> dict[int, tuple[int, float]]:
        """Take in the answer's new tokens; what has changed: slot -> (token id, what is taken off its score)."""
        output = self.request.output_token_ids
        assert len(output) >= self._num_seen, f"request '{self.request.id}' lost tokens"
        changed = {}
        for token_id in output[self._num_seen :]:
            if token_id >= self.vocab_size:
                continue
            slot = self._slot_of.setdefault(token_id, len(self.ids))
            if slot == len(self.ids):
                self.ids.append(token_id)
                self.offsets.append(0.0)
                self._counts.append(0)
            self._counts[slot] += 1
            self.offsets[slot] = float(self._presence + self._frequency * np.float32(self._counts[slot]))
            changed[slot] = token_id, self.offsets[slot]
        self._num_seen = len(output)
        return changed


class _Batch:
    """The seen tokens of some rows, on the device, in no particular order, with room for more at the end."""

    def __init__(self, histories: Sequence[_History], places: Sequence[int], device: torch.device) -> None:
        self._histories, self._places = tuple(histories), tuple(places)
        counts = [len(history.ids) for history in histories]
        self._size = sum(counts)
        # Of each history: where its first tokens stand, how many they are, and where each later one stands.
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        self._where = [(start, count, []) for start, count in zip(starts, counts, strict=True)]
        room = self._size + 64 * len(counts)
        host = np.zeros((3, room), dtype=np.int64)
        for history, place, start, count in zip(histories, places, starts, counts, strict=True):
            part = slice(start, start + count)
            host[0, part] = np.asarray(history.ids, dtype=np.int64) + place
            host[1, part] = _bits(np.full(count, history.repetition))
            host[2, part] = _bits(np.asarray(history.offsets, dtype=np.float32))
        table = torch.from_numpy(host).to(device)
        self._index = table[0].clone()
        self._repetition, self._offset = _floats(table[1]), _floats(table[2])

    def holds(self, histories: Sequence[_History], places: Sequence[int]) -> bool:
        """Whether it is of these rows, and has room for a token more of each."""
        return (
            self._places == tuple(places)
            and len(self._histories) == len(histories)
            and all(a is b for a, b in zip(self._histories, histories, strict=True))
            and self._size + len(histories) <= len(self._index)
        )

    def append(self, changes: Sequence[dict[int, tuple[int, float]]]) -> None:
        """Write what each history's `catch_up` returned: one copy to the device, whatever their number."""
        columns: list[tuple[int, int, float, float]] = []
        for history, base, (start, count, later), changed in zip(
            self._histories, self._places, self._where, changes, strict=True
        ):
            for slot, (token_id, offset) in changed.items():
                if slot < count:
                    place = start + slot
                else:
                    if slot - count == len(later):
                        later.append(self._size)
                        self._size += 1
                    place = later[slot - count]
                columns.append((place, base + token_id, history.repetition, offset))
        if not columns:
            return
        if self._size > len(self._index):  # several tokens a step
            self._grow()
        places, index, repetition, offset = zip(*columns, strict=True)
        host = np.array([places, index, _bits(repetition), _bits(offset)], dtype=np.int64)
        table = torch.from_numpy(host).to(self._index.device)
        self._index[table[0]] = table[1]
        self._repetition[table[0]] = _floats(table[2])
        self._offset[table[0]] = _floats(table[3])

    def _grow(self) -> None:
        room = self._size - len(self._index) + 64 * len(self._histories)
        self._index, self._repetition, self._offset = (
            torch.cat([old, old.new_zeros(room)]) for old in (self._index, self._repetition, self._offset)
        )

    def entries(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._index[: self._size], self._repetition[: self._size], self._offset[: self._size]


def _bits(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """float32 numbers as int64 that travel in one table with indices."""
    return np.asarray(values, dtype=np.float32).view(np.int32).astype(np.int64)


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)
