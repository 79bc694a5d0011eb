"""What a request's own parameters say about single tokens: biases, and tokens that may not come, or not yet.

Biases are added to the model's logits before any penalty (as transformers and vLLM do); what may not come is -inf after
them. All of it is patched where the logits lie and put back afterwards. Rows without rules are never looked at; of a
row with `allowed_token_ids` everything is.
What a batch's biases and allowed tokens are stays on the device while the requests stay the same.
Legend: N requests, R rows, V width of the logits' rows, B rows that have a rule, M tokens named by all of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from executor.device.ops import Send
from executor.engine.places import Places
from executor.schedule.request import Request


class TokenRules:
    """Patches logits; keeps the last batch's tables until one of its requests is forgotten."""

    def __init__(self, vocab_size: int, send: Send, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.send = send
        self.eos_token_ids = frozenset(eos_token_ids)
        self._bias: _Biases | None = None
        self._allowed: _Allowed | None = None

    @contextmanager
    def biased(self, scores: torch.Tensor, places: Places) -> Iterator[None]:
        """`scores` float32 [R, V], contiguous, with every row's `logit_bias` added inside the context."""
        numbers = [number for number, request in enumerate(places.requests) if request.params.logit_bias]
        if not numbers:
            yield
            return
        requests = tuple(places.requests[number] for number in numbers)
        if self._bias is None or self._bias.requests != requests:
            self._bias = _Biases(requests)
        rows = [places.rows_of(number) for number in numbers]
        index, bias = self._bias.of_rows(rows, scores.shape[-1], self.send)
        with _patched(scores.view(-1), index) as picked:
            scores.view(-1)[index] = picked + bias
            yield

    @contextmanager
    def barred(self, scores: torch.Tensor, places: Places) -> Iterator[None]:
        """`scores` as above, with -inf inside the context where a token may not come."""
        numbers = [n for n, request in enumerate(places.requests) if request.params.allowed_token_ids is not None]
        barred = self._not_now(places, scores.shape[-1])
        if not numbers and not barred:
            yield
            return
        rows = None
        if numbers:
            requests = tuple(places.requests[number] for number in numbers)
            if self._allowed is None or self._allowed.requests != requests:
                self._allowed = _Allowed.of(requests, scores.shape[-1], self.send)
            owner = [which for which, number in enumerate(numbers) for _ in places.rows_of(number)]
            rows, owner = self.send(np.array([places.rows_of_all(numbers), owner]))
        with _patched(scores, rows) as picked:
            if picked is not None:
                scores[rows] = torch.where(self._allowed.others[owner], _ruled_out(picked), picked)
            index = self.send(np.array(barred)) if barred else None
            with _patched(scores.view(-1), index) as chosen:
                if chosen is not None:
                    scores.view(-1)[index] = _ruled_out(chosen)
                yield

    def forget(self, request_id: str) -> None:
        """The request has ended: nothing of it is kept."""
        if self._bias is not None and any(request.id == request_id for request in self._bias.requests):
            self._bias = None
        if self._allowed is not None and any(request.id == request_id for request in self._allowed.requests):
            self._allowed = None

    def kept_ids(self) -> set[str]:
        """Ids of the requests of which something is kept."""
        return {request.id for table in (self._bias, self._allowed) if table for request in table.requests}

    def _not_now(self, places: Places, width: int) -> list[int]:
        """Places in the flat logits of tokens that would end an answer before its minimum, or complete a bad word."""
        barred = []
        for number, request in enumerate(places.requests):
            params, words = request.params, request.bad_words
            if words is None and not params.min_new_tokens:
                continue
            num_prompt = len(request.prompt.token_ids)
            drafts = places.drafts_of(number)
            output = [*request.output_token_ids, *drafts] if drafts else request.output_token_ids
            for row in places.rows_of(number):
                num_output = places.num_before[row] - num_prompt
                ids: set[int] = set()
                if num_output < params.min_new_tokens:
                    ids.update(params.stop_token_ids, () if params.ignore_eos else self.eos_token_ids)
                if words is not None:
                    assert num_output <= len(output), "bad words need every token before"
                    ids |= words.after(output, num_output)
                barred += [row * width + token_id for token_id in ids if token_id < self.vocab_size]
        return barred


class _Biases:
    """The biases of some requests, none of them empty."""

    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        self._ids = [np.array([token_id for token_id, _ in each.params.logit_bias]) for each in requests]
        self._values = [np.array([value for _, value in each.params.logit_bias], np.float32) for each in requests]
        self._rows: list[range] = []
        self._sent: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_rows(self, rows: list[range], width: int, send: Send) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every biased token its place in the flat logits, int64 [M], and its bias, float32 [M].

        `rows`: those of each request. What was sent last is kept for a step of the same rows.
        """
        if self._sent is None or rows != self._rows:
            index = [ids + row * width for ids, each in zip(self._ids, rows, strict=True) for row in each]
            values = [bias for bias, each in zip(self._values, rows, strict=True) for _ in each]
            values = np.concatenate(values).view(np.int32)
            sent = send(np.stack([np.concatenate(index), values]))
            self._rows, self._sent = rows, (sent[0].clone(), sent[1].to(torch.int32).view(torch.float32))
        return self._sent


@dataclass(frozen=True)
class _Allowed:
    """The tokens that some requests do not allow at all."""

    requests: tuple[Request, ...]
    others: torch.Tensor  # bool [N, V]

    @staticmethod
    def of(requests: tuple[Request, ...], width: int, send: Send) -> "_Allowed":
        others = np.ones((len(requests), width), dtype=bool)
        for number, request in enumerate(requests):
            others[number, list(request.params.allowed_token_ids)] = False
        return _Allowed(requests, send(others))


@contextmanager
def _patched(values: torch.Tensor, index: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Gives `values[index]` and puts it back at the end; nothing at all without an index."""
    if index is None:
        yield None
        return
    picked = values[index]
    try:
        yield picked
    finally:
        values[index] = picked


def _ruled_out(scores: torch.Tensor) -> torch.Tensor:
    """-inf; what is not a number, or infinite, stays: it is a fault of the row and must show."""
    return scores.masked_fill(scores < math.inf, -math.inf)
