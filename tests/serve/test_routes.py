"""All routes that complete text answer the same question alike."""

from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.test_generate import PICTURE

QUESTION = "Describe the picture."
PICTURE_DATA = PICTURE.partition(",")[2]


def post(server: Running, path: str, **body: Any) -> dict[str, Any]:
    reply = server.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.2, "seed": 11, "top_p": 0.9, "top_k": 40}])
def test_a_question_about_a_picture(server: Running, fields: dict[str, Any]) -> None:
    fields = {**fields, "repetition_penalty": 1.1}
    text, url = {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": PICTURE}}
    messages = [{"role": "user", "content": [url, text]}]
    chat = post(server, "/v1/chat/completions", messages=messages, max_tokens=24, **fields)
    expected, num_prompt = chat["choices"][0]["message"]["content"], chat["usage"]["prompt_tokens"]
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE},
                                          {"type": "input_text", "text": QUESTION}]}]  # fmt: skip
    response = post(server, "/v1/responses", input=items, max_output_tokens=24, **fields)
    assert response["output"][0]["content"][0]["text"] == expected
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE_DATA}
    blocks = [{"role": "user", "content": [{"type": "image", "source": source}, text]}]
    message = post(server, "/v1/messages", messages=blocks, max_tokens=24, **fields)
    assert message["content"][0]["text"] == expected
    generated = post(server, "/generate", prompt=[url, text], max_tokens=24, **fields)
    assert generated["text"] == [f"{QUESTION} {expected}"]
    assert response["usage"]["input_tokens"] == num_prompt
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] == num_prompt
    assert post(server, "/tokenize", messages=messages)["count"] == num_prompt
    assert post(server, "/v1/messages/count_tokens", messages=blocks)["input_tokens"] == num_prompt


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.2, "seed": 11, "min_tokens": 5}])
def test_a_question_in_words(server: Running, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = post(server, "/v1/chat/completions", messages=messages, max_tokens=24, **fields)
    expected = chat["choices"][0]["message"]["content"]
    token_ids = post(server, "/tokenize", messages=messages)["tokens"]
    prompt = post(server, "/detokenize", tokens=token_ids)["prompt"]
    for given in (prompt, token_ids, [prompt], [token_ids]):
        plain = post(server, "/v1/completions", prompt=given, max_tokens=24, **fields)
        assert (
            plain["choices"][0]["text"] == expected and plain["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
        )
    assert post(server, "/generate", prompt=prompt, max_tokens=24, **fields)["text"] == [f"{prompt} {expected}"]
