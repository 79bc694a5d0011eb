"""One run: requests handed to an engine at once, and the times at which their answers came.

A request is sent when it is handed in; reading its media and making its prompt count to its first token, as they do for
a user. Times are taken where a token's text is there. Knows no files, no recipe, and nothing of what is repeated.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from executor.bench.results import RequestResult
from executor.engine.handle import Event, Handle
from executor.engine.loop import EngineLoop
from executor.engine.outputs import Output
from executor.engine.prepare import Lane
from executor.errors import UserError
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)

WAIT_S = 0.05  # for a prompt to be prepared


@dataclass(frozen=True)
class Question:
    """A request to be made: `make` gives its prompt and parameters, in one of the threads that prepare `lane`."""

    make: Callable[[], Any]
    lane: Lane


class _Answer:
    """What a request tells of itself, with the time of each word."""

    def __init__(self, sent_s: float, since_s: float) -> None:
        self.sent_s, self.ended_s, self._since_s = sent_s, sent_s, since_s
        self.token_times_s: list[float] = []
        self.handle: Handle | None = None

    def __call__(self, event: Event) -> None:
        now_s = time.perf_counter() - self._since_s
        if not isinstance(event, Output):
            self.ended_s = now_s
        else:  # the tokens of a step come together
            self.token_times_s += [now_s] * len(event.token_ids)

    @property
    def is_cut(self) -> bool:
        """Whether it ended before the tokens that were asked for, though no end token ends it."""
        params, completion = self.handle.params, self.handle.completion
        whole = completion is None or completion.error is not None
        return not whole and params.ignore_eos and completion.completion_tokens < params.max_new_tokens

    def result(self) -> RequestResult:
        """Raises what is no fault of the request: a defect of ours."""
        failure, completion = self.handle.failure, self.handle.completion
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        times = {"sent_s": self.sent_s, "ended_s": self.ended_s, "token_times_s": tuple(self.token_times_s)}
        if completion is None:
            return RequestResult(**times, error=str(failure))
        return RequestResult(
            **times,
            prompt_tokens=completion.prompt_tokens,
            vision_tokens=completion.vision_tokens,
            output_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
            error=completion.error,
        )


def drive(loop: EngineLoop, questions: Sequence[Question], params: SamplingParams) -> list[RequestResult]:
    """Submit all questions at once, and turn the loop until all have ended. `params` are for those that make none.

    Results are in the order of the questions, times in seconds since the call.
    """
    since_s = time.perf_counter()
    answers = []
    for question in questions:
        answer = _Answer(time.perf_counter() - since_s, since_s)
        answer.handle = loop.submit(question.make, params, lane=question.lane, on_event=answer)
        answers.append(answer)
    while loop.num_unfinished:
        loop.turn(WAIT_S)
    num_cut = sum(answer.is_cut for answer in answers)
    if num_cut:
        logger.warning(
            "%d of %d answers ended before max_new_tokens: at max_model_len (scheduler_config), at the last block of "
            "the KV cache, or at a stop text", num_cut, len(answers),
        )  # fmt: skip
    return [answer.result() for answer in answers]
