"""An answer's text taken apart while it is written: what is said, what is thought, which tools are called.

Calls stand in Qwen's form, that of Hermes: `<tool_call>`, a JSON object of name and arguments, `</tool_call>`; thoughts
end with `</think>`. Line breaks next to those marks belong to them, as Qwen's templates write them.
Invariants: the pieces joined do not depend on how the text was cut; nothing is lost, nothing is given out twice or held
longer than a mark may still come. What looks like a call and is none (no JSON, another tool) is content, as it stands.
A call has begun once its name is known and its arguments open: from there on they are given as the model writes them,
whole or cut off.
"""

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from executor.schedule.request import CALL_BEGIN, CALL_END, THINK_BEGIN, THINK_END

_OPENING = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\n]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_CLOSING = re.compile(r"\s*\}?\s*")


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
        self._takes_tools = takes_tools
        self._tool_names = tool_names
        self._num_calls = 0
        self._held = ""  # text that is not taken apart yet
        self._breaks = ""  # line breaks that may belong to a mark
        self._has_begun = False  # of the part that is written: something of it was given out
        self._follows_mark = False  # content: a mark stands before it
        self._object = _ObjectScanner()
        self._quotes = _QuoteScanner()
        self._state: Callable[[bool], list[Piece] | None] = self._content
        if thinks:
            self._state = self._reasoning_begin
        self._is_plain = not takes_tools and not thinks

    @property
    def num_calls(self) -> int:
        """How many calls have begun: with one or more, a finish_reason `stop` is told as `tool_calls`."""
        return self._num_calls

    def push(self, text: str) -> list[Piece]:
        if self._is_plain:
            return [Piece("content", text)] if text else []
        self._held += text
        return self._advance(is_last=False)

    def finish(self) -> list[Piece]:
        """The answer is over, or cut off."""
        return [] if self._is_plain else self._advance(is_last=True)

    def _advance(self, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while (found := self._state(is_last)) is not None:
            pieces += found
        return _joined(pieces)

    # Each state takes from `_held` what it can, and gives the pieces; None when it needs more text.

    def _reasoning_begin(self, is_last: bool) -> list[Piece] | None:
        """Some templates leave it to the model to open its reasoning."""
        rest = self._held.lstrip("\n")
        if not is_last and THINK_BEGIN.startswith(rest) and rest != THINK_BEGIN:
            return None
        self._held = rest.removeprefix(THINK_BEGIN)
        return self._enter(self._reasoning)

    def _reasoning(self, is_last: bool) -> list[Piece] | None:
        said, is_over = self._until(THINK_END, is_last)
        pieces = self._said("reasoning", said, holds_breaks=is_over or not is_last)
        if not is_over:
            return pieces
        self._follows_mark = True
        return (pieces or []) + self._enter(self._content)

    def _content(self, is_last: bool) -> list[Piece] | None:
        if not self._takes_tools:
            said, self._held = self._held, ""
            return self._said("content", said, holds_breaks=False)
        said, is_over = self._until(CALL_BEGIN, is_last)
        pieces = self._said("content", said, holds_breaks=is_over or not is_last)
        if not is_over:
            return pieces
        self._quotes = _QuoteScanner()
        self._state = self._call
        return pieces or []

    def _call(self, is_last: bool) -> list[Piece] | None:
        """Behind `<tool_call>`, before it is known whether it is one."""
        opening = _OPENING.match(self._held)
        if opening is not None:
            name = _loaded(opening[1])
            if not isinstance(name, str) or not self._is_known(name):
                return self._no_call("")
            self._held = self._held[opening.end() :]
            self._object = _ObjectScanner()
            self._enter(self._arguments)
            self._num_calls += 1
            return [Piece("tool_call", "", self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)]
        begun = self._held.lstrip()
        if begun and begun[0] != "{":
            return self._no_call("")
        end = self._quotes.find(self._held, CALL_END)
        if end is None:
            return self._no_call(self._held) if is_last else None
        call = _loaded(self._held[:end])
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str) or not self._is_known(name):
            return self._no_call(self._held[: end + len(CALL_END)])
        arguments = _arguments_text(call.get("arguments"))
        if arguments is None:
            return self._no_call(self._held[: end + len(CALL_END)])
        self._held = self._held[end + len(CALL_END) :]
        self._end_call()
        self._num_calls += 1
        return [Piece("tool_call", arguments, self._num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)]

    def _arguments(self, is_last: bool) -> list[Piece] | None:
        if not self._held:
            return None
        length = self._object.take(self._held)
        text, self._held = self._held[:length], self._held[length:]
        if self._object.is_over:
            self._state = self._call_end
        return [Piece("tool_call", text, self._num_calls - 1)]

    def _call_end(self, is_last: bool) -> list[Piece] | None:
        """Behind the arguments: the object's end and the mark, as far as they are there. Then it is content again."""
        rest = self._held[_CLOSING.match(self._held).end() :]
        if CALL_END.startswith(rest) and rest != CALL_END and not is_last:
            return None
        is_cut = is_last and CALL_END.startswith(rest)
        self._held = "" if is_cut else rest.removeprefix(CALL_END)
        return self._end_call()

    # What the states share

    def _enter(self, state: Callable[[bool], list[Piece] | None]) -> list[Piece]:
        self._state = state
        self._has_begun, self._breaks = False, ""
        return []

    def _end_call(self) -> list[Piece]:
        self._follows_mark = True
        return self._enter(self._content)

    def _is_known(self, name: str) -> bool:
        return self._tool_names is None or name in self._tool_names

    def _no_call(self, text: str) -> list[Piece]:
        """What was taken for a call is content: the mark, and `text` behind it. The rest is looked at as content."""
        self._held = self._held[len(text) :]
        self._state = self._content
        pieces = [Piece("content", self._breaks + CALL_BEGIN + text)]
        self._breaks, self._has_begun = "", True
        return pieces

    def _until(self, mark: str, is_last: bool) -> tuple[str, bool]:
        """Text that is certain to stand before the next `mark`, and whether that was found."""
        place = self._held.find(mark)
        if place >= 0:
            said, self._held = self._held[:place], self._held[place + len(mark) :]
            return said, True
        keep = 0 if is_last else _overlap(self._held, mark)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return said, False

    def _said(self, kind: Literal["content", "reasoning"], text: str, *, holds_breaks: bool) -> list[Piece] | None:
        """More of a part; line breaks at its end may wait for a mark, those at its beginning behind a mark go."""
        text = self._breaks + text
        if not self._has_begun and (kind == "reasoning" or self._follows_mark):
            text = text.lstrip("\n")
        kept = text.rstrip("\n") if holds_breaks else text
        self._breaks = text[len(kept) :]
        if not kept:
            return None
        self._has_begun = True
        return [Piece(kind, kept)]


