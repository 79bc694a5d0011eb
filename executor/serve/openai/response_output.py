"""An answer as /v1/responses gives it: a response object with output items, and the events that tell how they grow.

Invariant: the response of the last event is the one that an unstreamed request gets, and each item of it is the one
of its output_item.done.
"""

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from executor.serve.asks import TokenInfo
from executor.serve.blocks import Block, BlockAnswer, Change
from executor.serve.openai.logprobs import BytesOf, answer_logprobs

Event = dict[str, Any]

PREFIXES = {"content": "msg", "reasoning": "rs", "tool_call": "fc"}


class ResponseWriter:
    """One response: `frame` holds its fields without status, output, usage."""

    def __init__(self, frame: dict[str, Any], answer: BlockAnswer, bytes_of: BytesOf) -> None:
        self._frame = frame
        self._answer = answer
        self._bytes_of = bytes_of
        self._ids: list[str] = []  # of the items
        self._num_events = 0

    @property
    def response(self) -> dict[str, Any]:
        """As it stands: in progress until the answer has ended."""
        answer = self._answer
        is_cut = answer.finish_reason == "length"
        status = "in_progress" if answer.finish_reason is None else "incomplete" if is_cut else "completed"
        return {
            **self._frame,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(block, self._status_of(block)) for block in answer.blocks],
            "usage": None if answer.finish_reason is None else usage_of_response(answer),
        }

    def begin(self) -> list[Event]:
        empty = {**self._frame, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        return [self._event(f"response.{name}", response=empty) for name in ("created", "in_progress")]

    def write(self, changes: Iterable[Change]) -> list[Event]:
        """The events of a step."""
        events = []
        for change in changes:
            write = {"begun": self._begun, "more": self._more, "ended": self._ended}[change.kind]
            events += write(change)
        return events

    def end(self) -> list[Event]:
        response = self.response
        return [self._event(f"response.{response['status']}", response=response)]

    def error(self, message: str, code: str | None, param: str | None) -> Event:
        """An error after the first event. The SDK reads `error` and raises; others read the protocol's own fields."""
        return self._event("error", message=message, code=code, param=param, error={"message": message, "code": code})

    def _begun(self, change: Change) -> Iterator[Event]:
        block = change.block
        yield self._event("response.output_item.added", output_index=block.index, item=self._item(block, "in_progress"))
        if block.kind != "tool_call":
            yield self._event("response.content_part.added", **self._place(block), part=self._part(block, is_open=True))

    def _more(self, change: Change) -> Iterator[Event]:
        block = change.block
        if block.kind == "tool_call":
            place = {"item_id": self._id(block), "output_index": block.index}
            yield self._event("response.function_call_arguments.delta", **place, delta=change.text)
        elif block.kind == "reasoning":
            yield self._event("response.reasoning_text.delta", **self._place(block), delta=change.text)
        else:
            logprobs = self._logprobs(change.logprobs)
            yield self._event("response.output_text.delta", **self._place(block), delta=change.text, logprobs=logprobs)

    def _ended(self, change: Change) -> Iterator[Event]:
        block = change.block
        item = self._item(block, self._status_of(block))
        if block.kind == "tool_call":
            place = {"item_id": self._id(block), "output_index": block.index}
            done = {"name": block.name, "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **done)
        else:
            part = item["content"][0]
            if block.kind == "reasoning":
                yield self._event("response.reasoning_text.done", **self._place(block), text=block.text)
            else:
                yield self._event(
                    "response.output_text.done", **self._place(block), text=block.text, logprobs=part["logprobs"]
                )
            yield self._event("response.content_part.done", **self._place(block), part=part)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item = {"id": self._id(block), "status": status}
        is_open = status == "in_progress"
        if block.kind == "tool_call":
            arguments = "" if is_open else block.text
            return {
                **item, "type": "function_call", "call_id": block.call_id, "name": block.name, "arguments": arguments
            }  # fmt: skip
        content = [] if is_open else [self._part(block)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block, *, is_open: bool = False) -> dict[str, Any]:
        text = "" if is_open else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if is_open else self._logprobs(block.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _status_of(self, block: Block) -> str:
        """Only the last item can have been cut."""
        is_last = block is self._answer.blocks[-1]
        return "incomplete" if is_last and self._answer.finish_reason == "length" else "completed"

    def _logprobs(self, infos: Iterable[TokenInfo]) -> list[dict[str, Any]]:
        return answer_logprobs(infos, self._bytes_of)["content"]

    def _place(self, block: Block) -> dict[str, Any]:
        return {"item_id": self._id(block), "output_index": block.index, "content_index": 0}

    def _id(self, block: Block) -> str:
        if block.index == len(self._ids):
            self._ids.append(f"{PREFIXES[block.kind]}_{uuid.uuid4().hex}")
        return self._ids[block.index]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}


def usage_of_response(answer: BlockAnswer) -> dict[str, Any]:
    return {
        "input_tokens": answer.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
        "total_tokens": answer.num_prompt_tokens + answer.num_output_tokens,
    }
