"""What a step's rows have yielded, out of the tokens that were chosen for them.

With drafts a row has a choice at every place; what is kept is what would have been chosen without them.
Knows no model and no device.
"""

from dataclasses import dataclass, field

from executor.engine.logprobs import TokenLogprobs
from executor.engine.sampler import Sampled
from executor.engine.speculation.verify import num_right
from executor.schedule.plan import Plan


@dataclass(frozen=True)
class StepResult:
    """What a plan's rows have yielded: tokens, in the rows' order.

    `logprobs`: row -> those of its tokens, where they were asked for. `prompt_logprobs`: row -> those of the prompt
    tokens that it scores. `failures`: row -> why its request cannot go on; such a row has no tokens. `missing`: digests
    of media that could not be encoded.
    """

    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    missing: frozenset[bytes] = frozenset()
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    void: frozenset[int] = frozenset()  # rows that are to be computed again, as if they had not been in the plan
    is_repeated: bool = False  # what was launched behind the step has read tokens that do not count


def without_void(plan: Plan, result: StepResult) -> tuple[Plan, StepResult]:
    """Both without the rows that are to be computed again."""
    if not result.void:
        return plan, result
    kept = [number for number in range(len(plan.rows)) if number not in result.void]
    logprobs, failures = (
        {place: by_row[number] for place, number in enumerate(kept) if number in by_row}
        for by_row in (result.logprobs, result.failures)
    )
    return plan.without(result.void), StepResult([result.token_ids[number] for number in kept], logprobs, failures)


def result_of(
    plan: Plan, yielding: list[int], sampled: Sampled, prompt_logprobs: dict[int, list[TokenLogprobs]]
) -> StepResult:
    """Of a step without drafts: `sampled` has a token for each of the rows whose numbers are `yielding`."""
    token_ids: list[list[int]] = [[] for _ in plan.rows]
    for number, token_id in zip(yielding, sampled.token_ids, strict=True):
        token_ids[number].append(token_id)
    failures = {yielding[place]: reason for place, reason in sampled.failures.items()}
    for number in failures:
        token_ids[number].clear()
    logprobs = {}
    if sampled.has_logprobs:
        pairs = zip(yielding, sampled.logprobs, strict=True)
        logprobs = {number: [each] for number, each in pairs if each is not None and number not in failures}
    return StepResult(token_ids, logprobs, failures, prompt_logprobs=prompt_logprobs)


def verified(
    plan: Plan, sampled: Sampled, prompt_logprobs: dict[int, list[TokenLogprobs]]
) -> tuple[StepResult, list[list[int]]]:
    """Of rows with drafts: the model's choice at every place, kept up to the first that the draft did not foresee.

    The noise of a place is its own, so what is chosen there is what would have been without drafts.
    `sampled`: of each row that yields, a token behind its last one and behind each of its drafts. Gives these by row as
    well.
    """
    token_ids: list[list[int]] = []
    chosen: list[list[int]] = []
    result, at = StepResult(token_ids, prompt_logprobs=prompt_logprobs), 0
    for number, row in enumerate(plan.rows):
        count = len(row.draft_ids) + 1 if row.max_yield else 0
        found = sampled.token_ids[at : at + count]
        chosen.append(found)
        num_kept = num_right(row.draft_ids, found) + 1 if count else 0
        if sampled.failures:
            failed = next((place for place in range(num_kept) if at + place in sampled.failures), num_kept)
            if failed == 0 and count:
                result.failures[number] = sampled.failures[at]
            num_kept = failed  # behind a token that was found the next step meets the fault again
        token_ids.append(found[:num_kept])
        if num_kept and sampled.logprobs[at] is not None:
            result.logprobs[number] = sampled.logprobs[at : at + num_kept]
        at += count
    return result, chosen
