"""Natural logarithms of the model's own probabilities: of tokens that were chosen, and of those that a prompt has.

Legend: N rows, V vocabulary, S prompt tokens of a step that are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor.recipe.peak import SCORED_ROWS
from executor.schedule.plan import Row


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token, and of the best, descending."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob)
    rank: int | None = None  # of the token among all, 1 for the best; counted for a prompt's tokens only


@dataclass(frozen=True)
class _Tensors:
    """Of N rows, where the logits are."""

    chosen: Tensor  # [N]
    values: Tensor  # [N, K], descending
    ids: Tensor  # [N, K]
    ranks: Tensor | None  # [N]


def _tensors(logits: Tensor, token_ids: Tensor, most: int, *, ranked: bool) -> _Tensors:
    """logits [N, V], token_ids int64 [N]; `most`: how many of the best."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    values, ids = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    ranks = (logprobs > chosen).sum(dim=-1) + 1 if ranked else None
    return _Tensors(chosen.squeeze(-1), values, ids, ranks)


def _on_host(found: _Tensors, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """`counts`: how many of the best each row wants."""
    ranks = [None] * len(token_ids) if found.ranks is None else found.ranks.tolist()
    columns = token_ids, found.chosen.tolist(), found.values.tolist(), found.ids.tolist(), counts, ranks
    return [
        TokenLogprobs(token_id, value, tuple(zip(best_ids[:count], best_values[:count], strict=True)), rank)
        for token_id, value, best_values, best_ids, count, rank in zip(*columns, strict=True)
    ]


def token_logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of the tokens chosen from logits [N, V], with the `counts[i]` best of each row."""
    chosen = torch.tensor(token_ids, device=logits.device)
    return _on_host(_tensors(logits, chosen, max(counts), ranked=False), token_ids, counts)


@dataclass(frozen=True)
class ChosenLogprobs:
    """The tokens of a step's R rows, and the logprobs of N of them, on the device and in one tensor."""

    packed: Tensor  # int32, the bits of all ids [R] and, of the N rows, the best ids [N, K], logprobs [N] and [N, K]
    num_rows: int  # R
    rows: Sequence[int]
    counts: Sequence[int]  # how many of the best each of them wants
    most: int  # K

    @staticmethod
    def of(
        logits: Tensor, token_ids: Tensor, index: Tensor, rows: Sequence[int], counts: Sequence[int]
    ) -> "ChosenLogprobs":
        """Of token_ids int64 [R], chosen from logits [R, V], below 0 where none could be. `index` int64 [N]: `rows` on
        the device."""
        found = _tensors(logits[index], token_ids[index].clamp_(min=0), max(counts), ranked=False)
        parts = token_ids, found.ids, found.chosen, found.values
        packed = torch.cat([part.contiguous().flatten().view(torch.int32) for part in parts])
        return ChosenLogprobs(packed, len(token_ids), rows, counts, found.ids.shape[1])

    def read(self, host: np.ndarray) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The ids, and the logprobs of each row that has any, out of `packed` on the host."""
        count = len(self.rows)
        ends = np.cumsum([2 * self.num_rows, 2 * count * self.most, count])
        ids, best_ids, chosen, best = np.split(host, ends)
        token_ids, logprobs = ids.view(np.int64).tolist(), [None] * self.num_rows
        best_ids = best_ids.view(np.int64).reshape(count, self.most).tolist()
        best = best.view(np.float32).reshape(count, self.most).tolist()
        for place, (row, wanted) in enumerate(zip(self.rows, self.counts, strict=True)):
            if token_ids[row] >= 0:
                top = tuple(zip(best_ids[place][:wanted], best[place][:wanted], strict=True))
                logprobs[row] = TokenLogprobs(token_ids[row], float(chosen[place : place + 1].view(np.float32)[0]), top)
        return token_ids, logprobs


class PromptScores:
    """The logprobs of the prompt tokens that a step scores, collected a few rows of logits at a time.

    The logits of SCORED_ROWS tokens exist at once: those of a whole step would be gigabytes.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [(number, row) for number, row in enumerate(rows) if row.scored]
        self._token_ids: list[int] = []
        self._counts: list[int] = []
        for _, row in self._rows:
            self._token_ids += row.request.prompt.token_ids[row.scored.start + 1 : row.scored.stop + 1]
            self._counts += [row.request.params.prompt_logprobs] * len(row.scored)
        self._parts: list[_Tensors] = []
        self._num_added = 0

    def add(self, logits: Tensor) -> None:
        """The logits of the next tokens, [1 to SCORED_ROWS, V]."""
        assert len(logits) <= SCORED_ROWS
        first, self._num_added = self._num_added, self._num_added + len(logits)
        token_ids = self._token_ids[first : self._num_added]
        judged = torch.tensor(token_ids, device=logits.device)
        self._parts.append(_tensors(logits, judged, max(self._counts), ranked=True))

    def by_row(self) -> dict[int, list[TokenLogprobs]]:
        """Of every row of the step that has some: one for each of its scored tokens, in their order."""
        assert self._num_added == len(self._token_ids), "not all scored tokens have been added"
        if not self._parts:
            return {}
        columns = zip(*((part.chosen, part.values, part.ids, part.ranks) for part in self._parts), strict=True)
        scores = _on_host(_Tensors(*map(torch.cat, columns)), self._token_ids, self._counts)
        found, at = {}, 0
        for number, row in self._rows:
            found[number] = scores[at : at + len(row.scored)]
            at += len(row.scored)
        return found
