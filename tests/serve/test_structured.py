"""The form of answers over HTTP: response_format, structured_outputs, tools and reasoning."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from executor.prompt.chat import Chat
from executor.schedule.request import Grammar
from executor.serve.asks import ChatPrompt
from executor.serve.errors import ApiError
from executor.serve.structured import grammar_of, takes_tools, thinks, tools_of
from tests.reference import REPO
from tests.serve.conftest import Running

PICTURE = "data:image/png;base64," + base64.b64encode((REPO / "dataset/media/objects.png").read_bytes()).decode()
QUESTION = [{"role": "user", "content": "Is it red?"}]
SEEN = [{"role": "user", "content": [{"type": "text", "text": "Where is the red circle?"},
                                     {"type": "image_url", "image_url": {"url": PICTURE}}]}]  # fmt: skip
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}{% endif %}{% if tools %}{{ tools | tojson }}{% endif %}"""
CALL, THINK_END = 500, 511  # tokens of the tiny checkpoint


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    color: Literal["red", "blue"]
    box: tuple[int, int]
    note: str | None


SCHEMA = {
    "type": "object",
    "title": "Thing",
    "properties": {
        "color": {"enum": ["red", "blue"], "title": "Color", "type": "string"},
        "box": {"type": "array", "prefixItems": [{"type": "integer", "maximum": 9}] * 2, "items": False, "minItems": 2},
        "note": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]},
    },
    "required": ["color", "box", "note"],
    "additionalProperties": False,
}
BOX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 2}
LOOK = {"type": "function", "function": {"name": "look", "description": "Look at it.", "parameters": {
    "type": "object", "properties": {"box": BOX}, "required": ["box"], "additionalProperties": False}}}  # fmt: skip
PAINT = {"type": "function", "function": {"name": "paint", "strict": True, "parameters": {
    "type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"],
    "additionalProperties": False}}}  # fmt: skip


