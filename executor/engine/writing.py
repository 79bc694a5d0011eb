"""An answer while it is being written: its pieces, a step's tokens each, and the text of a piece when it is asked for.

Text that cannot end its answer need not be known before the next step begins: a piece's text is made by whoever reads
the piece, maybe in another thread. The pieces of an answer are read once each, in their order, by one thread at a time.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from executor.engine.detokenize import Detokenizer
from executor.engine.outputs import Output
from executor.engine.runner import FAULTS, describe
from executor.schedule.request import FinishReason, Request


@dataclass(eq=False)
class Answer:
    """One of a request's `n` answers."""

    parent_id: str
    index: int
    request: Request
    detokenizer: Detokenizer
    pieces: deque["Piece"]  # of whoever asked
    unreadable: deque["Answer"]  # the engine's: unfinished answers whose text has failed
    is_begun: bool = False  # the prompt's logprobs were told with its first token
    fault: str | None = None  # why its tokens cannot be read as text

    def __post_init__(self) -> None:
        params = self.request.params
        # Whether its pieces are no more than their tokens, as long as it goes on.
        self.is_plain = not params.stop and params.logprobs is None and params.prompt_logprobs is None
        self.is_plain = self.is_plain and self.request.matcher is None

    def read(self, token_ids: tuple[int, ...], is_last: bool) -> str:
        """The text that is certain with these tokens; none any more once some could not be read."""
        if self.fault is not None:
            return ""
        try:
            text = self.detokenizer.push(token_ids)
            return text + self.detokenizer.finish() if is_last else text
        except FAULTS as error:
            self.fault = unreadable(error)
            if not is_last:
                self.unreadable.append(self)
            return ""


class Piece(NamedTuple):
    """What one step added to an answer."""

    answer: Answer
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[Any, ...] = ()
    prompt_logprobs: tuple[Any, ...] | None = None
    text: str | None = None  # None: that of the tokens; known already where it could end the answer
    num_silent: int = 0  # tokens at the end that have no text: the one that has ended the answer

    def written(self) -> Output:
        answer, text, reason = self.answer, self.text, self.finish_reason
        request = answer.request
        if text is None:
            text = answer.read(self.token_ids[: len(self.token_ids) - self.num_silent], reason is not None)
            if answer.fault is not None and reason is not None:  # the engine has let go of it
                reason = request.finish_reason = FinishReason.ERROR
                request.error = answer.fault
        return Output(
            answer.parent_id, answer.index, text, self.token_ids, reason, request, self.logprobs, self.prompt_logprobs
        )


def unreadable(error: Exception) -> str:
    return f"its tokens cannot be read as text: {describe(error)}"
