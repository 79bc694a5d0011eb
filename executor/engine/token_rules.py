"""What a request's own parameters say about single tokens: biases, and tokens that may not come, or not yet.

Biases are added to the model's logits before any penalty (as transformers and vLLM do); what may not come is -inf after
them. All of it is patched where the logits lie and put back afterwards. Rows without rules are never looked at; of a
row with `allowed_token_ids` everything is.
What a batch's biases and allowed tokens are stays on the device while the rows stay the same.
Legend: R rows, N rows that have a rule, V width of the logits' rows, M tokens named by all of them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from executor.schedule.request import Request

_Rows = tuple[tuple[int, Request], ...]  # places in the batch, and who stands there


class TokenRules:
    """Patches logits; keeps the last batch's tables until one of its requests is forgotten."""

    def __init__(self, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.eos_token_ids = frozenset(eos_token_ids)
        self._bias: tuple[_Rows, torch.Tensor, torch.Tensor] | None = None
        self._allowed: tuple[_Rows, torch.Tensor, torch.Tensor] | None = None

    @contextmanager
    def biased(self, scores: torch.Tensor, requests: Sequence[Request]) -> Iterator[None]:
        """`scores` float32 [R, V], contiguous, with every row's `logit_bias` added inside the context."""
        rows = tuple((row, request) for row, request in enumerate(requests) if request.params.logit_bias)
        if not rows:
            yield
            return
        if self._bias is None or self._bias[0] != rows:
            self._bias = rows, *self._bias_table(rows, scores.shape[-1])
        _, index, bias = self._bias
        with _patched(scores.view(-1), index) as picked:
            scores.view(-1)[index] = picked + bias
            yield

    @contextmanager
    def barred(self, scores: torch.Tensor, requests: Sequence[Request], num_tokens: Sequence[int]) -> Iterator[None]:
        """`scores` as above, with -inf inside the context where a token may not come.

        `num_tokens`: how many tokens, prompt included, come before the one that a row chooses.
        """
        rows = tuple((row, each) for row, each in enumerate(requests) if each.params.allowed_token_ids is not None)
        barred = self._not_now(requests, num_tokens, scores.shape[-1])
        if not rows and not barred:
            yield
            return
        if rows and (self._allowed is None or self._allowed[0] != rows):
            self._allowed = rows, *self._allowed_table(rows, scores.shape[-1])
        numbers, kept = self._allowed[1:] if rows else (None, None)
        with _patched(scores, numbers) as picked:
            if picked is not None:
                masked = _ruled_out(picked)
                masked.view(-1)[kept] = picked.view(-1)[kept]
                scores[numbers] = masked
            index = torch.tensor(barred, device=self.device) if barred else None
            with _patched(scores.view(-1), index) as chosen:
                if chosen is not None:
                    scores.view(-1)[index] = _ruled_out(chosen)
                yield

    def forget(self, request_id: str) -> None:
        """The request has ended: nothing of it is kept."""
        if self._bias is not None and any(request.id == request_id for _, request in self._bias[0]):
            self._bias = None
        if self._allowed is not None and any(request.id == request_id for _, request in self._allowed[0]):
            self._allowed = None

    def kept_ids(self) -> set[str]:
        """Ids of the requests of which something is kept."""
        return {request.id for table in (self._bias, self._allowed) if table for _, request in table[0]}

    def _not_now(self, requests: Sequence[Request], num_tokens: Sequence[int], width: int) -> list[int]:
        """Places in the flat logits of tokens that would end an answer before its minimum, or complete a bad word."""
        barred = []
        for row, (request, count) in enumerate(zip(requests, num_tokens, strict=True)):
            params, num_output = request.params, count - len(request.prompt.token_ids)
            ids: set[int] = set()
            if num_output < params.min_new_tokens:
                ids.update(params.stop_token_ids, () if params.ignore_eos else self.eos_token_ids)
            if request.bad_words is not None:
                assert num_output <= len(request.output_token_ids), "bad words need every token before"
                ids |= request.bad_words.after(request.output_token_ids, num_output)
            barred += [row * width + token_id for token_id in ids if token_id < self.vocab_size]
        return barred

    def _bias_table(self, rows: _Rows, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every biased token its place in the flat logits, int64 [M], and its bias, float32 [M]."""
        index = [row * width + token_id for row, request in rows for token_id, _ in request.params.logit_bias]
        values = [value for _, request in rows for _, value in request.params.logit_bias]
        table = np.array([index, np.array(values, dtype=np.float64).view(np.int64)])
        sent = torch.from_numpy(table).to(self.device)
        return sent[0].clone(), sent[1].view(torch.float64).to(torch.float32)

    def _allowed_table(self, rows: _Rows, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows, int64 [N], and where their allowed tokens lie among the logits of these rows, int64 [M]."""
        ids = [np.asarray(request.params.allowed_token_ids, dtype=np.int64) for _, request in rows]
        places = [each + number * width for number, each in enumerate(ids)]
        numbers = np.array([row for row, _ in rows], dtype=np.int64)
        sent = torch.from_numpy(np.concatenate([numbers, *places])).to(self.device)
        return sent[: len(rows)].clone(), sent[len(rows) :].clone()


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