def tool(name: Any, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


# From fields to grammars

FORMS: dict[str, tuple[dict[str, Any], tuple[str, Any] | None]] = {  # (fields, kind and parsed source)
    "nothing": ({}, None),
    "text": ({"response_format": {"type": "text"}, "structured_outputs": None, "tools": []}, None),
    "object": ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": SCHEMA}}},
        ("json_schema", SCHEMA),
    ),
    "schema of /v1/responses": (
        {"response_format": {"type": "json_schema", "name": "t", "schema": SCHEMA}}, ("json_schema", SCHEMA)),
    "json": ({"structured_outputs": {"json": SCHEMA, "regex": None}}, ("json_schema", SCHEMA)),
    "json text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ("json_schema", SCHEMA)),
    "nothing fits": ({"structured_outputs": {"json": False, "json_object": False}}, ("json_schema", False)),
    "any json": ({"structured_outputs": {"json_object": True}}, ("json_schema", {"type": "object"})),
    "choice": ({"structured_outputs": {"choice": ["a", "b"], "disable_fallback": True}}, ("choice", ["a", "b"])),
    "old choice": ({"guided_choice": ["a", "b"]}, ("choice", ["a", "b"])),
    "old json": ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
    "no tools": ({"tools": [LOOK], "tool_choice": "none"}, None),
    "auto": (
        {"tools": [LOOK, PAINT]},
        ("calls", {"parallel": True, "tools": [
            {"name": "look", "parameters": None},
            {"name": "paint", "parameters": PAINT["function"]["parameters"]}]}),
    ),
    "required": (
        {"tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False},
        ("calls", {"parallel": False, "tools": [{"name": "look", "parameters": LOOK["function"]["parameters"]}]}),
    ),
    "named": (
        {"tools": [PAINT, LOOK], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        ("calls", {"parallel": False, "tools": [{"name": "look", "parameters": LOOK["function"]["parameters"]}]}),
    ),
    "named as in /v1/responses": (
        {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}},
        ("calls", {"parallel": False, "tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}]}),
    ),
    "without parameters": (
        {"tools": [tool("f"), tool("g", {})], "tool_choice": "required"},
        ("calls", {"parallel": True, "tools": [
            {"name": "f", "parameters": {"type": "object", "properties": {}}}, {"name": "g", "parameters": {}}]}),
    ),
    "auto, without parameters": (
        {"tools": [tool("f"), tool("g", strict=True)]},
        ("calls", {"parallel": True, "tools": [
            {"name": "f", "parameters": None}, {"name": "g", "parameters": {"type": "object", "properties": {}}}]}),
    ),
    "auto or a form": (
        {"tools": [tool("f")], "response_format": {"type": "json_object"}},
        ("calls", {"parallel": True, "tools": [{"name": "f", "parameters": None}], "else": '{"type": "object"}'}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_a_grammar(name: str):
    fields, expected = FORMS[name]
    grammar = grammar_of(fields)
    assert (grammar and (grammar.kind, json.loads(grammar.source))) == expected
    assert grammar is None or grammar.is_lazy == (name in ("auto", "auto, without parameters"))
    thinking = grammar_of(fields, thinks=True)
    assert thinking == (grammar and Grammar(grammar.kind, grammar.source, "</think>", grammar.is_lazy))


def test_texts_are_taken_as_they_are():
    assert grammar_of({"structured_outputs": {"regex": "[0-9]"}}) == Grammar("regex", "[0-9]")
    assert grammar_of({"guided_grammar": 'root ::= "a"'}) == Grammar("ebnf", 'root ::= "a"')
    assert grammar_of({"guided_regex": "a", "response_format": {"type": "text"}}) == Grammar("regex", "a")


BAD: dict[str, tuple[dict[str, Any], str]] = {  # (fields, the field that is named)
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format"),
    "no type": ({"response_format": {}}, "response_format"),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "t"}}}, "response_format"),
    "schema no object": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format"),
    "two forms": ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    "two fields": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    "no text": ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
    "empty regex": ({"guided_regex": ""}, "guided_regex"),
    "no choices": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    "choice of numbers": ({"guided_choice": [1]}, "guided_choice"),
    "unknown key": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    "whitespace": ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
                   "structured_outputs.disable_any_whitespace"),
    "old whitespace": ({"guided_json": {}, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    "structured outputs no object": ({"structured_outputs": "a"}, "structured_outputs"),
    "tool without a name": ({"tools": [LOOK, tool("")]}, "tools[1]"),
    "tool of another type": ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    "tool no object": ({"tools": ["look"]}, "tools[0]"),
    "name twice": ({"tools": [LOOK, LOOK]}, "tools[1]"),
    "parameters": ({"tools": [tool("f", [1])]}, "tools[0]"),
    "strict": ({"tools": [tool("f", {}, strict="yes")]}, "tools[0]"),
    "unknown choice": ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice"),
    "not among them": ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
                       "tool_choice"),
    "choice no function": ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    "required of none": ({"tool_choice": "required"}, "tool_choice"),
    "regex and tools": ({"tools": [LOOK], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_form_that_cannot_be_is_refused(name: str):
    fields, param = BAD[name]
    with pytest.raises(ApiError) as caught:
        grammar_of(fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert re.search(r"allowed|; (set|give|leave)|given twice", caught.value.message)


def test_tools_are_shown_unless_none_is_chosen():
    assert tools_of({"tools": [LOOK]}) == (LOOK,) and takes_tools({"tools": [LOOK], "tool_choice": "auto"})
    assert tools_of({"tools": [LOOK], "tool_choice": "none"}) == ()
    assert not takes_tools({"tools": [LOOK], "tool_choice": "none"}) and not takes_tools({})
    with pytest.raises(ApiError):
        tools_of({"tools": [3], "tool_choice": "none"})


# Over HTTP


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 80, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def streamed(server: Running, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice that a stream's chunks add up to, as OpenAI's clients join them, and the chunks' deltas."""
    body = {"messages": QUESTION, "max_tokens": 80, "stream": True, **fields}
    choice: dict[str, Any] = {"message": {"content": None}, "finish_reason": None}
    message, deltas = choice["message"], []
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        (part,) = json.loads(line)["choices"]
        delta = part["delta"]
        deltas.append(delta)
        choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return choice, deltas


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Two choices alike but for the calls' ids."""

    def plain(choice: dict[str, Any]) -> Any:
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        return choice["finish_reason"], message["content"] or None, message.get("reasoning_content"), calls

    return plain(one) == plain(other)


FORMATS: dict[str, tuple[dict[str, Any], Any]] = {  # (fields, what holds of the content)
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}},
               Thing.model_validate_json),
    "schema, sampled": ({"structured_outputs": {"json": SCHEMA}, "temperature": 1.5, "seed": 4},
                        Thing.model_validate_json),
    "regex": ({"structured_outputs": {"regex": "[0-9]{3}-[xyz]{2}"}}, re.compile("[0-9]{3}-[xyz]{2}").fullmatch),
    "choice": ({"structured_outputs": {"choice": ["zebra", "a naïve 日本"]}}, ["zebra", "a naïve 日本"].index),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "yes" | "no" ", but " [a-c]'}},
                re.compile("yes|no, but [a-c]").fullmatch),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, messages", [*((name, QUESTION) for name in FORMATS), ("schema", SEEN), ("choice", SEEN)]
)
def test_an_answer_has_the_form_that_was_asked_for(server, name: str, messages: Any):
    fields, holds = FORMATS[name]
    whole = chat(server, messages=messages, **fields)
    assert whole["finish_reason"] == "stop"
    assert holds(whole["message"]["content"]) is not None
    assert same(streamed(server, messages=messages, **fields)[0], whole)


def test_a_json_object_may_hold_anything(server):
    whole = chat(server, response_format={"type": "json_object"}, max_tokens=30)
    assert whole["message"]["content"].startswith("{")
    assert whole["finish_reason"] == "length" or isinstance(json.loads(whole["message"]["content"]), dict)


def check_call(call: dict[str, Any]) -> None:
    assert call["id"].startswith("call_") and call["type"] == "function"
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "look":
        assert arguments.keys() == {"box"} and len(arguments["box"]) == 2 and max(arguments["box"]) < 10
    else:
        assert call["function"]["name"] == "paint" and arguments in ({"color": "red"}, {"color": "blue"})


CHOICES: dict[str, dict[str, Any]] = {
    "required": {"tool_choice": "required", "parallel_tool_calls": False},
    "named": {"tool_choice": {"type": "function", "function": {"name": "paint"}}},
    "auto": {"logit_bias": {str(CALL): 100}, "parallel_tool_calls": False},
}


@pytest.mark.parametrize("name, messages", [*((name, QUESTION) for name in CHOICES), ("named", SEEN)])
def test_a_call_fits_the_tools(server, name: str, messages: Any):
    """Of a model that knows no tools."""
    fields = {"tools": [PAINT] if name == "auto" else [LOOK, PAINT], "messages": messages, **CHOICES[name]}
    whole = chat(server, **fields)
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    check_call(call)
    assert name != "named" or call["function"]["name"] == "paint"
    again, deltas = streamed(server, **fields)
    assert same(again, whole)
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0].keys() == {"index", "id", "type", "function"} and len(calls) > 3


def test_several_calls_follow_each_other(server):
    newline = server.engine.processor.tokenizer.encode("\n")[0]
    wish = {str(CALL): 50, str(newline): 50}  # a line break, and the next call
    fields = {"tools": [PAINT], "tool_choice": "required", "logit_bias": wish}
    whole = chat(server, **fields, max_tokens=80)
    calls = whole["message"]["tool_calls"]
    assert len(calls) == 2 and len({call["id"] for call in calls}) == len(calls)
    check_call(calls[0])
    assert same(streamed(server, **fields, max_tokens=80)[0], whole)


def test_free_text_beside_tools_is_as_without(server):
    told = {"role": "system", "content": "-"}
    free = chat(server, messages=[told, *QUESTION], tools=[LOOK], tool_choice="auto")
    assert free["finish_reason"] == "stop" and "tool_calls" not in free["message"]
    unbound = server.engine.processor.build([told, *QUESTION], tools=[LOOK])
    assert free["message"]["content"] is not None and len(unbound.token_ids) > 50


REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # (fields, param)
    "unsupported": ({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": {"not": {}}}}},
                    "response_format.json_schema"),
    "regex": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    "tool": ({"tools": [tool("f", {"type": "object", "if": {}})], "tool_choice": "required"}, "tools"),
    "strict tool": ({"tools": [tool("f", {"type": "object", "if": {}}, strict=True)]}, "tools"),
    "nothing fits": ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
    "old name": ({"guided_grammar": "root ::= ("}, "guided_grammar"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_enforced_is_a_400(server, name: str, stream: bool):
    fields, param = REFUSED[name]
    reply = server.http.post("/v1/chat/completions", json={"messages": QUESTION, "stream": stream, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_a_loose_tool_takes_what_cannot_be_enforced(server):
    """Nothing is promised of its arguments but that they are an object."""
    loose = tool("f", {"type": "object", "if": {}})
    whole = chat(server, tools=[loose], logit_bias={str(CALL): 100}, max_tokens=40)
    assert whole["message"]["tool_calls"][0]["function"]["name"] == "f"


# Checkpoints that think


@pytest.fixture
def thinker(server, monkeypatch) -> Iterator[Running]:
    """The server, as if its checkpoint had been trained to think: the template opens the reasoning."""
    chat_ = server.engine.processor.chat
    monkeypatch.setattr(server.engine.processor, "chat", Chat(chat_.tokenizer, THINKING))
    yield server


def test_the_template_says_whether_a_checkpoint_thinks(thinker):
    processor = thinker.engine.processor
    ask = ChatPrompt(QUESTION)
    assert thinks(processor, ask)
    assert not thinks(processor, ChatPrompt(QUESTION, template_kwargs={"enable_thinking": False}))
    assert not thinks(processor, ChatPrompt(QUESTION, add_generation_prompt=False))
    for content, expected in (("<think>\nHm", True), ("<think>Hm</think>\n\nSo", False), ("So", False)):
        for form in (content, [{"type": "text", "text": content}]):
            last = {"role": "assistant", "content": form}
            ask = ChatPrompt([*QUESTION, last], add_generation_prompt=False, continue_final_message=True)
            assert thinks(processor, ask) == expected


def test_an_instruct_checkpoint_does_not_think(server):
    assert not thinks(server.engine.processor, ChatPrompt(QUESTION))


def test_reasoning_stands_apart_from_the_answer(thinker):
    fields = {"logit_bias": {str(THINK_END): 12}, "max_tokens": 60, "ignore_eos": True}
    whole = chat(thinker, **fields)
    message = whole["message"]
    assert message["reasoning_content"] and "</think>" not in message["reasoning_content"]
    assert message["content"] is not None and "<think>" not in message["content"]
    assert same(streamed(thinker, **fields)[0], whole)


def test_a_form_holds_after_the_reasoning(thinker):
    fields = {"logit_bias": {str(THINK_END): 12}, "structured_outputs": {"regex": "[0-9]{4}"}}
    whole = chat(thinker, **fields)
    assert whole["finish_reason"] == "stop" and re.fullmatch("[0-9]{4}", whole["message"]["content"])
    assert whole["message"]["reasoning_content"]
    assert same(streamed(thinker, **fields)[0], whole)


def test_calls_come_after_the_reasoning(thinker):
    fields = {"logit_bias": {str(THINK_END): 12}, "tools": [PAINT], "tool_choice": "required"}
    whole = chat(thinker, **fields, parallel_tool_calls=False)
    assert whole["finish_reason"] == "tool_calls" and "<" not in whole["message"].get("reasoning_content", "")
    check_call(whole["message"]["tool_calls"][0])


NO_TOKEN_LEFT = {"guided_regex": "abc", "allowed_token_ids": [10]}


@pytest.mark.parametrize(
    ("path", "asked", "words", "stream"),
    [
        *((path, NO_TOKEN_LEFT, "no token can be chosen", stream)
          for path in ("/v1/chat/completions", "/v1/completions", "/generate") for stream in (False, True)),
        ("/v1/chat/completions", {"guided_regex": "[0-9]?(a{1000}){1000}"}, "cannot be followed", False),
    ],
)  # fmt: skip
def test_what_no_answer_can_follow_is_the_requests_fault(server, path: str, asked: Any, words: str, stream: bool):
    """Found while it is answered."""
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    reply = server.http.post(path, json={**prompt, **asked, "max_tokens": 8, "stream": stream})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"
