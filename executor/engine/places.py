"""Whose the rows of a step's logits are: each request has one for the token that comes next, and one behind each draft.

A place further on is looked at as if the drafts before it had been chosen.
Knows no tensors. Legend: N requests, R rows of logits.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain

from executor.schedule.request import Request

Drafts = Sequence[tuple[int, ...]]


class Places:
    """The rows of `requests`, in their order; a request's own stand together.

    `num_tokens` [N]: how many tokens, prompt included, come before what each request chooses first; None: all it has.
    `drafts` [N]: what is taken to come then; None: nothing, for all of them.
    """

    def __init__(
        self, requests: Sequence[Request], num_tokens: Sequence[int] | None = None, drafts: Drafts | None = None
    ) -> None:
        self.requests = requests
        self.drafts = drafts
        self._num_tokens = num_tokens

    @cached_property
    def num_before(self) -> Sequence[int]:
        """Of each row how many tokens come before the one that it chooses: [R]."""
        before = self._num_tokens
        if before is None:
            before = [request.num_tokens for request in self.requests]
        if self.drafts is None:
            return before
        pairs = zip(before, self.drafts, strict=True)
        return [count + place for count, drafts in pairs for place in range(len(drafts) + 1)]

    @cached_property
    def first(self) -> Sequence[int]:
        """Each request's first row, and the number of all rows behind them: [N + 1]."""
        if self.drafts is None:
            return range(len(self.requests) + 1)
        return [0, *accumulate(len(drafts) + 1 for drafts in self.drafts)]

    @property
    def num_rows(self) -> int:
        return self.first[-1]

    @cached_property
    def owner(self) -> Sequence[int]:
        """The number of each row's request: [R]."""
        if self.drafts is None:
            return range(len(self.requests))
        return [number for number, drafts in enumerate(self.drafts) for _ in range(len(drafts) + 1)]

    def rows_of(self, number: int) -> range:
        """A request's rows."""
        return range(self.first[number], self.first[number + 1])

    def rows_of_all(self, numbers: Sequence[int]) -> list[int]:
        """The rows of some requests, in their order."""
        return list(numbers) if self.drafts is None else list(chain.from_iterable(map(self.rows_of, numbers)))

    def drafts_of(self, number: int) -> tuple[int, ...]:
        return () if self.drafts is None else self.drafts[number]
