"""POST /generate: MindIE's form, with the bodies that its documents send (rewritten; pictures of the little world)."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from executor.engine.engine import Engine
from tests.reference import REPO
from tests.serve.conftest import Running, start

MEDIA = REPO / "dataset/media"
LIMITS = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_engine: Engine) -> Iterator[Running]:
    """One that may read the files of the documents' requests."""
    with start(tiny_engine, allowed_local_media_path=str(MEDIA)) as running:
        yield running


def data_url(name: str, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((MEDIA / name).read_bytes()).decode()}"


PICTURE = data_url("objects.png", "image/png")
CLIP = data_url("clip.mp4", "video/mp4")
QUESTION = "What color is the square?"
SQUARE = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": PICTURE}]


def generate(server: Running, prompt: Any, **fields: Any) -> list[str]:
    reply = server.http.post("/generate", json={"prompt": prompt, **LIMITS, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["text"]


def streamed(server: Running, prompt: Any, **fields: Any) -> list[list[str]]:
    """The texts of each object of a stream."""
    body = {"prompt": prompt, **LIMITS, "stream": True, **fields}
    with server.http.stream("POST", "/generate", json=body) as reply:
        assert reply.status_code == 200
        text = "".join(reply.iter_text())
    assert text.endswith("\0")
    objects = [json.loads(each) for each in text.removesuffix("\0").split("\0")]
    assert all(list(each) == ["text"] for each in objects)
    return [each["text"] for each in objects]


def chat(server: Running, content: Any) -> str:
    body = {"messages": [{"role": "user", "content": content}], **LIMITS}
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_a_list_of_parts_is_answered_as_a_users_message(server: Running) -> None:
    assert chat(server, SQUARE) == "blue"
    assert generate(server, SQUARE) == [f"{QUESTION} blue"]
    assert generate(server, SQUARE[::-1]) == [f"{QUESTION} {chat(server, SQUARE[::-1])}"]
    for address in (str(MEDIA / "objects.png"), f"file://{MEDIA / 'objects.png'}"):
        for value in (address, {"url": address}):
            assert generate(server, [SQUARE[0], {"type": "image_url", "image_url": value}]) == [f"{QUESTION} blue"]


def test_a_video_is_a_part_as_well(server: Running) -> None:
    parts = [{"type": "text", "text": "What moves?"}, {"type": "video_url", "video_url": {"url": CLIP}}]
    assert generate(server, parts) == [f"What moves? {chat(server, parts)}"]


def test_a_text_is_answered_without_a_template(server: Running) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    completion = server.http.post("/v1/completions", json={"prompt": prompt, **LIMITS}).json()["choices"][0]["text"]
    assert generate(server, prompt) == [f"{prompt} {completion}"] and completion == chat(server, QUESTION)


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.0, "seed": 5, "best_of": 3}])
def test_a_stream_holds_the_answers_alone(server: Running, fields: dict[str, Any]) -> None:
    whole = generate(server, SQUARE, **fields)
    texts = streamed(server, SQUARE, **fields)
    joined = ["".join(column) for column in zip(*texts, strict=True)]
    assert [f"{QUESTION} {answer}" for answer in joined] == whole and all(any(each) for each in texts)


def test_an_empty_answer_is_an_object_too(server: Running) -> None:
    assert streamed(server, SQUARE, stop="b") == [[""]]
    assert generate(server, SQUARE, stop="b") == [f"{QUESTION} "]


@pytest.mark.parametrize(
    "body",
    [
        # Qwen3-VL of MindIE: a picture and a video by /generate, a picture by the chat route.
        {"prompt": SQUARE, "max_tokens": 8, "model": "qwen3_vl"},
        {"prompt": [{"type": "text", "text": "What moves?"}, {"type": "video_url", "video_url": CLIP}],
         "max_tokens": 8, "model": "qwen3_vl"},
        # MindIE's own documents: every sampling field, null or not.
        {"prompt": "Once", "max_tokens": 8, "repetition_penalty": 1.03, "presence_penalty": 1.2,
         "frequency_penalty": 1.2, "temperature": 0.5, "top_p": 0.95, "top_k": 10, "seed": None, "stream": False,
         "stop": None, "stop_token_ids": None, "model": "None", "include_stop_str_in_output": False,
         "skip_special_tokens": True, "ignore_eos": False, "best_of": 2, "n": 2},
    ],
)  # fmt: skip
def test_the_bodies_of_the_documents_are_answered(server: Running, body: dict[str, Any]) -> None:
    """As curl sends them with -d and no header of their own."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = server.http.post("/generate", content=json.dumps(body), headers=form)
    assert reply.status_code == 200 and len(reply.json()["text"]) == body.get("n", 1)


def test_the_documents_chats_are_answered(server: Running) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    mindie = {
        "model": "qwen3_vl",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": PICTURE}, SQUARE[0]]}],
        "max_tokens": 8, "temperature": 1.0, "top_p": 0.5, "stream": False, "repetition_penalty": 1.0, "top_k": 10,
        "do_sample": False,
    }  # fmt: skip
    ascend = {
        "model": "qwen3_vl",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, SQUARE[0]]},
        ],
    }
    for body, headers in ((mindie, form), (ascend, {"Content-Type": "application/json"})):
        reply = server.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
        assert reply.json()["choices"][0]["message"]["content"] == "blue"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [{"type": "image_url"}]}, "image"),
        ({"prompt": [{"type": "sound"}]}, "sound"),
        ({"prompt": "a", "n": 2, "best_of": 3}, "best_of is 3"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ],
)
def test_what_cannot_be_answered_is_refused(server: Running, body: dict[str, Any], words: str) -> None:
    reply = server.http.post("/generate", json={"stream": True, **body})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_another_model_is_not_served(server: Running) -> None:
    assert server.http.post("/generate", json={"prompt": "a", "model": "other"}).status_code == 404
