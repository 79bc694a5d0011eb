"""A streamed chat completion as it comes: when its pieces came, how many tokens it has, whether it is whole.

A piece is a chunk that brings something of the answer (text, reasoning, a tool call): the first one is the time to the
first token, as `vllm bench serve` has it, whose chunks of the role alone come with it. A piece may hold several tokens;
how many there were in all, the server says in `usage`. Knows nothing of HTTP.
"""

import json
from collections.abc import Mapping
from typing import Any

from executor.errors import shortened

KEPT_BYTES = 80  # of what is no stream of chunks, for people
PIECES = ("content", "reasoning_content", "reasoning", "tool_calls")


class ChatStream:
    """Server-sent events, fed byte by byte or all at once. Times are handed in."""

    def __init__(self) -> None:
        self.piece_times_s: list[float] = []
        self.ended_s = 0.0  # when the last chunk of the answer came
        self.prompt_tokens = self.output_tokens = self.cached_tokens = 0
        self.has_usage = self.is_finished = self.has_events = False
        self.error: str | None = None
        self._rest = self._begin = b""

    def feed(self, data: bytes, now_s: float) -> None:
        """What came at `now_s`."""
        self._begin = self._begin or data[:KEPT_BYTES]
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)

    def fault(self) -> str | None:
        """Why this is no whole answer, once nothing more comes; None for one that is."""
        if self._rest.startswith(b"data:"):  # a last line without its end
            self.feed(b"\n", self.ended_s)
        if self.error is not None:
            return self.error
        if not self.has_events and self._begin:
            return f"the answer is no stream of events: {shortened(self._begin.decode(errors='replace'))}"
        if not self.is_finished:
            return "the stream ended before the answer did"
        if not self.piece_times_s:
            return "the answer has nothing in it"
        return None

    def _event(self, content: bytes, now_s: float) -> None:
        self.has_events = True
        if content == b"[DONE]":
            self.is_finished = True
            return
        try:
            self._chunk(json.loads(content), now_s)
        except (ValueError, TypeError, AttributeError, RecursionError):
            words = shortened(content[:KEPT_BYTES].decode(errors="replace"))
            self.error = f"the stream holds an event that is no chunk of a chat: {words}"

    def _chunk(self, chunk: Mapping[str, Any], now_s: float) -> None:
        """Raises TypeError or AttributeError for something of another form."""
        told = chunk.get("error")
        if told:
            words = (told.get("message") or told) if isinstance(told, dict) else told
            self.error = f"in the stream: {shortened(str(words))}"
        for choice in chunk.get("choices") or ():
            self._choice(choice, now_s)
        usage = chunk.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens")
            self.prompt_tokens, self.output_tokens, self.cached_tokens = map(_count, counts)
            self.has_usage = True

    def _choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        delta = choice.get("delta") or {}
        ends = choice.get("finish_reason") is not None
        # A chunk of empty text that neither begins nor ends is a token whose letters are not whole yet.
        is_held_back = delta.get("content") == "" and not ends and "role" not in delta
        if any(delta.get(name) for name in PIECES) or is_held_back or (ends and not self.piece_times_s):
            self.piece_times_s.append(now_s)
        self.is_finished = self.is_finished or ends
        self.ended_s = now_s


def _count(value: Any) -> int:
    """A number of tokens; 0 where none is told. TypeError for what is none."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no number of tokens")
    return value
