"""POST /v1/completions: texts without a template, their logprobs, several prompts, streamed and not."""

import json
from typing import Any

import pytest

from tests.serve.conftest import TINY, Running

TINY_PAD = json.loads((TINY / "config.json").read_text())["image_token_id"]
QUESTION = "<|im_start|>user\nWhat is a square?<|im_end|>\n<|im_start|>assistant\n"
ASK = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0}


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    reply = server.http.post("/v1/completions", json={**ASK, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(server: Running, **fields: Any) -> list[dict[str, Any]]:
    body = {**ASK, "stream": True, "stream_options": {"include_usage": True}, **fields}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that the chunks add up to, as the whole reply has it."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    assert all(part["text"] or part["finish_reason"] for part in parts)
    assert [bool(part["finish_reason"]) for part in parts] == [False] * (len(parts) - 1) + [True]
    logprobs = None
    if parts[0]["logprobs"] is not None:
        logprobs = {key: [x for part in parts for x in part["logprobs"][key]] for key in parts[0]["logprobs"]}
    return {**parts[-1], "text": "".join(part["text"] for part in parts), "logprobs": logprobs}


def test_a_chat_written_out_is_answered_as_the_chat(server: Running) -> None:
    chat = {"messages": [{"role": "user", "content": "What is a square?"}], "max_tokens": 8, "temperature": 0}
    expected = server.http.post("/v1/chat/completions", json=chat).json()
    reply = complete(server)
    assert reply["choices"][0]["text"] == expected["choices"][0]["message"]["content"]
    assert reply["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    assert reply["object"] == "text_completion"


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"logprobs": 2}, {"echo": True}])
def test_the_stream_joined_is_the_whole_reply(server: Running, more: dict[str, Any]) -> None:
    whole, chunks = complete(server, **more), streamed(server, **more)
    for index, choice in enumerate(whole["choices"]):
        assert joined(chunks[:-1], index) == choice
    assert chunks[-1]["choices"] == [] and {**chunks[-1]["usage"], "prompt_tokens_details": 0} == {
        **whole["usage"],
        "prompt_tokens_details": 0,
    }


def test_several_prompts_are_answered_in_their_order_as_alone(server: Running) -> None:
    prompts = [QUESTION, QUESTION.replace("square", "circle"), "Once"]
    alone = [complete(server, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    together = complete(server, prompt=prompts)
    assert [choice["text"] for choice in together["choices"]] == alone
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    chunks = streamed(server, prompt=prompts)
    assert [joined(chunks[:-1], index)["text"] for index in range(3)] == alone
    assert chunks[-1]["usage"]["prompt_tokens"] == together["usage"]["prompt_tokens"]


def test_token_ids_are_a_prompt_as_the_text_that_they_stand_for(server: Running) -> None:
    token_ids = server.http.post("/tokenize", json={"prompt": QUESTION}).json()["tokens"]
    expected = complete(server)["choices"][0]["text"]
    assert complete(server, prompt=token_ids)["choices"][0]["text"] == expected
    both = complete(server, prompt=[token_ids, token_ids[:-1]])["choices"]
    assert both[0]["text"] == expected and len(both) == 2


def test_a_placeholder_without_a_picture_is_text(server: Running) -> None:
    """Random prompts of benchmarks hold them."""
    reply = complete(server, prompt="a <|image_pad|>", echo=True, logprobs=0, max_tokens=1)
    choice = reply["choices"][0]
    assert "".join(choice["logprobs"]["tokens"][:-1]) == "a <|image_pad|>"
    assert reply["usage"]["prompt_tokens"] == len(choice["logprobs"]["tokens"]) - 1 > 3


def test_logprobs_are_parallel_lists_over_the_text(server: Running) -> None:
    choice = complete(server, logprobs=2)["choices"][0]
    lists = choice["logprobs"]
    assert len({len(each) for each in lists.values()}) == 1
    for token, logprob, best, offset in zip(*lists.values(), strict=True):
        assert best[token] == logprob <= 0 and len(best) in (2, 3) and logprob == max(best.values())
        assert choice["text"].startswith(token, offset) or token == "<|im_end|>"


def test_echo_gives_the_prompt_back_with_its_logprobs(server: Running) -> None:
    choice = complete(server, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == QUESTION + complete(server)["choices"][0]["text"]
    lists = choice["logprobs"]
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in lists["token_logprobs"][1:])
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset) or token == "<|im_end|>"
    chunks = streamed(server, echo=True, logprobs=1)
    assert joined(chunks[:-1]) == choice


def test_echo_of_no_tokens_scores_the_prompt_alone(server: Running) -> None:
    reply = complete(server, echo=True, logprobs=1, max_tokens=0)
    choice = reply["choices"][0]
    assert choice["text"] == QUESTION and "".join(choice["logprobs"]["tokens"]) == QUESTION
    assert reply["usage"]["completion_tokens"] == 0
    longer = complete(server, echo=True, logprobs=1)["choices"][0]["logprobs"]
    count = len(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"] == longer["token_logprobs"][:count]
    assert joined(streamed(server, echo=True, logprobs=1, max_tokens=0)[:-1]) == choice


def test_without_a_number_it_stops_at_the_protocols_default(server: Running) -> None:
    reply = complete(server, max_tokens=None, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 16 and reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "suffix"),
        ({"best_of": 3}, "best_of", "best_of is 3"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [10**9]}, None, "1000000000"),
        ({"prompt": [True]}, None, "prompt"),
        ({"prompt": None}, None, "prompt"),
        ({"prompt": [7, TINY_PAD]}, None, "stands for a picture"),
        ({"logprobs": 99}, "logprobs", "99"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 10**6}, "max_tokens", "maximum context length is 2048"),
        ({"model": "other"}, "model", "other"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused(
    server: Running, fields: dict[str, Any], param: str | None, words: str, stream: bool
) -> None:
    reply = server.http.post("/v1/completions", json={**ASK, "stream": stream, **fields})
    error = reply.json()["error"]
    assert reply.status_code == (404 if "model" in fields else 400) and words in error["message"]
    assert param is None or error["param"] == param
