"""Steps that are queued before the host has read the tokens of the one before.

Tokens stay on the device, where the next step takes them: what a step yields, and what it took, one of each at a time.
Knows no model and no graphs; what may be queued so is the scheduler's to say (Scheduler.schedule_ahead).
Legend: R rows of a step.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from executor.device.ops import Ops
from executor.engine.replica import Replica
from executor.engine.results import StepResult
from executor.engine.sampler import Drawn, Sampler
from executor.schedule.plan import Plan
from executor.schedule.request import Request


@dataclass(frozen=True)
class Launched:
    """A step whose work is queued. `drawn` has its tokens; without, it has been waited for: its `result` is known."""

    plan: Plan
    drawn: Drawn | None = None
    result: StepResult | None = None
    void: frozenset[int] = frozenset()  # rows behind void ones of the step before: void as well

    def without(self, requests: Collection[Request]) -> "Launched":
        """The step with the rows of these void."""
        numbers = frozenset(number for number, row in enumerate(self.plan.rows) if row.request in requests)
        return replace(self, void=numbers) if numbers else self


class TokensAhead:
    """Tokens of launched steps on this rank's device."""

    def __init__(self, device: Ops, sampler: Sampler, replica: Replica) -> None:
        self._device, self._sampler, self._replica = device, sampler, replica
        # int64 [R]: what the step launched last yields, and what it took from a step before it; None: it had its tokens
        # from the host.
        self._yielded: Tensor | None = None
        self._taken: Tensor | None = None

    def can_draw(self, plan: Plan) -> bool:
        """Whether every row yields one token that can be chosen without the host."""
        return (
            bool(plan.rows)
            and all(row.max_yield == 1 and not row.scored for row in plan.rows)
            and self._sampler.draws_ahead([row.request for row in plan.rows])
        )

    def take(self, plan: Plan) -> Tensor | None:
        """int64 [R]: the tokens of a plan that continues another, on every rank of the replica; None: the host has
        them."""
        self._taken = None if plan.continues is None else self._continued(plan.continues)
        return self._taken

    def draw(self, plan: Plan, logits: Tensor) -> Drawn:
        """Choose a token for each row of the step whose tokens were taken last; logits [R, V]."""
        requests, num_tokens = zip(*((row.request, row.start + row.num_tokens) for row in plan.rows), strict=True)
        drawn = self._sampler.draw(logits, requests, num_tokens, unread=self._taken)
        self._yielded = drawn.ids
        return drawn

    def _continued(self, places: tuple[int, ...]) -> Tensor:
        """int64 [R]: what the rows at these places of the step before yield."""
        if self._replica.leads:
            token_ids = self._yielded
            if places != tuple(range(len(token_ids))):
                token_ids = token_ids[self._device.send(np.array(places))]
            token_ids = token_ids.clamp(min=0)  # a row without a token: this one is computed in vain
        else:
            token_ids = torch.empty(len(places), dtype=torch.int64, device=self._device.device)
        return self._replica.parallel.text.broadcast(token_ids, 0)
