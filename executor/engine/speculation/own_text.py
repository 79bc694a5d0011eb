"""Drafts out of a request's own text, its prompt and its answer: what all that make such drafts have in common.

What is known of a text is made when its request is drafted for the first time, grows with the answer, and goes with the
request. Placeholders of pictures and videos are no text.
Knows requests and rows only.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from executor.engine.speculation.speculator import Proposer
from executor.schedule.plan import Plan
from executor.schedule.request import Prompt, Request

PLACEHOLDER = -1  # stands for a placeholder's token


class KnownText(Protocol):
    """A request's tokens, and where to look for what may come next."""

    def extend(self, output: Sequence[int]) -> None:
        """`output`: the whole answer as far as it is; what is new of it comes behind the rest."""

    def following(self, count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may come next."""


class OwnTextProposer(Proposer):
    """Asks of each request what is known of its text."""

    def __init__(self) -> None:
        self._texts: dict[str, KnownText] = {}

    @abstractmethod
    def _known(self, prompt: list[int]) -> KnownText:
        """Of a prompt's tokens, PLACEHOLDER among them."""

    def propose(self, plan: Plan, wanted: Sequence[int]) -> list[tuple[int, ...]]:
        return [self._draft(row.request, count) if count else () for row, count in zip(plan.rows, wanted, strict=True)]

    def forget(self, request: Request) -> None:
        self._texts.pop(request.id, None)

    def _draft(self, request: Request, count: int) -> tuple[int, ...]:
        text = self._texts.get(request.id)
        if text is None:
            text = self._texts[request.id] = self._known(text_of(request.prompt))
        text.extend(request.output_token_ids)
        return text.following(count)


def text_of(prompt: Prompt) -> list[int]:
    """The prompt's tokens, PLACEHOLDER where an embedding stands instead of one."""
    token_ids = list(prompt.token_ids)
    for span in prompt.spans:
        token_ids[span.start : span.start + span.num_tokens] = [PLACEHOLDER] * span.num_tokens
    return token_ids


def copied(tokens: list[int], place: int, count: int) -> tuple[int, ...]:
    """`count` tokens as they follow from a place on, none behind a placeholder. At the text's end they begin again with
    the first of them: a text that repeats itself goes on so."""
    found = tokens[place : place + count]
    found = (found * -(-count // len(found)))[:count]
    return tuple(found[: found.index(PLACEHOLDER)] if PLACEHOLDER in found else found)
