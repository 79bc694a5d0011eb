"""POST /v1/messages: the answers of chats in Anthropic's form, its events, and its errors."""

import json
from typing import Any

import pytest

from executor.serve.anthropic.message_input import messages_of, tool_choice_of_messages, tools_of_messages
from executor.serve.anthropic.message_output import MessageWriter
from executor.serve.asks import Delta
from executor.serve.blocks import BlockAnswer
from tests.serve.conftest import Running, named_events
from tests.serve.test_generate import PICTURE
from tests.serve.test_responses import SCHEMA, ScriptedParser, chat

QUESTION = "What color is the square?"
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PICTURE.partition(",")[2]},
    "cache_control": {"type": "ephemeral"},
}
SQUARE = {"role": "user", "content": [IMAGE, {"type": "text", "text": QUESTION}]}
LIMITS = {"max_tokens": 8, "temperature": 0}


def ask(server: Running, messages: Any, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/messages", json={"messages": messages, **LIMITS, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(server: Running, messages: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": messages, **LIMITS, "stream": True, **fields}
    return named_events(server, "/v1/messages", body)


def test_a_text_is_answered_as_a_chat(server: Running) -> None:
    message = ask(
        server, [{"role": "user", "content": "What is a square?"}], system=[{"type": "text", "text": "Answer."}]
    )
    plain = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is a square?"}]
    expected = chat(server, plain)
    assert message["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == expected["usage"]["completion_tokens"]
    assert message["type"] == "message" and message["role"] == "assistant" and message["stop_sequence"] is None
    body = {"messages": plain[1:], "system": "Answer."}
    count = server.http.post("/v1/messages/count_tokens", json=body).json()
    assert count == {"input_tokens": expected["usage"]["prompt_tokens"]}


def test_a_picture_is_seen_and_an_end_has_its_reason(server: Running) -> None:
    message = ask(server, [SQUARE])
    assert message["content"] == [{"type": "text", "text": "blue"}] and message["stop_reason"] == "end_turn"
    assert ask(server, [SQUARE], max_tokens=1)["stop_reason"] == "max_tokens"
    cut = ask(server, [SQUARE], stop_sequences=["ue"])
    assert (cut["stop_reason"], cut["stop_sequence"], cut["content"][0]["text"]) == ("stop_sequence", "ue", "bl")


def test_an_answer_that_was_begun_goes_on(server: Running) -> None:
    """As a chat with continue_final_message does."""
    begun = {"role": "assistant", "content": [{"type": "text", "text": "a blue square at"}]}
    asked = {"role": "user", "content": [IMAGE, {"type": "text", "text": "Describe the picture."}]}
    picture = {"type": "image_url", "image_url": {"url": PICTURE}}
    messages = [{"role": "user", "content": [picture, asked["content"][1]]}, begun]
    body = {"messages": messages, **LIMITS, "continue_final_message": True, "add_generation_prompt": False}
    expected = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert ask(server, [asked, begun])["content"] == [{"type": "text", "text": expected}]
    assert expected.startswith(" the top right")


def test_the_events_add_up_to_the_message(server: Running) -> None:
    whole, events = ask(server, [SQUARE]), streamed(server, [SQUARE])
    kinds = [each["type"] for each in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start, end = events[0]["message"], events[-2]
    assert start["content"] == [] and start["usage"]["output_tokens"] == 0
    assert "".join(each["delta"]["text"] for each in events[2:-3]) == whole["content"][0]["text"]
    assert end["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    assert end["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "user", "content": [7]}]}, "is 7; allowed"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "base64 or url"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]}, "input"),
        ({"system": 7}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "some"}}, "some"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "budget_tokens"),
        ({"output_config": {"effort": "high"}}, "effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "xml"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "thing"}}}}, "output_config.format"),
        ({"mcp_servers": [{"url": "a"}]}, "mcp_servers"),
        ({"n": 2}, "n is 2"),
        ({"model": "other"}, "other"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_its_form(server: Running, fields: dict[str, Any], words: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, **LIMITS, **fields}
    reply = server.http.post("/v1/messages", json=body)
    tree = reply.json()
    assert reply.status_code == (404 if "model" in fields else 400)
    kind = "not_found_error" if "model" in fields else "invalid_request_error"
    assert tree["type"] == "error" and tree["error"]["type"] == kind and words in tree["error"]["message"]


def test_neutral_values_are_taken(server: Running) -> None:
    fields = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "thinking": {"type": "disabled"}, "tools": [],
        "stop_sequences": [], "top_k": -1, "tool_choice": {"type": "auto"}, "output_config": {"format": None},
    }  # fmt: skip
    assert ask(server, [SQUARE], **fields)["content"][0]["text"] == "blue"


def test_a_call_is_a_block_and_its_result_goes_on(server: Running) -> None:
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    forced = {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 64}
    message = ask(server, [SQUARE], **forced)
    use = message["content"][-1]
    assert message["stop_reason"] == "tool_use" and use["type"] == "tool_use" and use["input"]["unit"] in ("C", "F")
    events = streamed(server, [SQUARE], **forced)
    told = "".join(each["delta"].get("partial_json", "") for each in events if each["type"] == "content_block_delta")
    assert json.loads(told) == use["input"] and events[-2]["delta"]["stop_reason"] == "tool_use"
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "12"}]}
    turns = [SQUARE, {"role": "assistant", "content": message["content"]}, result]
    after = ask(server, turns, tools=[tool])
    assert after["usage"]["input_tokens"] + after["usage"]["cache_read_input_tokens"] > message["usage"]["input_tokens"]


