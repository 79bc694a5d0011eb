"""Samples as requests: what the engine is asked offline and what a server is asked over HTTP are the same."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from dataset.load import load_dataset
from dataset.sample import Sample
from executor.bench.bodies import chat_body, sampling_fields
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from tests.reference import REPO

MEDIA = REPO / "dataset/media"


def recipe_of(generation: dict | None = None, **data):
    return build_recipe(
        {
            "model_config": {"model_path": str(REPO / "models/tiny/qwen3_vl")},
            "generation_config": generation or {},
            "data_config": data,
        }
    )


def body_of(*content, recipe=None, **sample) -> dict:
    messages = ({"role": "user", "content": list(content)},)
    return json.loads(chat_body(Sample("x", messages, **sample), recipe or recipe_of(), "name"))


def test_a_text():
    body = body_of({"type": "text", "text": "Hé?"})
    assert body == {
        "model": "name",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hé?"}]}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    "said, fields",
    [
        ({"max_new_tokens": 5, "min_new_tokens": 2}, {"max_tokens": 5, "min_tokens": 2}),
        ({"ignore_eos": True, "stop": ["a"], "seed": 3}, {"ignore_eos": True, "stop": ["a"], "seed": 3}),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0}),
        ({"do_sample": True}, {}),
        ({"logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"draw": True, "temperature": None}, {}),
    ],
)
def test_how_answers_are_chosen(said, fields):
    assert sampling_fields(said) == fields


def test_a_sample_says_more_than_the_recipe():
    recipe = recipe_of({"max_new_tokens": 5, "temperature": 0.0})
    body = body_of({"type": "text", "text": "a"}, recipe=recipe, generation={"max_new_tokens": 9})
    assert (body["max_tokens"], body["temperature"]) == (9, 0.0)


def test_system_text_tools_and_template():
    recipe = recipe_of(system_prompt="Be brief.", chat_template_kwargs={"a": 1, "b": 1})
    tools = ({"type": "function", "function": {"name": "f"}},)
    body = body_of({"type": "text", "text": "a"}, recipe=recipe, tools=tools, template_kwargs={"b": 2})
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["tools"] == list(tools) and body["chat_template_kwargs"] == {"a": 1, "b": 2}
    own = Sample("x", ({"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}))
    assert [message["role"] for message in json.loads(chat_body(own, recipe, "m"))["messages"]] == ["system", "user"]


def payload(part: dict) -> tuple[str, bytes]:
    url = part[part["type"]]["url"]
    header, _, text = url.partition(",")
    return header, base64.b64decode(text)


@pytest.mark.parametrize(
    "part, header, name",
    [
        ({"type": "image", "image": str(MEDIA / "objects.png")}, "data:image/png;base64", "objects.png"),
        ({"type": "image", "image": f"file://{MEDIA / 'number.jpg'}"}, "data:image/jpeg;base64", "number.jpg"),
        ({"type": "image", "image": (MEDIA / "objects.png").read_bytes()}, "data:image/png;base64", "objects.png"),
        ({"type": "image_url", "image_url": {"url": f"{MEDIA}/word.png"}}, "data:image/png;base64", "word.png"),
        ({"image": str(MEDIA / "objects.png")}, "data:image/png;base64", "objects.png"),
        ({"type": "video", "video": str(MEDIA / "clip.mp4")}, "data:video/mp4;base64", "clip.mp4"),
    ],
)  # fmt: skip
def test_files_are_sent_along(part, header, name):
    (sent,) = body_of(part)["messages"][0]["content"]
    assert sent["type"] == ("video_url" if "video" in header else "image_url")
    assert payload(sent) == (header, (MEDIA / name).read_bytes())


def test_addresses_stay_and_options_stand_beside():
    part = {"type": "image", "image": "https://example.org/a.png", "max_pixels": 1024}
    video = {"type": "video", "video": "data:video/mp4;base64,AAAA", "fps": 1}
    assert body_of(part, video)["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}, "max_pixels": 1024},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "fps": 1},
    ]


def test_frames_of_a_video(tmp_path):
    frames = []
    for number in range(3):
        frames.append(str(tmp_path / f"{number}.jpg"))
        Image.new("RGB", (32, 32), (number, 0, 0)).save(frames[-1])
    (sent,) = body_of({"type": "video", "video": frames})["messages"][0]["content"]
    header, _, text = sent["video_url"]["url"].partition(",")
    assert header == "data:video/jpeg;base64" and len(text.split(",")) == 3
    assert Image.open(io.BytesIO(base64.b64decode(text.split(",")[2]))).size == (32, 32)
    with pytest.raises(UserError, match="are sent as JPEG"):
        body_of({"type": "video", "video": [str(MEDIA / "objects.png")]})


@pytest.mark.parametrize(
    "sample, words",
    [
        (Sample("x", error="x:1: broken"), "x:1: broken"),
        (
            Sample("x", ({"role": "user", "content": [{"type": "image", "image": "/nowhere/a.png"}]},)),
            "/nowhere/a.png cannot be read: No such file",
        ),
    ],
)
def test_what_cannot_be_sent(sample, words):
    with pytest.raises(UserError, match=words):
        chat_body(sample, recipe_of(), "name")


def test_the_requests_of_the_data_sets_are_sent_as_they_are(tmp_path):
    """Rows in AISBench's form, and those of the default set."""
    rows = tmp_path / "mm_custom.jsonl"
    rows.write_text(
        json.dumps({"type": "image", "path": str(MEDIA / "objects.png"), "question": "What?", "answer": "x"})
    )
    for data in ({}, {"dataset": "jsonl", "dataset_path": str(rows)}):
        recipe = recipe_of(**data)
        for sample in load_dataset(recipe.data, recipe):
            body = json.loads(chat_body(sample, recipe, "name"))
            sent = [part for part in body["messages"][-1]["content"] if part["type"] != "text"]
            assert len(sent) == len(sample.media_parts)
            for part, asked in zip(sent, sample.media_parts, strict=True):
                (source,) = (asked[key] for key in ("image", "video") if key in asked)
                assert payload(part)[1] == Path(source).read_bytes()
