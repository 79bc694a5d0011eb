"""POST /v1/responses: the answers of chats as items and events, conversations that go on, and what is refused."""

import json
from typing import Any

import pytest

from executor.serve.asks import Delta
from executor.serve.blocks import BlockAnswer
from executor.serve.errors import ApiError
from executor.serve.openai.response_input import messages_of, tools_of_response
from executor.serve.openai.response_output import ResponseWriter
from executor.serve.openai.response_store import ResponseStore, size_of
from executor.serve.parser import Piece
from tests.serve.conftest import Running, named_events
from tests.serve.test_generate import PICTURE

QUESTION = "What color is the square?"
SQUARE = {
    "role": "user",
    "content": [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}],
}
LIMITS = {"max_output_tokens": 8, "temperature": 0}


def respond(server: Running, given: Any, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/responses", json={"input": given, **LIMITS, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(server: Running, given: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": given, **LIMITS, "stream": True, **fields}
    events = named_events(server, "/v1/responses", body)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    return events


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item.get("content", ()))


def chat(server: Running, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    return server.http.post("/v1/chat/completions", json=body).json()


def test_a_text_is_answered_as_a_chat(server: Running) -> None:
    response = respond(server, "What is a square?", instructions="Answer.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is a square?"}]
    expected = chat(server, messages)
    assert text_of(response) == expected["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert response["usage"]["output_tokens"] == expected["usage"]["completion_tokens"]
    assert response["object"] == "response" and response["metadata"] == {"a": "b"} and response["temperature"] == 0
    assert [(item["type"], item["status"]) for item in response["output"]] == [("message", response["status"])]


def test_a_picture_is_seen(server: Running) -> None:
    response = respond(server, [SQUARE])
    assert text_of(response) == "blue" and response["status"] == "completed"


def test_an_answer_that_is_cut_is_incomplete(server: Running) -> None:
    for response in (
        respond(server, [SQUARE], max_output_tokens=1),
        streamed(server, [SQUARE], max_output_tokens=1)[-1]["response"],
    ):
        assert response["status"] == "incomplete" and response["output"][0]["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_the_streams_last_event_is_the_whole_response(server: Running) -> None:
    events = streamed(server, [SQUARE], top_logprobs=2)
    kinds = [each["type"] for each in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    whole, last = respond(server, [SQUARE], top_logprobs=2), events[-1]["response"]
    deltas = [each for each in events if each["type"] == "response.output_text.delta"]
    assert "".join(each["delta"] for each in deltas) == text_of(last) == text_of(whole)
    logprobs = last["output"][0]["content"][0]["logprobs"]
    assert [entry for each in deltas for entry in each["logprobs"]] == logprobs and len(
        logprobs[0]["top_logprobs"]
    ) == 2
    assert events[-2]["item"] == last["output"][0]
    changing = {"id", "created_at", "output", "usage"}
    assert {k: v for k, v in whole.items() if k not in changing} == {k: v for k, v in last.items() if k not in changing}
    assert whole["usage"]["output_tokens"] == last["usage"]["output_tokens"]


def test_a_conversation_goes_on_from_a_kept_response(server: Running) -> None:
    first = respond(server, [SQUARE])
    second = respond(server, "Where is the blue square?", previous_response_id=first["id"])
    third = streamed(server, "Count the objects.", previous_response_id=second["id"])[-1]["response"]
    said = [SQUARE["content"][1]["text"], text_of(first), "Where is the blue square?", text_of(second)]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image_url", "image_url": PICTURE}, {"type": "text", "text": said[0]}]},
        {"role": "assistant", "content": said[1]},
        {"role": "user", "content": said[2]},
    ]
    assert text_of(second) == chat(server, messages)["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": said[3]}, {"role": "user", "content": "Count the objects."}]
    assert text_of(third) == chat(server, messages)["choices"][0]["message"]["content"]
    assert third["previous_response_id"] == second["id"]


def test_items_are_named_instead_of_handed_in(server: Running) -> None:
    """As the Vercel SDK does it with kept responses."""
    first = respond(server, "What is a square?")
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    asked = {"role": "user", "content": "What is a square?"}
    more = {"role": "user", "content": "And a circle?"}
    by_name = respond(server, [asked, reference, more])
    assert text_of(by_name) == text_of(respond(server, [asked, first["output"][0], more]))


def test_a_kept_response_is_read_and_forgotten(server: Running) -> None:
    response = respond(server, "What is a square?")
    path = f"/v1/responses/{response['id']}"
    assert server.http.get(path).json() == response
    assert server.http.get(f"{path}/input_items").json()["data"][0]["content"] == "What is a square?"
    assert server.http.delete(path).json()["deleted"] is True
    for reply in (server.http.get(path), server.http.delete(path)):
        assert reply.status_code == 404 and response["id"] in reply.json()["error"]["message"]
    unkept = respond(server, "What is a square?", store=False)
    assert server.http.get(f"/v1/responses/{unkept['id']}").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": None}, "input", "input"),
        ({"input": [7]}, "input[0]", "is 7; allowed"),
        ({"input": [{"type": "computer_call"}]}, "input[0]", "computer_call"),
        ({"input": [{"role": "nobody", "content": "a"}]}, "input[0].role", "nobody"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, None, "input_file"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            None,
            "no files are kept",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "text"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "input[0].call_id", "'c'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "msg_1"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "resp_1"),
        ({"background": True}, "background", "background"),
        ({"conversation": {"id": "c"}}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "prompt"),
        ({"n": 2}, "n", "n is 2"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "high"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "low"),
        ({"truncation": "auto"}, "truncation", "auto"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "text.format is"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "thing"}}}}, "text.format", "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"top_logprobs": 99}, "top_logprobs", "99"),
        ({"model": "other"}, "model", "other"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    server: Running, fields: dict[str, Any], param: str | None, words: str
) -> None:
    reply = server.http.post("/v1/responses", json={"input": "a", "stream": True, **LIMITS, **fields})
    error = reply.json()["error"]
    is_unknown = any(name in str(fields) for name in ("resp_1", "msg_1", "other"))
    assert reply.status_code == (404 if is_unknown else 400) and words in error["message"]
    assert param is None or error["param"] == param


