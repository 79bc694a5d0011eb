"""Speculative decoding: tokens that are drafted, computed in one step with what is sure, and kept where they are right.

A `Proposer` drafts; the `Speculator` asks it before each step, and tells it afterwards what the model chose. What is
kept is what the model would have chosen without drafts (executor.engine.runner), so drafts decide how many steps an
answer takes and nothing else.
Knows no tensors. One of each per replica, on its leader.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from executor.schedule.plan import Plan, Row
from executor.schedule.request import Request


class Proposer(Protocol):
    """Where drafts come from."""

    def propose(self, plan: Plan, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        """Of every row of `plan` at most `wanted` tokens that may come next. Called before every step, once."""

    def observe(self, row: Row, chosen: Sequence[int]) -> None:
        """After the step, of a row that was verified: what the model chose behind its last token, and behind each of
        its drafts. -1: nothing could be chosen there."""

    def forget(self, request: Request) -> None:
        """It has ended."""


def num_right(draft_ids: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts, from the first on, are what was chosen."""
    for place, token_id in enumerate(draft_ids):
        if chosen[place] != token_id:
            return place
    return len(draft_ids)


class Speculator:
    """Drafts for the rows of a step, and what became of them.

    `num_tokens`: drafts of a row at most.
    """

    def __init__(self, proposer: Proposer, num_tokens: int) -> None:
        self.proposer = proposer
        self.num_tokens = num_tokens
        self.num_drafts = 0  # tokens proposed, and of these the ones kept
        self.num_accepted = 0

    def extended(self, plan: Plan) -> Plan:
        """The plan with drafts for its decode rows."""
        wanted = [self._wanted(row) for row in plan.rows]
        proposed = self.proposer.propose(plan, wanted)
        drafts = [_allowed(row.request, each) for row, each in zip(plan.rows, proposed, strict=True)]
        if not any(drafts):
            return plan
        rows = tuple(row._replace(draft_ids=each) if each else row for row, each in zip(plan.rows, drafts, strict=True))
        return replace(plan, rows=rows, is_decode=False)

    def observe(self, plan: Plan, chosen: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> None:
        """`chosen`: of each row what the model chose at every place; `kept`: the tokens that count."""
        for row, each, tokens in zip(plan.rows, chosen, kept, strict=True):
            if row.draft_ids:
                self.num_drafts += len(row.draft_ids)
                self.num_accepted += max(0, len(tokens) - 1)
            if each:
                self.proposer.observe(row, each)

    def forget(self, request: Request) -> None:
        self.proposer.forget(request)

    def _wanted(self, row: Row) -> int:
        return min(self.num_tokens, max(0, row.max_yield - 1))


def _allowed(request: Request, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Those that the request's grammar takes: the others would be computed for nothing."""
    if not draft_ids or request.matcher is None:
        return draft_ids
    return draft_ids[: request.matcher.allowed(draft_ids)]
