"""An answer's text taken apart while it is written: what is said, what is thought, which tools are called.

Invariant: the pieces of kind "content" joined are the text without marks; nothing is given out twice or held longer
than a mark may still come.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, or more of one. The first piece of a call has its `call_id` and `name`."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str  # of a call: more of its arguments' JSON text
    call_index: int = 0
    call_id: str | None = None
    name: str | None = None


class AnswerParser:
    """One answer's. `push` takes its text as it comes, `finish` gives what was held back."""

    def __init__(
        self, *, takes_tools: bool = False, thinks: bool = False, tool_names: Collection[str] | None = None
    ) -> None:
        """`takes_tools`: calls are looked for. `thinks`: the answer begins inside its reasoning.

        `tool_names`: a call of another name is given as content; None takes any name.
        """

    @property
    def num_calls(self) -> int:
        """How many calls have begun: with one or more, a finish_reason `stop` is told as `tool_calls`."""
        return 0

    def push(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece]:
        return []