def test_neutral_values_are_taken(server: Running) -> None:
    """What the SDKs send of themselves."""
    fields = {
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled", "background": False,
        "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}, "parallel_tool_calls": True,
        "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "user": "u", "tools": [],
        "tool_choice": "auto", "previous_response_id": None, "conversation": None, "top_logprobs": 0, "store": False,
    }  # fmt: skip
    assert text_of(respond(server, [SQUARE], **fields)) == "blue"


def test_items_in_a_row_are_one_message() -> None:
    picture = {"type": "input_image", "image_url": PICTURE, "detail": "low"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "d"},
        {"type": "function_call_output", "call_id": "2", "output": [picture]},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "unread"}], "encrypted_content": "e"},
        {"role": "assistant", "content": "h"},
    ]
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "fgf"[i - 1], "arguments": "{}"}} for i in (1, 2, 3)
    ]
    assert messages_of(items, "z") == [
        {"role": "system", "content": "z"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "b", "content": [{"type": "text", "text": "c"}],
         "tool_calls": calls[:2]},
        {"role": "tool", "tool_call_id": "1", "content": "d"},
        {"role": "tool", "tool_call_id": "2",
         "content": [{"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}]},
        {"role": "assistant", "tool_calls": calls[2:]},
        {"role": "assistant", "content": "h"},
    ]  # fmt: skip
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": None}
    assert tools_of_response([tool]) == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    ]


SCHEMA = {
    "type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"], "additionalProperties": False
}  # fmt: skip
WEATHER = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
ROOM = {"max_output_tokens": 64}


def test_a_format_binds_the_answer(server: Running) -> None:
    text = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    response = respond(server, [SQUARE], text=text, **ROOM)
    assert json.loads(text_of(response))["unit"] in ("C", "F") and response["text"] == text
    assert text_of(streamed(server, [SQUARE], text=text, **ROOM)[-1]["response"]) == text_of(response)
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": QUESTION}], "response_format": form, "temperature": 0}
    expected = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert text_of(respond(server, QUESTION, text=text, **ROOM)) == expected


def test_a_call_is_an_item_and_its_output_goes_on(server: Running) -> None:
    forced = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "get_weather"}, **ROOM}
    response = respond(server, [SQUARE], **forced)
    call = response["output"][-1]
    assert call["type"] == "function_call" and call["name"] == "get_weather" and call["status"] == "completed"
    assert json.loads(call["arguments"])["unit"] in ("C", "F") and response["status"] == "completed"
    events = streamed(server, [SQUARE], **forced)
    told = "".join(each["delta"] for each in events if each["type"] == "response.function_call_arguments.delta")
    assert told == events[-1]["response"]["output"][-1]["arguments"] == call["arguments"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "12"}
    after = respond(server, [output], previous_response_id=response["id"], tools=[WEATHER], **ROOM)
    again = respond(server, [SQUARE, *response["output"], output], tools=[WEATHER], **ROOM)
    assert text_of(after) == text_of(again) and after["usage"]["input_tokens"] > response["usage"]["input_tokens"]


