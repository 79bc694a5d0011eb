"""Speculative decoding: tokens that are drafted, computed in one step with what is sure, and kept where they are right.

A `Proposer` drafts; the `Speculator` asks it before each step, and tells it afterwards what the model chose. What is
kept is what the model would have chosen without drafts (executor.engine.runner), so drafts decide how many steps an
answer takes and nothing else.
Knows no tensors. One of each per replica, on its leader.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from executor.engine.speculation.adaptive import Adaptive
from executor.engine.speculation.costs import StepCosts
from executor.engine.speculation.counts import SpeculationCounts
from executor.schedule.plan import Plan, Row
from executor.schedule.request import Request


class Proposer(ABC):
    """Where drafts come from."""

    is_free = True
    """Whether drafts take nothing but a little of the host's time to make."""
    num_trailing = 0
    """Tokens that `trailing` gives of a row at most."""
    is_catching_up = False
    """Whether the last `propose` has computed what it lacked of requests: its time says nothing of the next steps'."""

    @abstractmethod
    def propose(self, plan: Plan, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        """Of every row of `plan` at most `wanted` tokens that may come next. Called before every step, once."""

    def trailing(self, row: Row, draft_ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Up to `count` tokens to compute behind a row's drafts: seldom right, but what is chosen there is learnt."""
        return ()

    def observe(self, row: Row, chosen: Sequence[int]) -> None:  # noqa: B027 - a request's tokens tell most of them
        """After the step, of a row that was verified: what the model chose behind its last token, and behind each of
        its drafts. -1: nothing could be chosen there."""

    def forget(self, request: Request) -> None:  # noqa: B027 - where nothing is kept
        """It has ended."""


class Speculator:
    """Drafts for the rows of a step, and what became of them.

    `num_tokens`: drafts of a row at most. `is_adaptive`: no more of them than pay; else as many as can be had.
    """

    def __init__(self, proposer: Proposer, num_tokens: int, *, is_adaptive: bool = False) -> None:
        self.proposer = proposer
        self.num_tokens = num_tokens
        self.counts = SpeculationCounts()
        self.costs = StepCosts()
        self.adaptive = Adaptive(self.costs, is_free=proposer.is_free) if is_adaptive else None
        self._num_drafts: dict[str, int] = {}  # proposed for the step, by request; without those forced or trailing
        self._num_kept = 0  # tokens of the step

    def extended(self, plan: Plan) -> Plan:
        """The plan with drafts for its decode rows."""
        self._num_drafts.clear()
        limits = [self._wanted(row) for row in plan.rows]
        forced = self._forced(plan, limits)
        limits = [0 if each else limit for each, limit in zip(forced, limits, strict=True)]
        proposed = self._proposed(plan, limits)
        drafts = [
            _allowed(row.request, each or other)
            for row, each, other in zip(plan.rows, forced, self._with_trailing(plan, limits, proposed), strict=True)
        ]
        if not any(drafts):
            return plan
        self._num_drafts = {
            row.request.id: min(len(each), len(whole))
            for row, each, whole in zip(plan.rows, proposed, drafts, strict=True)
            if each
        }
        rows = tuple(row._replace(draft_ids=each) if each else row for row, each in zip(plan.rows, drafts, strict=True))
        return replace(plan, rows=rows, is_decode=False)

    def observe(self, plan: Plan, chosen: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> None:
        """`chosen`: of each row what the model chose at every place; `kept`: the tokens that count."""
        self._num_kept = sum(map(len, kept))
        for row, each, tokens in zip(plan.rows, chosen, kept, strict=True):
            num_drafts, num_accepted = len(row.draft_ids), max(0, len(tokens) - 1)
            if num_drafts:
                self.counts.add_drafts(num_drafts, num_accepted)
                num_sure = self._num_drafts.get(row.request.id, 0)
                if num_sure and self.adaptive is not None:
                    self.adaptive.verified(row.request, num_sure, min(num_sure, num_accepted))
            if each:
                self.proposer.observe(row, each)

    def measured(self, plan: Plan, seconds: float) -> None:
        """What a step took, from `extended` on."""
        if not plan.rows or plan.encode or any(row.num_tokens > 1 for row in plan.rows):
            return  # the step of a prompt
        num_rows, num_drafts = len(plan.rows), sum(len(row.draft_ids) for row in plan.rows)
        plain_s = self.costs.plain(num_rows)
        if num_drafts and plain_s is not None:
            self.counts.add_time(seconds, plain_s * self._num_kept / num_rows)
        if not self.proposer.is_catching_up:
            self.costs.add(num_rows, num_drafts, seconds)
        if self.adaptive is not None:
            self.adaptive.measured(num_rows, num_drafts, seconds)

    def forget(self, request: Request) -> None:
        self.proposer.forget(request)
        if self.adaptive is not None:
            self.adaptive.forget(request)

    def _wanted(self, row: Row) -> int:
        return min(self.num_tokens, max(0, row.max_yield - 1))

    def _forced(self, plan: Plan, limits: Sequence[int]) -> list[tuple[int, ...]]:
        """Of each row the tokens that its grammar leaves no choice of, where they pay."""
        forced = [_forced(row.request, limit) for row, limit in zip(plan.rows, limits, strict=True)]
        num_forced = sum(map(len, forced))
        if num_forced and self.adaptive is not None and not self.adaptive.takes_sure(_num_rows(plan), num_forced):
            return [()] * len(forced)
        return forced

    def _proposed(self, plan: Plan, limits: Sequence[int]) -> list[tuple[int, ...]]:
        adaptive = self.adaptive
        if adaptive is None:
            return self.proposer.propose(plan, limits)
        requests = [row.request for row in plan.rows]
        counts = adaptive.allot(_num_rows(plan), requests, limits)
        held = [
            min(limit, adaptive.num_to_hold(request)) if limit and not count else 0
            for request, limit, count in zip(requests, limits, counts, strict=True)
        ]
        drafts = self.proposer.propose(plan, [max(pair) for pair in zip(counts, held, strict=True)])
        for number, wanted in enumerate(held):
            if wanted:
                adaptive.hold(requests[number], drafts[number])
                drafts[number] = ()
        return drafts

    def _with_trailing(self, plan: Plan, limits: Sequence[int], drafts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        rooms = [min(limit - len(each), self.proposer.num_trailing) for each, limit in zip(drafts, limits, strict=True)]
        left = sum(rooms)
        if self.adaptive is not None and left:
            left = self.adaptive.room(_num_rows(plan), sum(map(len, drafts)), left)
        longer = []
        for row, each, room in zip(plan.rows, drafts, rooms, strict=True):
            count = min(room, left)
            left -= count
            longer.append(each + self.proposer.trailing(row, each, count) if count else each)
        return longer


def _num_rows(plan: Plan) -> int:
    """Those that go on token by token."""
    return sum(row.num_tokens == 1 for row in plan.rows)


def _forced(request: Request, limit: int) -> tuple[int, ...]:
    """At most `limit` tokens that the request's grammar leaves no choice of."""
    return () if request.matcher is None or not limit else request.matcher.forced()[:limit]


def _allowed(request: Request, draft_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Those that the request's grammar takes: the others would be computed for nothing."""
    if not draft_ids or request.matcher is None:
        return draft_ids
    return draft_ids[: request.matcher.allowed(draft_ids)]
