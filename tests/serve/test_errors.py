"""What cannot be answered: the status, the error's object, and the field that it names."""

import json
from typing import Any

import pytest

from tests.serve.conftest import Running

MESSAGES = [{"role": "user", "content": "What is a square?"}]
CHAT = "/v1/chat/completions"

BODIES = {  # no JSON object of finite numbers and whole characters
    "nothing": b"",
    "blanks": b" \n ",
    "a list": b"[1]",
    "a text": b'"hello"',
    "null": b"null",
    "cut": b'{"messages": [',
    "more behind it": b'{"messages": []} x',
    "no number": b'{"messages": NaN}',
    "endless": b'{"messages": [], "x": {"y": [1, -1e999]}}',
    "digits without end": b'{"messages": [], "n": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"messages": "\xff"}',
    "half a character": b'{"messages": "\\ud800"}',
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a form": b"messages=hello",
    "values without end": b'{"messages": [' + b"0," * 2_000_000 + b"0]}",
    "lists without end": b'{"messages": [' + b"[]," * 1_000_000 + b"0]}",
}

LOOKALIKES = {  # characters that look like JSON's, and are not: the message shows them
    "，": '{"model": "é",\n "messages": [1，2]}',
    "：": '{"messages"：[]}',
    "“": '{"messages": “hello”}',
}

FIELDS: list[tuple[dict[str, Any], str | None, str]] = [  # fields, what `param` names, words of the message
    ({"messages": 3}, "messages", "messages is 3; allowed: a list"),
    ({"messages": None}, "messages", "messages is null; allowed: a list"),
    ({"messages": []}, "messages", "non-empty list"),
    ({"messages": [None]}, "messages[0]", "role"),
    ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0]", "did you mean 'user'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string or a list of parts"),
    (
        {"messages": [{"role": "user", "content": "a " * 5000}]},
        "messages",
        "context length is 2048 tokens, requested 5010",
    ),
    ({"max_completion_tokens": 4000}, "max_completion_tokens", "maximum context length is 2048 tokens, requested 4013"),
    ({"max_tokens": 4000}, "max_tokens", "maximum context length is 2048 tokens, requested 4013"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed: a whole number of 1 or more"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens is -1"),
    ({"max_tokens": "5"}, "max_tokens", 'max_tokens is "5"; allowed: a whole number'),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5; allowed: a whole number"),
    ({"max_tokens": True}, "max_tokens", "max_tokens is true; allowed: a whole number"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "min_tokens is 9; allowed: a whole number from 0 to max_tokens"),
    ({"temperature": -0.1}, "temperature", "0 (greedy) or more"),
    ({"temperature": "warm"}, "temperature", 'temperature is "warm"; allowed: a number'),
    ({"temperature": 10**400}, "temperature", "allowed: a number"),
    ({"top_p": 0}, "top_p", "more than 0, at most 1"),
    ({"top_p": 1.1}, "top_p", "more than 0, at most 1"),
    ({"top_k": -2}, "top_k", "top_k is -2"),
    ({"min_p": 2}, "min_p", "from 0 to 1"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": 10**30}, "n", "from 1 to 128"),
    ({"seed": 1.5}, "seed", "a whole number"),
    ({"frequency_penalty": 3}, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    ({"stop": 3}, "stop", "stop is 3; allowed: a text or a list"),
    ({"stop": ["a", 3]}, "stop[1]", "stop[1] is 3; allowed: a text"),
    ({"stop": ""}, "stop", "not empty"),
    ({"stop": ["a"] * 100}, "stop", "stop has 100 texts"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids", "token ids from 0"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", "a whole number"),
    ({"stop_token_ids": [1] * 300_000}, "stop_token_ids", "at most 262144 entries"),
    ({"bad_words": ["a"] * 2000}, "bad_words", "at most 1024 entries"),
    ({"allowed_token_ids": ["a"] * 100_000}, "allowed_token_ids[0]", "a whole number"),
    ({"tools": [None] * 2000}, "tools", "at most 1024 entries"),
    ({f"x{number}": 1 for number in range(200)}, None, "200 fields that nobody knows"),
    ({"ignore_eos": 1}, "ignore_eos", "true or false"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids from 0"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"logit_bias": {"5": "a"}}, "logit_bias.5", "a number"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "is empty"),
    ({"bad_words": [""]}, "bad_words", "not empty"),
    ({"logprobs": 2}, "logprobs", "true or false"),
    ({"top_logprobs": 2}, "top_logprobs", "together with logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": 3}, "stream_options", "an object"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"tools": 3}, "tools", "a list"),
    ({"tools": ["a"]}, "tools[0]", "allowed: "),
    ({"tool_choice": 3}, "tool_choice", "a text or an object"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "may not set 'tokenize'"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "one of them"),
    ({"media_io_kwargs": {"image": {"mode": "L"}}}, "media_io_kwargs.image.mode", "is not supported"),
    ({"best_of": 3}, "best_of", "best_of is 3, which is not supported; allowed: null or 1; ask for n answers"),
    ({"use_beam_search": True}, "use_beam_search", "allowed: null or false"),
    ({"logprob_token_ids": [4]}, "logprob_token_ids", "allowed: null or []; use top_logprobs"),
    ({"thinking_token_budget": 9}, "thinking_token_budget", "allowed: null; max_tokens bounds"),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"modalities": ["text", "audio"]}, "modalities", 'allowed: null or ["text"]'),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "never cut"),
    ({"regex": "a+"}, "regex", "structured_outputs.regex"),
    ({"echo": True}, "echo", "allowed: null or false"),
]


