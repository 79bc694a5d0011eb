"""POST /tokenize and /detokenize: the checkpoint's own tokens, and a chat's as it is charged."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.serve.conftest import TINY, Running

TEXTS = [
    "What is a square?",
    "<|im_start|>user\n<|image_pad|> <tool_call> 中文 é\n\n  x<|endoftext|>",
    "",
    "<|im_end|",
    "\U000f0000 <|im_start|>",
]


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def post(server: Running, path: str, **body: Any) -> dict[str, Any]:
    reply = server.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_a_prompts_tokens_are_the_checkpoints(
    server: Running, reference: Any, text: str, add_special_tokens: bool
) -> None:
    expected = reference(text, add_special_tokens=add_special_tokens)["input_ids"]
    answer = post(server, "/tokenize", prompt=text, add_special_tokens=add_special_tokens, return_token_strs=True)
    assert answer["tokens"] == expected and answer["count"] == len(expected) and answer["max_model_len"] == 2048
    assert answer["token_strs"] == reference.convert_ids_to_tokens(expected)
    assert post(server, "/detokenize", tokens=expected)["prompt"] == reference.decode(expected)


def test_messages_have_as_many_tokens_as_the_chat_is_charged(server: Running) -> None:
    messages = [{"role": "user", "content": "What is <|im_end|> a square?"}]
    chat = {"messages": messages, "max_tokens": 1}
    charged = server.http.post("/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
    answer = post(server, "/tokenize", messages=messages)
    assert answer["count"] == charged and answer["token_strs"] is None
    shorter = post(server, "/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    assert answer["tokens"][: len(shorter)] == shorter and len(shorter) < charged


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"prompt": 7}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [10**30]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["1"]}),
        ("/detokenize", {}),
    ],
)
def test_what_cannot_be_read_is_refused(server: Running, path: str, body: dict[str, Any]) -> None:
    reply = server.http.post(path, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