class ScriptedParser:
    """Gives what the test says for each text."""

    num_calls = 2

    def push(self, text: str) -> list[Piece]:
        name = {"n": "f", "m": "g"}.get(text[-1])
        kinds = {"r": Piece("reasoning", text), "c": Piece("content", text)}
        index = 1 if text[0] == "2" else 0
        return [kinds.get(text[0]) or Piece("tool_call", "" if name else text, index, name and f"call_{index}", name)]

    def finish(self) -> list[Piece]:
        return [Piece("tool_call", "!", 1)]


def test_thoughts_words_and_calls_are_items_of_their_own() -> None:
    answer = BlockAnswer(ScriptedParser())
    writer = ResponseWriter({"id": "resp_1"}, answer, lambda token_id: b"")
    texts = ["ra", "rb", "ca", "1n", "1{}", "2m", "2{", "2}"]
    events = writer.begin()
    for number, text in enumerate(texts):
        finish = "stop" if number == len(texts) - 1 else None
        events += writer.write(answer.take(Delta(0, text, (1,), 5, finish_reason=finish)))
    events += writer.end()
    reasoning, message, first, second = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "rarb"}]
    assert message["content"][0]["text"] == "ca"
    assert (first["name"], first["call_id"], first["arguments"]) == ("f", "call_0", "1{}")
    assert (second["name"], second["call_id"], second["arguments"]) == ("g", "call_1", "2{2}!")
    assert events[-1]["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    done = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done == [reasoning, message, first, second]
    for index, item in enumerate(done):
        deltas = [each["delta"] for each in events if each.get("item_id") == item["id"] and "delta" in each]
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(deltas) == whole
        places = {each["output_index"] for each in events if each.get("item_id") == item["id"]}
        assert places == {index}


def test_the_store_is_bounded_and_drops_what_was_used_longest_ago() -> None:
    def response(number: int) -> dict[str, Any]:
        return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * 100}]}

    one = size_of(response(0)) + size_of([{"a": "b"}])
    store = ResponseStore(max_responses=3, max_bytes=10 * one)
    for number in range(5):
        store.add(response(number), [{"a": "b"}], f"resp_{number - 1}" if number else None)
        store.check()
    assert len(store) == 3
    with pytest.raises(ApiError, match="resp_1"):
        store.conversation("resp_4")
    store = ResponseStore(max_bytes=2 * one)
    store.add(response(0), [{"a": "b"}], None)
    store.add(response(1), [{"a": "b"}], "resp_0")
    assert [item.get("id") for item in store.conversation("resp_1")] == [None, "msg_0", None, "msg_1"]
    store.get("resp_0")
    store.add(response(2), [{"a": "b"}], None)
    store.check()
    assert store.get("resp_0") and len(store) == 2
    store.add({**response(3), "more": "x" * 3 * one}, [], None)
    store.check()
    with pytest.raises(ApiError, match="resp_3"):
        store.get("resp_3")
