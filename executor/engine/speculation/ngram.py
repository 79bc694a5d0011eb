"""Drafts from the request's own tokens: what followed when its last tokens came before (prompt lookup).

Knows requests and rows only. Of each request an index of its n-grams grows with its answer.
"""

from collections.abc import Sequence

from executor.schedule.plan import Plan, Row
from executor.schedule.request import Request


class NgramProposer:
    """The continuation of the latest earlier place where the last `most` to `least` tokens are the same."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._indexes: dict[str, _Index] = {}

    def propose(self, plan: Plan, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        return [self._draft(row.request, count) if count else () for row, count in zip(plan.rows, wanted, strict=True)]

    def observe(self, row: Row, chosen: Sequence[int]) -> None:
        """What was chosen is read from the request."""

    def forget(self, request: Request) -> None:
        self._indexes.pop(request.id, None)

    def _draft(self, request: Request, count: int) -> tuple[int, ...]:
        index = self._indexes.get(request.id)
        if index is None:
            index = self._indexes[request.id] = _Index(self.least, self.most, request.prompt.token_ids)
        index.extend(request.output_token_ids)
        return index.following(count)


class _Index:
    """Where each n-gram of a request's tokens ended last."""

    def __init__(self, least: int, most: int, prompt: Sequence[int]) -> None:
        self.sizes = range(most, least - 1, -1)
        self.tokens: list[int] = []
        self._num_prompt = len(prompt)
        self._places: dict[tuple[int, ...], int] = {}
        self._add(prompt)

    def extend(self, output: Sequence[int]) -> None:
        self._add(output[len(self.tokens) - self._num_prompt :])

    def following(self, count: int) -> tuple[int, ...]:
        for size in self.sizes:
            place = self._places.get(tuple(self.tokens[-size:]))
            if place is not None:
                return tuple(self.tokens[place : place + count])
        return ()

    def _add(self, tokens: Sequence[int]) -> None:
        """An n-gram is found from the token behind it on, so that the last one does not find itself."""
        for token_id in tokens:
            end = len(self.tokens)
            for size in self.sizes:
                if size <= end:
                    self._places[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token_id)
