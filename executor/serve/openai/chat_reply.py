"""Chat answers as clients read them: whole, and as the chunks of a stream.

Invariant: the deltas of a stream joined are the message of the whole answer. The role goes out with the first text,
finish_reason with the last token, and nothing without content in between: clients take each chunk for a step.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from executor.serve.answers import Answer, Answers
from executor.serve.asks import Delta, Done, Failure, TokenInfo
from executor.serve.errors import of_answer, of_failure
from executor.serve.feed import Feed
from executor.serve.jsontext import dumps
from executor.serve.openai.logprobs import BytesOf, answer_logprobs, prompt_logprobs
from executor.serve.parser import AnswerParser, Piece
from executor.serve.streams import DONE

quoted: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class ReplyStyle:
    """What a request wishes to see of its answer."""

    n: int
    new_parser: Callable[[], AnswerParser]
    bytes_of: BytesOf
    has_logprobs: bool = False
    has_reasoning: bool = True
    includes_usage: bool = False  # at a stream's end
    counts_on: bool = False  # usage so far on every chunk


def usage_of(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def reason_of(finish_reason: str | None, parser: AnswerParser) -> str | None:
    """An answer that ended by itself after calling tools ended for them."""
    return "tool_calls" if finish_reason == "stop" and parser.num_calls else finish_reason


def whole_reply(frame: dict[str, Any], answers: Answers, style: ReplyStyle) -> dict[str, Any]:
    """frame: id, created, model."""
    return {
        **frame,
        "object": "chat.completion",
        "choices": [_choice(index, answer, style) for index, answer in enumerate(answers.answers)],
        "usage": usage_of(answers.num_prompt_tokens, answers.num_output_tokens, answers.num_cached_tokens),
        "prompt_logprobs": prompt_logprobs(answers.prompt_logprobs, style.bytes_of),
        "service_tier": None,
        "system_fingerprint": None,
    }


def _choice(index: int, answer: Answer, style: ReplyStyle) -> dict[str, Any]:
    parser = style.new_parser()
    pieces = [*parser.push(answer.text), *parser.finish()]
    return {
        "index": index,
        "message": _message(pieces, style),
        "logprobs": answer_logprobs(answer.logprobs, style.bytes_of) if style.has_logprobs else None,
        "finish_reason": reason_of(answer.finish_reason, parser),
        "stop_reason": answer.stop_reason,
    }


def _message(pieces: Iterable[Piece], style: ReplyStyle) -> dict[str, Any]:
    """Content is null beside calls where nothing else was said."""
    texts = {"content": "", "reasoning": ""}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.kind == "tool_call":
            _add_call(calls, piece)
        else:
            texts[piece.kind] += piece.text
    content = None if calls and not texts["content"] else texts["content"]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if texts["reasoning"] and style.has_reasoning:
        message["reasoning_content"] = texts["reasoning"]
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def _add_call(calls: dict[int, dict[str, Any]], piece: Piece) -> None:
    if piece.call_index not in calls:
        function = {"name": piece.name, "arguments": ""}
        calls[piece.call_index] = {"id": piece.call_id, "type": "function", "function": function}
    calls[piece.call_index]["function"]["arguments"] += piece.text


FIRST_DELTA = '{"role":"assistant","content":""}'
"""Of a first token whose text is not certain yet, or that has none."""


@dataclass
class _Stream:
    """One of the answers while it is written."""

    head: str  # of each chunk, to the delta
    parser: AnswerParser
    begun: bool = False
    held: list[TokenInfo] = field(default_factory=list)  # logprobs of tokens whose text is not certain yet


class ChunkWriter:
    """Writes the events of one streamed request. What is the same in every chunk is written once."""

    def __init__(self, frame: dict[str, Any], style: ReplyStyle) -> None:
        frame = {**frame, "object": "chat.completion.chunk"}
        self._frame = frame
        self._style = style
        head = f'data: {dumps(frame)[:-1]},"choices":[{{"index":'
        self._streams = [_Stream(f'{head}{index},"delta":', style.new_parser()) for index in range(style.n)]
        self._num_output = 0
        self._last: Delta | None = None

    def write(self, delta: Delta) -> str | None:
        """The event of a step; None where nothing is to be told yet. Raises ApiError for an answer that failed."""
        if delta.error is not None:
            raise of_answer(delta)
        stream, style = self._streams[delta.index], self._style
        self._last = delta
        self._num_output += len(delta.token_ids)
        pieces = stream.parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces += stream.parser.finish()
        if style.has_logprobs:
            stream.held += delta.logprobs
        if not style.has_reasoning:
            pieces = [piece for piece in pieces if piece.kind != "reasoning"]
        if not pieces and delta.finish_reason is None:
            if stream.begun or delta.text:
                return None
            stream.begun = True  # benchmarks take the first chunk's time for the first token's
            return f'{stream.head}{FIRST_DELTA},"logprobs":null,"finish_reason":null}}]{self._usage_now()}}}\n\n'
        body = _delta(pieces, is_first=not stream.begun, is_last=delta.finish_reason is not None)
        stream.begun = True
        logprobs = "null"
        if style.has_logprobs:
            logprobs = dumps(answer_logprobs(stream.held, style.bytes_of))
            stream.held = []
        end = "null"
        if delta.finish_reason is not None:
            reason = reason_of(delta.finish_reason, stream.parser)
            end = f'{quoted(reason)},"stop_reason":{dumps(delta.stop_reason)}'
        return f'{stream.head}{body},"logprobs":{logprobs},"finish_reason":{end}}}]{self._usage_now()}}}\n\n'

    def end(self) -> str:
        """What follows the last chunk."""
        if not (self._style.includes_usage or self._style.counts_on):
            return DONE
        return f"data: {dumps({**self._frame, 'choices': [], 'usage': self._usage()})}\n\n{DONE}"

    def _usage_now(self) -> str:
        """Beside a chunk's choices, where it is asked for on all of them."""
        return f',"usage":{dumps(self._usage())}' if self._style.counts_on else ""

    def _usage(self) -> dict[str, Any]:
        last = self._last
        return usage_of(last.num_prompt_tokens, self._num_output, last.num_cached_tokens) if last else usage_of(0, 0, 0)


