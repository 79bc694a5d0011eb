"""How many drafts each request gets in the next step: as many as are expected to pay.

What a step of so many tokens takes is measured (executor.engine.speculation.costs), and how far a request's drafts are
right is estimated from its latest ones: how often the first is, and how often one is behind others that were. Drafts
are then taken in the order of their chances, as long as the step's tokens by its seconds grow.
A request whose drafts do not pay has none. Where drafts cost nothing to make they are made now and then all the same
and held against what the answer turns out to be, so that a request comes back without having paid for it; and none is
computed before one of some request was right so. Other drafts are tried again when steps without drafts have saved up
for it (TRIAL_SHARE of their time), and so is what a step costs with tokens behind the drafts, which are seldom right.
The bound: where no draft is ever right, an answer takes at most 1 / 0.97 of the time that it takes without drafts
(tests/engine/speculation/test_adaptive.py, on tables of costs).

Knows requests, sizes and seconds; no tokens of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from executor.engine.speculation.costs import StepCosts
from executor.engine.speculation.verify import num_right
from executor.schedule.request import Request

MARGIN = 1.02  # drafts must be expected to bring so much more
HELD_STEPS = 4  # a request without drafts has some made every so many steps, and held against the answer
HELD_AT_FIRST = 16  # steps in which it has some made every time
HELD_TOKENS = 4
TRIAL_SHARE = 0.01
TRIAL_TOKENS = 2
MOST_SAVED = 4  # steps' time
TRAILING_SHARE = 0.01  # of a step's time: what tokens behind the drafts may cost
MEMORY = 0.85  # of what has been seen, after another draft
PRIOR_WEIGHT = 2.0  # tries that the rate of all requests counts for, when a request begins
FIRST_RATE = 0.5  # of all requests, before anything has been seen
UNSEEN_RATE = 0.01  # of first drafts, before anything has been seen, where they can be held against answers for nothing
ALL_MEMORY = 0.98
LEAST_CHANCE = 0.02  # of a draft that is considered


@dataclass
class Rate:
    """A share of tries that succeeded, of which the older ones count less."""

    right: float
    tried: float

    @property
    def value(self) -> float:
        return self.right / self.tried

    def add(self, num_right: int, num_tried: int, memory: float) -> None:
        self.right = self.right * memory + num_right
        self.tried = self.tried * memory + num_tried


class Acceptance:
    """How often drafts are right: the first one, and those behind right ones. It begins with what others have."""

    def __init__(self, first: float, later: float, memory: float) -> None:
        self.first = Rate(PRIOR_WEIGHT * first, PRIOR_WEIGHT)
        self.later = Rate(PRIOR_WEIGHT * later, PRIOR_WEIGHT)
        self._memory = memory

    def add(self, num_drafts: int, num_right: int) -> None:
        self.first.add(min(num_right, 1), 1, self._memory)
        num_later = min(num_right + 1, num_drafts) - 1
        if num_later > 0:
            self.later.add(num_right - 1, num_later, self._memory)

    def chances(self, most: int) -> list[float]:
        """That at least 1, 2, ... of `most` drafts are right, as long as it is worth a thought."""
        chance, later, chances = self.first.value, self.later.value, []
        while len(chances) < most and chance >= LEAST_CHANCE:
            chances.append(chance)
            chance *= later
        return chances


@dataclass
class _State:
    """Of a request. `held`: drafts that no step has computed, and the place of the answer that they begin at."""

    acceptance: Acceptance
    num_idle: int = 0  # steps without drafts, one after another
    held: tuple[int, tuple[int, ...]] | None = None


class Adaptive:
    """`is_free`: whether drafts take nothing but a little of the host's time to make."""

    def __init__(self, costs: StepCosts, *, is_free: bool) -> None:
        self._costs = costs
        self._is_free = is_free
        self._all = Acceptance(UNSEEN_RATE if is_free else FIRST_RATE, FIRST_RATE, ALL_MEMORY)
        self._states: dict[str, _State] = {}
        self._saved_s = 0.0  # for trials
        self._is_trial = False

    def allot(self, num_rows: int, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        """How many drafts of each request a step of so many decode rows may compute, of `limits` at most."""
        counts = [0] * len(limits)
        plain_s = self._costs.plain(num_rows)
        if plain_s is None:
            return counts
        chances = sorted(
            (-chance, number)
            for number, (request, limit) in enumerate(zip(requests, limits, strict=True))
            if limit
            for chance in self._state(request).acceptance.chances(limit)
        )
        del chances[self._costs.most_drafts(num_rows) :]
        best, num_best, expected = MARGIN * num_rows / plain_s, 0, float(num_rows)
        for count, (negative, _) in enumerate(chances, start=1):
            expected -= negative
            tokens_per_s = expected / self._costs.verifying(num_rows, count)
            if tokens_per_s > best:
                best, num_best = tokens_per_s, count
        for _, number in chances[:num_best]:
            counts[number] += 1
        if not num_best and not self._is_free:
            trial = [min(limit, TRIAL_TOKENS) for limit in limits]
            if any(trial) and self._saved_s >= self._costs.verifying(num_rows, sum(trial)) - plain_s:
                self._is_trial = True
                return trial
        return counts

    def takes_sure(self, num_rows: int, num_drafts: int) -> bool:
        """Whether drafts pay that are as good as right."""
        plain_s = self._costs.plain(num_rows)
        if plain_s is None:
            return False
        return (num_rows + num_drafts) * plain_s > MARGIN * num_rows * self._costs.verifying(num_rows, num_drafts)

    def room(self, num_rows: int, num_drafts: int, num_more: int) -> int:
        """How many more tokens, of `num_more` that will hardly be right, a step takes hardly longer with."""
        costs = self._costs
        plain_s = costs.plain(num_rows)
        if plain_s is None:
            return 0
        known = min(num_more, costs.most_measured(num_rows) - num_drafts)
        if known > 0:
            without_s = costs.verifying(num_rows, num_drafts)
            if costs.verifying(num_rows, num_drafts + known) > without_s * (1 + TRAILING_SHARE):
                return 0
        count = min(num_more, costs.most_drafts(num_rows))
        if count > known and not num_drafts and self._saved_s >= costs.bound(num_rows, count) - plain_s:
            self._is_trial = True
            return count
        return max(known, 0)

    def num_to_hold(self, request: Request) -> int:
        """Drafts to make of a request that computes none in this step, for `hold`."""
        if not self._is_free:
            return 0
        state = self._state(request)
        state.num_idle += 1
        is_due = state.num_idle <= HELD_AT_FIRST or state.num_idle % HELD_STEPS == 1
        return HELD_TOKENS if is_due else 0

    def hold(self, request: Request, draft_ids: tuple[int, ...]) -> None:
        """Drafts that the step does not compute. Those before them are held against the answer."""
        state = self._state(request)
        if state.held is not None:
            start, held = state.held
            answer = request.output_token_ids[start : start + len(held)]
            if answer:
                self._add(state, len(answer), num_right(held[: len(answer)], answer))
        state.held = (len(request.output_token_ids), draft_ids) if draft_ids else None

    def verified(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that a step has computed."""
        state = self._state(request)
        state.num_idle, state.held = 0, None
        self._add(state, num_drafts, num_accepted)

    def measured(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """What a decode step took, the making of its drafts included."""
        if not num_drafts:
            self._saved_s = min(self._saved_s + TRIAL_SHARE * seconds, MOST_SAVED * seconds)
        elif self._is_trial:
            self._saved_s -= seconds - (self._costs.plain(num_rows) or seconds)
        self._is_trial = False

    def forget(self, request: Request) -> None:
        self._states.pop(request.id, None)

    def _state(self, request: Request) -> _State:
        state = self._states.get(request.id)
        if state is None:
            everybody = self._all
            acceptance = Acceptance(everybody.first.value, everybody.later.value, MEMORY)
            state = self._states[request.id] = _State(acceptance)
        return state

    def _add(self, state: _State, num_drafts: int, num_accepted: int) -> None:
        state.acceptance.add(num_drafts, num_accepted)
        self._all.add(num_drafts, num_accepted)