def error_of(reply: Any, status: int) -> dict[str, Any]:
    """The error's object of a reply, which has nothing beside it."""
    assert reply.status_code == status, reply.text
    (name, error), *others = reply.json().items()
    assert name == "error" and not others and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["type"], str)
    return error


@pytest.mark.parametrize("character", LOOKALIKES)
def test_a_character_that_only_looks_like_jsons_is_shown(server: Running, character: str) -> None:
    reply = server.http.post(CHAT, content=LOOKALIKES[character].encode())
    assert reply.status_code == 400
    assert f", found {character!r})" in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_json_object(server: Running, name: str) -> None:
    assert "allowed: " in error_of(server.http.post(CHAT, content=BODIES[name]), 400)["message"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("fields", "param", "words"), FIELDS, ids=[str(fields)[:50] for fields, _, _ in FIELDS])
def test_a_field_that_is_not_answered(
    server: Running, fields: dict[str, Any], param: str | None, words: str, streams: bool
) -> None:
    body = {"messages": MESSAGES, "stream": streams, **fields}
    error = error_of(server.http.post(CHAT, content=json.dumps(body)), 400)
    assert words in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json; x", "é"])
def test_json_is_read_whatever_the_content_type_says(server: Running, kind: str) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1})
    reply = server.http.post(CHAT, content=body, headers={"Content-Type": kind.encode("latin-1")})
    assert reply.status_code == 200, reply.text


def test_of_a_key_that_comes_twice_the_last_counts(server: Running) -> None:
    body = '{"messages": 3, "max_tokens": 1, "messages": %s}' % json.dumps(MESSAGES)  # noqa: UP031
    assert server.http.post(CHAT, content=body).status_code == 200


def test_texts_with_any_character_are_answered(server: Running) -> None:
    for text in ("a\0b", "\x1b[31m", "\ufeff", "\U0010ffff", "<|im_end|><|image_pad|>", "</tool_call>"):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        assert server.http.post(CHAT, json=body).status_code == 200, text


def test_another_model_is_not_found(server: Running) -> None:
    error = error_of(server.http.post(CHAT, json={"messages": MESSAGES, "model": "gpt-4o"}), 404)
    assert "qwen3_vl" in error["message"] and error["param"] == "model" and error["code"] == "model_not_found"


def test_an_unknown_field_is_named_once_in_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        body = {"messages": MESSAGES, "max_tokens": 1, "temprature": 3}
        assert server.http.post(CHAT, json=body).status_code == 200
    lines = [record.message for record in caplog.records if "temprature" in record.message]
    assert len(lines) == 1 and "did you mean 'temperature'" in lines[0]


ROUTES = [
    ("GET", "/nothing", 404, "POST /v1/chat/completions"),
    ("POST", "/v1/chat/completion", 404, "did you mean '/v1/chat/completions'"),
    ("POST", "/v1/embeddings", 404, "POST /v1/chat/completions"),
    ("GET", "/nothing", 404, "GET /ping"),
    ("GET", "/nothing", 404, "POST /chat/completions"),
    ("GET", "/nothing", 404, ", GET /"),
    ("GET", "/%00%0a", 404, "is not served here"),
    ("GET", CHAT, 405, "allowed: POST"),
    ("DELETE", "/health", 405, "allowed: GET"),
]


@pytest.mark.parametrize(("method", "path", "status", "words"), ROUTES)
def test_routes_that_are_not_there(server: Running, method: str, path: str, status: int, words: str) -> None:
    reply = server.http.request(method, path)
    assert words in error_of(reply, status)["message"]
    assert reply.reason_phrase in ("Not Found", "Method Not Allowed")


def test_the_page_that_describes_the_api_has_every_field(server: Running) -> None:
    description = server.http.get("/openapi.json").json()
    assert description["info"]["version"] == server.http.get("/version").json()["version"]
    responses = description["paths"][CHAT]["post"]["responses"]
    assert set(responses) == {"200", "4XX", "5XX"} and "ErrorReply" in str(responses["4XX"])
    schemas = description["components"]["schemas"]
    assert {"messages", "max_completion_tokens", "temperature"} <= set(schemas["ChatRequest"]["properties"])