def _delta(pieces: list[Piece], *, is_first: bool, is_last: bool) -> str:
    """JSON text of a chunk's delta."""
    role = '"role":"assistant",' if is_first else ""
    if len(pieces) == 1 and pieces[0].kind == "content":
        return f'{{{role}"content":{quoted(pieces[0].text)}}}'
    tree: dict[str, Any] = {"role": "assistant"} if is_first else {}
    calls: dict[int, dict[str, Any]] = {}  # a chunk has each call once: clients join lists by their places
    for piece in pieces:
        if piece.kind == "tool_call":
            _add_call_delta(calls, piece)
        else:
            name = "content" if piece.kind == "content" else "reasoning_content"
            tree[name] = tree.get(name, "") + piece.text
    if calls:
        tree["tool_calls"] = list(calls.values())
    if is_first and "reasoning_content" not in tree:
        tree.setdefault("content", None if calls else "")
    elif not pieces and is_last:
        tree["content"] = ""
    return dumps(tree)


def _add_call_delta(calls: dict[int, dict[str, Any]], piece: Piece) -> None:
    """The first delta of a call has its id, type and name; later ones more of its arguments."""
    if piece.call_index not in calls:
        start = {"id": piece.call_id, "type": "function"} if piece.name is not None else {}
        name = {"name": piece.name} if piece.name is not None else {}
        calls[piece.call_index] = {"index": piece.call_index, **start, "function": {**name, "arguments": ""}}
    calls[piece.call_index]["function"]["arguments"] += piece.text


async def chunks(feed: Feed, frame: dict[str, Any], style: ReplyStyle) -> AsyncIterator[str]:
    """Events of a streamed request. Raises ApiError where it is not answered to its end."""
    writer = ChunkWriter(frame, style)
    async for item in feed:
        if isinstance(item, Delta):
            if (line := writer.write(item)) is not None:
                yield line
        elif isinstance(item, Failure):
            raise of_failure(item)
        elif isinstance(item, Done):
            break
    yield writer.end()
