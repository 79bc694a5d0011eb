"""Chunks and whole replies of one answer: what is held back, calls, reasoning, several answers, faults."""

import json
from typing import Any

import pytest

from executor.serve.answers import Answer, Answers
from executor.serve.asks import Delta, TokenInfo
from executor.serve.errors import ApiError
from executor.serve.openai.chat_reply import ChunkWriter, ReplyStyle, whole_reply
from executor.serve.openai.logprobs import prompt_logprobs, token_text
from executor.serve.parser import AnswerParser, Piece

FRAME = {"id": "chatcmpl-1", "created": 1, "model": 'a "model"'}
BYTES = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"\xff"}

SCRIPT = {  # what a text of the answer means
    "t": [Piece("reasoning", "think")],
    "c": [Piece("content", "Look:")],
    "b": [Piece("reasoning", "!"), Piece("content", "So")],
    "1": [Piece("tool_call", "", 0, "call_a", "get")],
    "2": [Piece("tool_call", '{"x"', 0)],
    "3": [Piece("tool_call", ":1}", 0), Piece("tool_call", "", 1, "call_b", "put")],
    "4": [Piece("tool_call", "{", 1), Piece("tool_call", "}", 1)],
    ".": [],
}


class ScriptedParser(AnswerParser):
    """Gives SCRIPT's pieces for each character."""

    def __init__(self) -> None:
        self.calls: set[int] = set()

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    def push(self, text: str) -> list[Piece]:
        pieces = [piece for character in text for piece in SCRIPT[character]]
        self.calls |= {piece.call_index for piece in pieces if piece.kind == "tool_call"}
        return pieces

    def finish(self) -> list[Piece]:
        return []


def style_of(n: int = 1, parser: type[AnswerParser] = AnswerParser, **fields: Any) -> ReplyStyle:
    return ReplyStyle(n, parser, BYTES.__getitem__, **fields)


def delta_of(text: str, finish: str | None = None, index: int = 0, **fields: Any) -> Delta:
    return Delta(index, text, fields.pop("token_ids", (1,)), 7, 3, finish_reason=finish, **fields)


def written(deltas: list[Delta], style: ReplyStyle) -> list[dict[str, Any]]:
    writer = ChunkWriter(FRAME, style)
    lines = [line for delta in deltas if (line := writer.write(delta)) is not None]
    lines += [f"{line}\n\n" for line in writer.end().split("\n\n")[:-1]]
    assert lines.pop() == "data: [DONE]\n\n"
    assert all(line.startswith("data: {") and line.endswith("}\n\n") and line.count("\n") == 2 for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def deltas_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def test_a_token_without_text_waits_and_its_logprobs_with_it() -> None:
    infos = [TokenInfo(token_id, -0.5, ((token_id, -0.5),)) for token_id in (2, 3, 1)]
    deltas = [
        delta_of("", token_ids=(2,), logprobs=(infos[0],)),
        delta_of("é", token_ids=(3,), logprobs=(infos[1],)),
        delta_of("a\n", "length", logprobs=(infos[2],)),
    ]
    first, *chunks = written(deltas, style_of(has_logprobs=True, includes_usage=True))
    assert deltas_of([first]) == [{"role": "assistant", "content": ""}], "the first token's time is the first chunk's"
    assert deltas_of(chunks[:2]) == [{"content": "é"}, {"content": "a\n"}]
    entries = [[entry["bytes"] for entry in chunk["choices"][0]["logprobs"]["content"]] for chunk in chunks[:2]]
    assert entries == [[[0xC3], [0xA9]], [[97]]]
    assert chunks[0]["choices"][0]["logprobs"]["content"][0]["token"] == "bytes:\\xc3"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:2]] == [None, "length"]
    assert chunks[2]["choices"] == [] and chunks[2]["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip


def test_an_answer_of_nothing_is_one_chunk_with_role_and_end() -> None:
    (chunk,) = written([delta_of("", "stop", stop_reason=488)], style_of())
    assert chunk["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": "stop",
         "stop_reason": 488}
    ]  # fmt: skip
    assert {key: chunk[key] for key in FRAME} == FRAME


