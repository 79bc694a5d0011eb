"""POST /v1/chat/completions: the same answers as the engine's, streamed and not."""

import json

from tests.serve.conftest import Running

MESSAGES = [{"role": "user", "content": "What is a square?"}]


def answer_of(server: Running) -> str:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_the_stream_joined_is_the_whole_answer(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] >= 1
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert deltas[0]["delta"]["role"] == "assistant" and deltas[-1]["finish_reason"] in ("stop", "length")
    assert "".join(delta["delta"]["content"] for delta in deltas) == answer_of(server)