def test_a_format_binds_the_answer(server: Running) -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = ask(server, [SQUARE], output_config=config, max_tokens=64)
    assert json.loads(message["content"][0]["text"])["unit"] in ("C", "F")


def test_blocks_are_messages_of_a_chat() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "b", "signature": "s"}, {"type": "text", "text": "c"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"x": "é"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "d"}, IMAGE]},
            {"type": "text", "text": "e"},
        ]},
    ]  # fmt: skip
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":"é"}'}}
    picture = {"type": "image_url", "image_url": {"url": PICTURE}}
    assert messages_of(messages, "z") == [
        {"role": "system", "content": "z"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "b", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "d"}, picture]},
        {"role": "user", "content": [{"type": "text", "text": "e"}]},
    ]
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    assert tools_of_messages([{"name": "f", "description": "g", "input_schema": schema}]) == [
        {"type": "function", "function": {"name": "f", "parameters": schema, "description": "g"}}
    ]
    named = {"type": "function", "function": {"name": "f"}}
    choice = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    assert tool_choice_of_messages(choice) == {"tool_choice": named, "parallel_tool_calls": False}
    assert tool_choice_of_messages({"type": "any"}) == {"tool_choice": "required", "parallel_tool_calls": True}


def test_thoughts_words_and_calls_are_blocks_of_their_own() -> None:
    answer = BlockAnswer(ScriptedParser())
    writer = MessageWriter({"id": "msg_1"}, answer)
    texts = ["ra", "rb", "ca", "1n", '{"x"', ":1}"]
    events = []
    for number, text in enumerate(texts):
        finish = "stop" if number == len(texts) - 1 else None
        events += writer.write(answer.take(Delta(0, text, (1,), 5, finish_reason=finish)))
    message = writer.message
    assert message["content"][:3] == [
        {"type": "thinking", "thinking": "rarb", "signature": ""},
        {"type": "text", "text": "ca"},
        {"type": "tool_use", "id": "call_0", "name": "f", "input": {"x": 1}},
    ]
    assert message["stop_reason"] == "tool_use"
    parts = {"thinking": "thinking", "text": "text", "tool_use": "partial_json"}
    for index, block in enumerate(message["content"][:3]):
        deltas = [each["delta"][parts[block["type"]]] for each in events if each["index"] == index and "delta" in each]
        whole = "".join(deltas)
        assert (json.loads(whole) if block["type"] == "tool_use" else whole) == block[
            "input" if block["type"] == "tool_use" else block["type"]
        ]