def test_the_end_comes_with_the_last_token_and_not_after_it() -> None:
    chunks = written([delta_of("a"), delta_of(""), delta_of("b"), delta_of("", "stop")], style_of())
    assert deltas_of(chunks) == [{"role": "assistant", "content": "a"}, {"content": "b"}, {"content": ""}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


def test_calls_have_id_and_name_first_and_arguments_later() -> None:
    chunks = written([delta_of("1"), delta_of("2"), delta_of("3"), delta_of("4"), delta_of("", "stop")],
                     style_of(parser=ScriptedParser))  # fmt: skip
    first = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "get", "arguments": ""}}
    second = {"index": 1, "id": "call_b", "type": "function", "function": {"name": "put", "arguments": ""}}
    assert deltas_of(chunks) == [
        {"role": "assistant", "content": None, "tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}, second]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {"content": ""},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("finish", "told"), [("stop", "tool_calls"), ("length", "length")])
def test_a_whole_answer_with_calls(finish: str, told: str) -> None:
    answers = Answers([Answer("1234", [1, 1], finish_reason=finish), Answer("c12", [1], finish_reason=finish)], 7)
    reply = whole_reply(FRAME, answers, style_of(2, ScriptedParser))
    first, second = reply["choices"]
    assert first["message"] == {
        "role": "assistant", "content": None, "refusal": None, "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "get", "arguments": '{"x":1}'}},
            {"id": "call_b", "type": "function", "function": {"name": "put", "arguments": "{}"}},
        ],
    }  # fmt: skip
    assert second["message"]["content"] == "Look:" and len(second["message"]["tool_calls"]) == 1
    assert [first["finish_reason"], second["finish_reason"]] == [told, told]


@pytest.mark.parametrize("shown", [True, False])
def test_reasoning_stands_apart_or_is_left_out(shown: bool) -> None:
    style = style_of(parser=ScriptedParser, has_reasoning=shown)
    chunks = written([delta_of("t"), delta_of("b"), delta_of("c", "stop")], style)
    message = whole_reply(FRAME, Answers([Answer("tbc", [1])]), style)["choices"][0]["message"]
    assert message["content"] == "SoLook:"
    if shown:
        assert message["reasoning_content"] == "think!"
        assert deltas_of(chunks) == [
            {"role": "assistant", "reasoning_content": "think"},
            {"reasoning_content": "!", "content": "So"},
            {"content": "Look:"},
        ]
    else:
        assert "reasoning_content" not in message
        assert deltas_of(chunks) == [{"role": "assistant", "content": "So"}, {"content": "Look:"}]


def test_answers_are_interleaved_each_with_its_own_state() -> None:
    deltas = [
        delta_of("a"),
        delta_of("", index=1),
        delta_of("b", "stop"),
        delta_of("c", index=1),
        delta_of("", "length", 1),
    ]
    chunks = written(deltas, style_of(2, counts_on=True))
    assert [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks[:-1]] == [
        (0, {"role": "assistant", "content": "a"}),
        (1, {"role": "assistant", "content": ""}),
        (0, {"content": "b"}),
        (1, {"content": "c"}),
        (1, {"content": ""}),
    ]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]


def test_an_answer_that_fails_is_an_error() -> None:
    writer = ChunkWriter(FRAME, style_of())
    writer.write(delta_of("a"))
    with pytest.raises(ApiError, match="no number") as caught:
        writer.write(delta_of("", "error", error="the scores are no numbers"))
    assert caught.value.status == 500


def test_signs_in_texts_are_written_as_json_has_them() -> None:
    text = 'quote " slash \\ line\n\u2028 \x00 é 😀 </script>'
    assert deltas_of(written([delta_of(text, "stop")], style_of()))[0]["content"] == text


def test_prompt_logprobs_by_token_id_with_ranks() -> None:
    infos = (
        None,
        TokenInfo(1, -2.0, ((4, -0.1), (2, -1.0)), rank=7),
        TokenInfo(2, -0.2, ((2, -0.2), (1, float("-inf")))),
    )
    assert prompt_logprobs(infos, BYTES.__getitem__) == [
        None,
        {
            "4": {"logprob": -0.1, "rank": 1, "decoded_token": "bytes:\\xff"},
            "2": {"logprob": -1.0, "rank": 2, "decoded_token": "bytes:\\xc3"},
            "1": {"logprob": -2.0, "rank": 7, "decoded_token": "a"},
        },
        {
            "2": {"logprob": -0.2, "rank": 1, "decoded_token": "bytes:\\xc3"},
            "1": {"logprob": -9999.0, "rank": 2, "decoded_token": "a"},
        },
    ]
    assert token_text("é".encode()) == "é"
