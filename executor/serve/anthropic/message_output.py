"""An answer as /v1/messages gives it: a message of content blocks, and the events that tell how they grow."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from executor.serve.blocks import Block, BlockAnswer, Change

Event = dict[str, Any]

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageWriter:
    """One message: `frame` has its id and model."""

    def __init__(self, frame: dict[str, Any], answer: BlockAnswer) -> None:
        self._frame = {**frame, "type": "message", "role": "assistant"}
        self._answer = answer

    @property
    def message(self) -> dict[str, Any]:
        content = [_content(block) for block in self._answer.blocks]
        return {**self._frame, "content": content, **self._stop(), "usage": self._usage()}

    def begin(self) -> Event:
        """The message before its first token."""
        usage = {**self._usage(), "output_tokens": 0}
        stop = {"stop_reason": None, "stop_sequence": None}
        return {"type": "message_start", "message": {**self._frame, "content": [], **stop, "usage": usage}}

    def write(self, changes: Iterable[Change]) -> list[Event]:
        """The events of a step."""
        return [event for change in changes for event in self._events_of(change)]

    def end(self) -> list[Event]:
        return [{"type": "message_delta", "delta": self._stop(), "usage": self._usage()}, {"type": "message_stop"}]

    def _events_of(self, change: Change) -> Iterator[Event]:
        place = {"index": change.block.index}
        if change.kind == "begun":
            yield {"type": "content_block_start", **place, "content_block": _empty(change.block)}
        elif change.kind == "more":
            yield {"type": "content_block_delta", **place, "delta": _delta(change.block, change.text)}
        else:
            yield {"type": "content_block_stop", **place}

    def _stop(self) -> dict[str, Any]:
        """An answer that called tools and ended by itself ended for them."""
        answer = self._answer
        reason = STOP_REASONS.get(answer.finish_reason or "", answer.finish_reason)
        sequence = answer.stop_reason if isinstance(answer.stop_reason, str) else None
        if sequence is not None:
            reason = "stop_sequence"
        elif reason == "end_turn" and answer.parser.num_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        answer = self._answer
        usage = usage_of_message(answer.num_prompt_tokens, answer.num_cached_tokens)
        return {**usage, "output_tokens": answer.num_output_tokens}


def usage_of_message(num_prompt: int, num_cached: int) -> dict[str, int]:
    """Here a prompt's tokens are counted apart: those that were read from the cache, and the others."""
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0,
    }


def _empty(block: Block) -> dict[str, Any]:
    if block.kind == "tool_call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _content(block: Block) -> dict[str, Any]:
    content = _empty(block)
    if block.kind == "tool_call":
        content["input"] = arguments_of(block.text)
    else:
        content["thinking" if block.kind == "reasoning" else "text"] = block.text
    return content


def arguments_of(text: str) -> Any:
    """A call's arguments. One that was cut is no JSON: its input is empty, as stop_reason max_tokens says why."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": text}
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "text_delta", "text": text}