class _ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._is_text = self._is_escaped = False

    def take(self, text: str) -> int:
        """How much of `text` belongs to the object."""
        for place, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_text:
                self._is_escaped = character == "\\"
                self._is_text = character != '"'
            elif character == '"':
                self._is_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.is_over = True
                    return place + 1
        return len(text)


class _QuoteScanner:
    """Finds a mark outside of JSON's strings in a text that grows; a line break ends a string that is none."""

    def __init__(self) -> None:
        self._place = 0
        self._is_text = self._is_escaped = False

    def find(self, text: str, mark: str) -> int | None:
        while self._place < len(text):
            character = text[self._place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_text:
                self._is_escaped = character == "\\"
                self._is_text = character not in '"\n'
            elif character == '"':
                self._is_text = True
            elif character == mark[0]:
                if text.startswith(mark, self._place):
                    return self._place
                if mark.startswith(text[self._place :]):
                    return None  # the rest of it may come
            self._place += 1
        return None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


def _loaded(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments_text(value: Any) -> str | None:
    """Arguments of a call that was read as a whole; None where they are no object. Some models quote them."""
    if isinstance(value, str):
        return value if isinstance(_loaded(value), dict) else None
    if value is None:
        return "{}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one; a call's first piece takes the text behind it."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is not None and last.kind == piece.kind and last.call_index == piece.call_index and piece.name is None:
            joined[-1] = Piece(last.kind, last.text + piece.text, last.call_index, last.call_id, last.name)
        elif piece.text or piece.name is not None:
            joined.append(piece)
    return joined
