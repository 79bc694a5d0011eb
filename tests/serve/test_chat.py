"""POST /v1/chat/completions: the same answers as the engine's, streamed and not."""

import base64
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from executor.engine.outputs import Completion
from executor.schedule.request import SamplingParams
from models.tiny.training import world
from tests.serve.conftest import Running
from tests.serve.scripted import ScriptedBackend

MESSAGES = [{"role": "user", "content": "What is a square?"}]

FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name: (what a request says, what the engine is told)
    "greedy": ({"temperature": 0}, {}),
    "nothing sent": ({}, {}),
    "sampled": ({"temperature": 1.3, "seed": 11, "top_k": 40, "top_p": 0.9}, {
        "temperature": 1.3, "seed": 11, "top_k": 40, "top_p": 0.9}),
    "all candidates": ({"temperature": 1.5, "seed": 2, "top_k": -1, "min_p": 0.05}, {
        "temperature": 1.5, "seed": 2, "min_p": 0.05}),
    "a seed below zero": ({"temperature": 1.5, "seed": -7}, {"temperature": 1.5, "seed": 2**64 - 7}),
    "do_sample false": ({"do_sample": False, "temperature": 1.0}, {}),
    "three answers": ({"temperature": 1.0, "seed": 5, "n": 3}, {"temperature": 1.0, "seed": 5, "n": 3}),
    "penalties": ({"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25}, {
        "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25}),
    "on after the end": ({"ignore_eos": True, "temperature": 1.0, "seed": 1}, {
        "ignore_eos": True, "temperature": 1.0, "seed": 1}),
    "at least": ({"min_tokens": 9, "temperature": 1.0, "seed": 1}, {
        "min_new_tokens": 9, "temperature": 1.0, "seed": 1}),
    "neutral values": ({
        "logprobs": None, "top_logprobs": None, "ignore_eos": False, "repetition_penalty": 1.0, "n": 1, "user": "u",
        "response_format": {"type": "text"}, "parallel_tool_calls": False, "tools": None, "stop": None, "seed": None,
        "logit_bias": None, "best_of": 1, "use_beam_search": False, "modalities": ["text"], "functions": [],
        "truncate_prompt_tokens": None, "stream_options": None, "length_penalty": 1, "max_tokens": None,
        "chat_template_kwargs": {}, "mm_processor_kwargs": {}, "metadata": {}, "store": False, "frob": 1}, {}),
}  # fmt: skip


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_completion_tokens": 12, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(server: Running, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": MESSAGES, "max_completion_tokens": 12, "stream": True, **fields}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[Mapping[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that the chunks of a text answer add up to, as the whole reply has it."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert ["role" in part["delta"] for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [bool(part["finish_reason"]) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part["delta"]["content"] for part in parts[:-1])
    logprobs = None
    if parts[0]["logprobs"] is not None:
        logprobs = {"content": [x for part in parts for x in part["logprobs"]["content"]], "refusal": None}
    content = "".join(part["delta"]["content"] for part in parts)
    message = {"role": parts[0]["delta"]["role"], "content": content, "refusal": None}
    end = {key: parts[-1][key] for key in ("finish_reason", "stop_reason")}
    return {"index": index, "message": message, "logprobs": logprobs, **end}


def engine_answers(server: Running, messages: Any, **params: Any) -> Completion:
    """The engine's own, asked beside HTTP."""
    params = {"max_new_tokens": 12, **params}
    return server.service.backend.loop.submit(messages, SamplingParams(**params)).result(timeout_s=30)


@pytest.mark.parametrize("name", FIELDS)
def test_answers_are_the_engines_whole_and_streamed(server: Running, name: str) -> None:
    fields, params = FIELDS[name]
    expected = engine_answers(server, MESSAGES, **params)
    whole = ask(server, **fields)
    chunks = stream(server, **{**fields, "stream_options": {"include_usage": True}})
    assert tuple(choice["message"]["content"] for choice in whole["choices"]) == expected.texts
    assert [choice["finish_reason"] for choice in whole["choices"]] == [str(x) for x in expected.finish_reasons]
    for index, choice in enumerate(whole["choices"]):
        assert joined(chunks[:-1], index) == choice
    for usage in (whole["usage"], chunks[-1]["usage"]):
        assert usage["completion_tokens"] == expected.completion_tokens
        assert usage["prompt_tokens"] == expected.prompt_tokens
        assert usage["total_tokens"] == expected.completion_tokens + expected.prompt_tokens
    assert chunks[-1]["choices"] == []


def test_stops_by_text_and_by_token(server: Running) -> None:
    text = engine_answers(server, MESSAGES, ignore_eos=True, temperature=1.0, seed=1)
    character = next(c for c in text.text[1:] if c.isalnum())
    common = {"ignore_eos": True, "temperature": 1.0, "seed": 1}
    by_text = ask(server, stop=[character], **common)["choices"][0]
    assert by_text["finish_reason"] == "stop" and by_text["stop_reason"] == character
    assert by_text["message"]["content"] == text.text[: text.text.index(character)]
    assert joined(stream(server, stop=character, **common)) == by_text
    token_id = text.token_ids[0][3]
    by_token = ask(server, stop_token_ids=[token_id], **common)["choices"][0]
    assert by_token["finish_reason"] == "stop" and by_token["stop_reason"] == token_id


def test_pictures_by_data_url_before_and_after_the_text(server: Running, tmp_path: Path) -> None:
    sample = next(each for each in world.held_out(5, 20) if not each.scene.is_clip)
    world.write_picture(sample.scene, tmp_path / "a.png")
    url = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()  # it is a PNG
    question = {"type": "text", "text": sample.question.text}
    picture = {"type": "image_url", "image_url": {"url": url}}
    for parts in ([picture, question], [question, picture], [picture]):
        messages = [{"role": "user", "content": parts}]
        expected = engine_answers(server, messages)
        whole = ask(server, messages=messages)
        assert whole["choices"][0]["message"]["content"] == expected.text
        assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens > expected.vision_tokens > 0
        assert joined(stream(server, messages=messages)) == whole["choices"][0]
    again = ask(server, messages=messages)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] > 0


def test_logprobs_are_those_of_the_engine(server: Running) -> None:
    expected = engine_answers(server, MESSAGES, logprobs=2)
    whole = ask(server, logprobs=True, top_logprobs=2)["choices"][0]
    entries = whole["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [each.logprob for each in expected.logprobs[0]]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode().startswith(whole["message"]["content"])
    assert "".join(entry["token"] for entry in entries) == data.decode()
    assert joined(stream(server, logprobs=True, top_logprobs=2)) == whole
    bare = ask(server, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in bare] == [entry["logprob"] for entry in entries]
    assert bare[0]["top_logprobs"] == []


def test_without_a_bound_the_answer_may_fill_the_context(server: Running) -> None:
    nearly = [{"role": "user", "content": "a " * (server.service.max_model_len - 60)}]
    whole = ask(server, messages=nearly, max_completion_tokens=None, ignore_eos=True)
    assert whole["usage"]["completion_tokens"] > 12
    assert whole["usage"]["total_tokens"] == server.service.max_model_len
    assert whole["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_outranks_max_tokens(server: Running) -> None:
    usage = ask(server, max_completion_tokens=3, max_tokens=7, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 3
    assert ask(server, max_completion_tokens=None, max_tokens=7, ignore_eos=True)["usage"]["completion_tokens"] == 7


def test_usage_goes_on_with_every_chunk_where_asked(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(server, stream_options=options, temperature=1.0, seed=3, ignore_eos=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12
    assert "usage" not in stream(server)[-1]


def test_the_other_name_and_every_field_of_a_reply(server: Running) -> None:
    reply = server.http.post("/chat/completions", json={"messages": MESSAGES, "max_tokens": 2}).json()
    assert reply["object"] == "chat.completion" and reply["model"] == server.service.model_name
    assert reply["id"].startswith("chatcmpl-") and reply["created"] > 1_700_000_000
    chunk = stream(server)[0]
    assert chunk["object"] == "chat.completion.chunk" and set(chunk) == {"id", "object", "created", "model", "choices"}


def test_the_bytes_on_the_wire(server: Running) -> None:
    """Each event is one HTTP chunk, `data: {json}` and two line feeds; the connection stays open."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 6, "temperature": 1.2, "seed": 4, "stream": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for _ in range(2):
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += connection.recv(65536)
            head, _, rest = received.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"transfer-encoding: chunked" in head
            events = []
            while rest:
                size, _, rest = rest.partition(b"\r\n")
                events.append(rest[: int(size, 16)])
                assert rest[int(size, 16) :].startswith(b"\r\n")
                rest = rest[int(size, 16) + 2 :]
            assert events[-1] == b"" and events[-2] == b"data: [DONE]\n\n"
            for event in events[:-2]:
                assert event.startswith(b'data: {"id":"chatcmpl-') and event.endswith(b"}\n\n")
                assert event.count(b"\n") == 2 and b"\r" not in event
                assert json.loads(event.removeprefix(b"data: "))["choices"][0]["index"] == 0


TOOLS = [{"type": "function", "function": {"name": "locate", "parameters": {"type": "object"}}}]
CALL = [
    "Look.\n",
    "<tool_call>\n",
    '{"name": "locate", "arg',
    'uments": {"what": "',
    "sq",
    'uare"}}\n',
    "</tool_call>",
    "",
]


def test_calls_are_shown_whole_and_as_they_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "backend", ScriptedBackend(CALL))
    whole = ask(server, tools=TOOLS)["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] == "Look."
    (call,) = whole["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "locate", "arguments": '{"what": "square"}'}
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(server, tools=TOOLS)]
    assert deltas[0] == {"role": "assistant", "content": "Look."}
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "locate" and parts[0]["id"] and parts[0]["type"] == "function"
    assert all(part["index"] == 0 and set(part) == {"index", "function"} for part in parts[1:])
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"what": "square"}
    assert not server.service.backend.asks[0].prompt.tools[0].keys() - TOOLS[0].keys()
    plain = ask(server, tools=TOOLS, tool_choice="none")["choices"][0]
    assert "tool_calls" not in plain["message"] and "<tool_call>" in plain["message"]["content"]
    assert plain["finish_reason"] == "stop" and not server.service.backend.asks[-1].prompt.tools


def test_a_fault_before_the_first_token_has_its_status(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service, "backend", ScriptedBackend((), failure="a step failed"))
    for streams in (False, True):
        reply = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": streams})
        assert reply.status_code == 500 and "a step failed" in reply.json()["error"]["message"]


def test_a_fault_after_it_is_an_error_event_and_a_broken_connection(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "backend", ScriptedBackend(["one", " two"], failure="a step failed"))
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    lines = []
    with (
        pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"),
        server.http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        for line in reply.iter_lines():
            lines += [json.loads(line.removeprefix("data: "))] if line else []
    assert [line["choices"][0]["delta"]["content"] for line in lines[:-1]] == ["one", " two"]
    assert all(line["choices"][0]["finish_reason"] is None for line in lines[:-1])
    assert set(lines[-1]) == {"error"} and "a step failed" in lines[-1]["error"]["message"]


def test_what_a_conversation_says_of_its_template_and_media_is_handed_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "backend", ScriptedBackend(["a"]))
    ask(
        server, continue_final_message=True, enable_thinking=False, chat_template_kwargs={"x": 1},
        mm_processor_kwargs={"max_pixels": 4096, "fps": None},
        media_io_kwargs={"video": {"num_frames": 4}},
    )  # fmt: skip
    prompt = server.service.backend.asks[0].prompt
    assert prompt.continue_final_message and not prompt.add_generation_prompt
    assert prompt.template_kwargs == {"x": 1, "enable_thinking": False}
    assert prompt.media_options["max_pixels"] == 4096
    assert prompt.media_options["media_io_kwargs"] == {"video": {"num_frames": 4}}
    ask(server, add_generation_prompt=False)
    assert not server.service.backend.asks[1].prompt.add_generation_prompt
