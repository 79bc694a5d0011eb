"""A data set with rows of every odd form between good ones: the good are answered, each bad one has its own error."""

import base64
import io
import json
import os
from pathlib import Path

import pytest

from dataset.entries import MEDIA_KEYS, TEXT_KEYS, read_entry
from dataset.load import load_dataset
from dataset.options import GENERATION_KEYS, OPTION_KEYS
from executor.commands.build import engine_of
from executor.commands.generate import run as generate
from executor.commands.generate.ask import ask
from executor.errors import UserError
from executor.recipe.schema import Recipe, build_recipe
from executor.schedule.request import SamplingParams
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
PICTURE = str(MEDIA / "objects.png")
CLIP = str(MEDIA / "clip.mp4")
GOOD = {"question": "How many objects are there?", "image": str(MEDIA / "objects_2.jpg")}
TOOL = {"type": "function", "function": {"name": "look_closer", "parameters": {"type": "object", "properties": {}}}}
JPEG = base64.b64encode((MEDIA / "objects_2.jpg").read_bytes()).decode()
CALL = {"id": "1", "type": "function", "function": {"name": "look_closer", "arguments": "{}"}}


def user(*content: object) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


# Forms that official tools, clients and data sets write: all answered.
ANSWERED = [
    {"messages": user("What do you see?")},
    {"question": ["What do you see?"]},
    {"question": {"type": "text", "text": "What do you see?"}},
    {"messages": [{"role": "user", "content": {"type": "text", "text": "What do you see?"}}]},
    {
        "messages": user(
            {"type": "text", "text": "What?", "image": None, "video": None}, {"image": PICTURE, "text": None}
        )
    },
    {"messages": user({"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}, "uuid": "u"}, "What?")},
    {"messages": user({"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}})},
    {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What?"}]},
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": None}, *user("And now?")]},
    {"messages": [{"role": "user", "content": "<video> or <image>?"}], "images": [PICTURE], "videos": [CLIP]},
    {"messages": [{"role": "user", "content": "<image>What?", "images": [PICTURE]}]},
    {"question": "What?", "videos": [[PICTURE, f"file://{PICTURE}"]]},
    {"question": "What?", "video": [PICTURE, PICTURE, PICTURE]},
    {"question": "What?", "video": f"data:video/jpeg;base64,{JPEG},{JPEG},{JPEG}"},
    {"messages": user({"type": "video", "video": ["near.png", "file://near.png"], "sample_fps": 1}, "What?")},
    {"messages": user({"type": "video", "video": CLIP, "nframes": 5, "total_pixels": 50_000, "min_pixels": 1024}, "?")},
    {"messages": user({"type": "video", "video": CLIP, "video_start": 0.5, "video_end": 1.5, "max_frames": 6}, "?")},
    {"messages": user({"type": "image", "image": PICTURE, "resized_height": 70, "resized_width": 100}, "What?")},
    {"question": "What?", "video": CLIP, "fps": 1, "resized_height": 64, "resized_width": 64},
    {"question": "What?", "system": "Be brief.", "max_new_tokens": 2, "temperature": 0.5, "seed": 3, "id": 7},
    {"question": "What?", "generation_config": {"max_tokens": 3, "n": 2, "do_sample": True}},
    {"question": "What?", "image": PICTURE, "tools": [TOOL], "category": "x", "unheard_of": {"a": 1}},
    {"messages": [*user("Look."), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "nothing"}]},
    {"question": "What?", "video": {"path": CLIP, "fps": 1, "max_frames": 4}},
    {
        "question": "What?",
        "media": [{"type": "video", "video": [PICTURE, PICTURE]}, {"image": PICTURE, "detail": "high"}],
    },
    {"messages": user({"type": "image", "image": {"bytes": None, "path": PICTURE, "max_pixels": 8000}}, "What?")},
    {
        "custom_id": "a",
        "url": "/v1",
        "body": {"model": "m", "messages": user("What?"), "max_tokens": 2, "stream": False},
    },
    {"question": "What?", "response_format": {"type": "text"}, "tool_choice": "auto", "logit_bias": {}},
    {"type": "image", "path": [PICTURE], "question": "What?", "answer": "objects"},
    {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}], "system": ""},
    {"messages": json.dumps([{"role": "user", "content": "What?"}])},
    {"conversations": json.dumps([{"from": "human", "value": "<image>What?"}]), "image": PICTURE},
    {"prompt": json.dumps([{"role": "user", "content": "What?"}]), "best_of": 1, "function_call": "auto"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]},
    {"messages": [{"role": "user", "name": "Ada", "content": "What?"}]},
    {
        "question": '["is", "this", "JSON?"]',
        "top_logprobs": 0,
        "image_path": "nowhere.png",
        "notes": "near.png is fine",
    },
    "What do you see?",
]
# What cannot be asked, with what its error says.
REFUSED = [
    *(
        ({"question": "?", key: value}, f"the image under '{key}' would not be looked at: did you mean 'image'?")
        for key, value in [
            *(("image_path", PICTURE), ("img", "near.png"), ("images_path", ["near.png"]), ("pic", {"path": PICTURE})),
            *(
                ("image_urls", "https://example.com/a.jpg?b=1"),
                ("file_name", f"file://{PICTURE}"),
                ("path", "near.png"),
            ),
            ("photo", f"data:image/png;base64,{JPEG}"),
        ]
    ),
    ({"question": "?", "image": PICTURE, "clip": CLIP}, "the video under 'clip' would not be looked at"),
    *(
        ({"question": "?", key: value}, f"{key} is not supported in a row")
        for key, value in [
            *(("function_call", {"name": "f"}), ("functions", [TOOL]), ("top_logprobs", 3), ("best_of", 4)),
            *(("raw_fps", 24), ("num_beams", 2), ("enable_thinking", True), ("length_penalty", 0.5)),
        ]
    ),
    (
        {
            "messages": [
                *user("x"),
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                *user("y"),
            ]
        },
        "function_call is not supported",
    ),
    (
        {"messages": "What?"},
        'messages must be a list of messages with role and content, or its JSON text; got "What?"',
    ),
    ({"messages": '[{"role": "user"'}, "or its JSON text"),
    ({"conversations": '["a", "b"]'}, "or its JSON text"),
    ({"question": "?", "temperature": float("nan")}, "generation_config.temperature: got nan (number)"),
    ({"question": "?", "generation_config": {"top_p": float("nan")}}, "generation_config.top_p: got nan (number)"),
    (7, "an entry is a text or an object, got a int"),
    (None, "an entry is a text or an object, got a NoneType"),
    ([], "an entry is a text or an object, got a list"),
    ({}, "there is no question"),
    ({"question": "half \ud83d"}, r"half a character (half \ud83d)"),
    ({"question": 5}, "question must be a text that is not empty"),
    ({"question": [5]}, "question[0] must be a text or an object with a type"),
    ({"messages": user({"type": ["text"], "text": "x"})}, "content[0].type must be a text"),
    ({"messages": user({"type": "input_audio", "input_audio": {}})}, "unknown part type 'input_audio'"),
    ({"messages": user({"type": "image", "image": [PICTURE]})}, "one part holds one picture"),
    ({"messages": user({"type": "image", "image": PICTURE, "image_url": PICTURE})}, "one part holds one image"),
    ({"messages": user({"type": "image", "image": "nope.png"})}, "there is no file nope.png"),
    ({"messages": user({"image": PICTURE, "detail": "most"})}, "detail must be one of auto, high, low"),
    ({"messages": user({"video": CLIP, "fps": float("nan")})}, "fps must be a number from 0.001 to 10000"),
    ({"messages": user({"video": CLIP, "nframes": 1})}, "nframes counts in pairs"),
    ({"messages": user({"video": CLIP, "video_start": 9, "video_end": 2})}, "video_start 9 is not before video_end 2"),
    ({"messages": user({"video": CLIP, "video_start": 3600})}, "fewer than two frames"),
    ({"messages": user({"video": [PICTURE], "video_end": 2})}, "video_end is for a video file"),
    ({"messages": user({"image": PICTURE, "resized_height": 64})}, "resized_height and resized_width belong together"),
    ({"messages": user({"image": PICTURE, "min_pixels": 2**39, "max_pixels": 2**40})}, "would be resized to"),
    ({"question": "?", "video": CLIP, "min_frames": 10, "max_frames": 4}, "min_frames 10, max_frames 4"),
    ({"question": "?", "temperature": "hot"}, "generation_config.temperature: got 'hot' (text)"),
    ({"question": "?", "min_new_tokens": 500, "max_new_tokens": 3}, "generation_config.min_new_tokens is 500"),
    ({"question": "?", "stop_token_ids": [10**9]}, "generation_config.stop_token_ids holds 1000000000"),
    ({"question": "?", "max_tokens": 3, "max_new_tokens": 4}, "max_new_tokens is given twice"),
    ({"question": "?", "tools": [{"name": ""}]}, "tools[0] must be a JSON schema object"),
    ({"question": "?", "tools": "[broken"}, "tools: not valid JSON"),
    ({"question": "?", "images": [""]}, "named by an empty text"),
    (
        {"question": "?", "video": {"path": CLIP, "fsp": 1}},
        "unknown key 'fsp' of a picture or video (did you mean 'fps'?)",
    ),
    ({"question": "?", "video": {"path": CLIP, "fps": "fast"}}, "fps must be a number from 0.001 to 10000"),
    ({"question": "?", "response_format": {"type": "json_object"}}, "response_format is not supported in a row"),
    ({"question": "?", "audio": "a.wav"}, "audio is not supported"),
    (
        {"messages": [*user("Hm"), {"role": "assistant", "reasoning_content": "so", "content": "x"}, *user("?")]},
        "Thinking",
    ),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages holds no question of a user"),
    ({"messages": [*user("x"), {"role": "assistant", "tool_calls": "f"}, *user("y")]}, "tool_calls must be a list"),
    (
        {"question": "?", "system": "A", "messages": [{"role": "system", "content": "B"}, *user("x")]},
        "two system texts",
    ),
    ({"question": "?", "image": {"bytes": "!!"}}, "not base64"),
    ({"question": "?", "image": {"path": None}}, "needs bytes, url or path"),
    ({"question": "?", "images": [[PICTURE]]}, "got a list inside the list"),
    ({"question": "?", "videos": [[[PICTURE]]]}, "a frame of a video is one picture"),
    ({"question": "?", "image": "~nobody_of_this_name/x.png"}, "there is no file"),
    ({"question": "?", "image": "a\0b.png"}, "there is no file"),
    ({"question": "?", "chat_template_kwargs": {"tokenize": True}}, "may not set 'tokenize'"),
    ({"question": "?", "image": "https://example.com/a.png"}, "allowed_media_domains is empty; add the host"),
    ({"question": "?", "image": "data:image/png;base64,@@"}, "not valid base64"),
    ({"question": "?", "image": "pipe"}, "is no regular file"),
    ({"question": "?", "video": "/dev/zero"}, "is no regular file"),
    ({"question": "?", "image": "/dev/null"}, "is no regular file"),
    ({"question": "?", "video": "unreadable.mp4"}, "cannot be read"),
]
RAW = [
    (b'{"question": "cut', "not valid JSON"),
    (b'{"question": "\xc4\xe3"}', "iconv -f GB18030"),
    (b"[" * 100_000, "nested"),
    (b'{"question": "?", "n": ' + b"1" * 5000 + b"}", "not readable"),
]
# Every key with values it was not made for: prepared or refused by name. Those of generation_config also run.
VALUES = [None, "", "x", 0, -1, 1.5, 10**30, True, [], [None], [{}], [[]], {}, {"a": {}}, {"url": 5}, float("nan")]
FUZZ = [
    {"question": "What?", "image": PICTURE, key: value}
    for key in dict.fromkeys((*TEXT_KEYS, *MEDIA_KEYS, *OPTION_KEYS, "id", "answer", "type", "path"))
    for value in VALUES
]
PARTS = [
    {"messages": user({"type": kind, kind.removesuffix("_url"): source, key: value}, "What?")}
    for kind, source in (("image", PICTURE), ("video", [PICTURE]), ("text", "x"))
    for key in ("type", "text", "image", "image_url", "video", "url", "path", "fps", "nframes", "max_pixels", "detail")
    for value in VALUES
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "x", key: value}, {"role": "user", "content": "What?"}]}
    for key in (
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
        "images",
        "weight",
        "from",
    )
    for value in VALUES
]


def recipe_of(folder: Path, rows: list, **data: object) -> Recipe:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "mine.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return build_recipe(
        {
            "model_config": {"model_path": "models/tiny/qwen3_vl", "device": "cpu", "dtype": "float32"},
            "scheduler_config": {"max_num_seqs": 16, "block_size": 16, "max_model_len": 512},
            "generation_config": {"temperature": 0, "max_new_tokens": 2},
            "data_config": {"dataset": "jsonl", "dataset_path": str(folder / "mine.jsonl"), **data},
        }
    )


ENGINES: list = []


def one_engine(*opened: object) -> object:
    """The same engine for every run of this module."""
    if not ENGINES:
        ENGINES.append(engine_of(*opened))
    return ENGINES[0]


def answers(folder: Path, rows: list) -> tuple[list[dict], int]:
    document, status = generate.run(recipe_of(folder, rows), build=one_engine, out=io.StringIO())
    json.dumps(document, ensure_ascii=False).encode()
    return document["outputs"], status


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "near.png").write_bytes(Path(PICTURE).read_bytes())
    os.mkfifo(folder / "pipe")
    (folder / "unreadable.mp4").symlink_to("/proc/self/mem")
    return folder


def test_good_rows_between_odd_ones_are_all_answered(folder: Path) -> None:
    odd = [row for row, _ in REFUSED] + [row for row, _ in RAW]
    says = [words for _, words in REFUSED] + [words for _, words in RAW]
    rows = [GOOD]
    for index in range(max(len(odd), len(ANSWERED))):
        rows += [*odd[index : index + 1], *ANSWERED[index : index + 1]]
    rows.append(GOOD)
    assert len(rows) > 20
    found, status = answers(folder, rows)
    assert status == 2 and len(found) == len(rows)
    assert found[0]["text"] == found[-1]["text"] != ""
    refused = iter(says)
    for line, (row, row_given) in enumerate(zip(found, rows, strict=True), start=1):
        if row_given == GOOD or row_given in ANSWERED:
            assert row["error"] is None and row["completion_tokens"] > 0, (row_given, row["error"])
            continue
        words = next(refused)
        assert row["text"] is None
        assert row["error"].startswith(f"mine.jsonl:{line}"), row["error"]
        assert words in row["error"], (words, row["error"])


@pytest.mark.parametrize("rows", [FUZZ, PARTS, MESSAGES], ids=["rows", "parts", "messages"])
def test_every_key_with_values_it_was_not_made_for(folder: Path, rows: list[dict]) -> None:
    """Each is prepared or refused by name: none gets as far as the barrier for what nobody thought of."""
    answers(folder, [GOOD])
    recipe, engine = recipe_of(folder, rows), ENGINES[0]
    prepared = 0
    for index, sample in enumerate(load_dataset(recipe.data)):
        try:
            prepared += len(ask(engine, recipe, SamplingParams(), index, sample).prompt.token_ids) > 0
        except UserError as error:
            assert "the row cannot be" not in str(error), (rows[index], str(error))
    assert 0 < prepared < len(rows)


def test_sampling_parameters_of_every_value_run_or_are_refused(folder: Path) -> None:
    rows = [{"question": "What?", key: value} for key in GENERATION_KEYS for value in VALUES]
    found, _ = answers(folder, [*rows, GOOD])
    assert len(found) == len(rows) + 1 and found[-1]["error"] is None
    for line, row in enumerate(found, start=1):
        assert row["error"] is None or row["error"].startswith(f"mine.jsonl:{line}: "), row["error"]


def test_what_nobody_thought_of_is_the_rows_error_too(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    answers(folder, [GOOD])
    processor = ENGINES[0].processor
    build = type(processor).build
    for kind in (
        KeyError,
        AttributeError,
        OverflowError,
        UnicodeError,
        RecursionError,
        MemoryError,
        OSError,
        TypeError,
    ):

        def fails(self, messages, kind=kind, **more):
            if "odd" in str(messages):
                raise kind("unthought of")
            return build(self, messages, **more)

        monkeypatch.setattr(type(processor), "build", fails)
        with caplog.at_level("DEBUG"):
            found, status = answers(folder, [{"question": "odd"}, GOOD])
        assert status == 2 and found[1]["error"] is None
        assert found[0]["error"].startswith(f"mine.jsonl:1: the row cannot be prepared ({kind.__name__}:")
        assert "in fails" in caplog.text  # the traceback, for whoever looks for it


def test_a_defect_of_this_project_is_no_row_of_the_users(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    answers(folder, [GOOD])

    def defect(*given: object, **more: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(type(ENGINES[0].processor), "build", defect)
    with pytest.raises(AssertionError, match="ours"):
        answers(folder, [GOOD])


def test_a_row_s_own_settings_are_used(folder: Path) -> None:
    rows = [
        {"question": "What do you see?", "image": PICTURE},
        {"question": "What do you see?", "image": PICTURE, "max_completion_tokens": 5, "ignore_eos": True},
        {"question": "What do you see?", "image": PICTURE, "max_pixels": 64 * 64},
        {"question": "What do you see?", "temperature": 2.0, "seed": 11},
        {"question": "What do you see?", "video": CLIP},
        {"question": "What do you see?", "video": CLIP, "nframes": 2},
        {"question": "What do you see?", "image": PICTURE, "system": "You are a careful observer."},
    ]
    found, status = answers(folder, rows)
    assert status == 0
    plain, longer, smaller, drawn, clip, two_frames, system = found
    assert (plain["completion_tokens"], longer["completion_tokens"]) == (2, 5)
    assert 0 < smaller["vision_tokens"] <= 4 < plain["vision_tokens"]
    assert drawn["seed"] == 11 and "seed" not in plain
    assert 0 < two_frames["vision_tokens"] < clip["vision_tokens"]
    assert system["prompt_tokens"] > plain["prompt_tokens"]
    assert "fingerprint" not in plain


def test_ask_hands_tools_to_the_template(folder: Path) -> None:
    answers(folder, [GOOD])
    recipe = recipe_of(folder, [GOOD])
    (sample,) = read_entry({"question": "Look.", "image": PICTURE, "tools": json.dumps([TOOL])}, "mine.jsonl:1", folder)
    asked = ask(ENGINES[0], recipe, SamplingParams(), 0, sample)
    assert '"name": "look_closer"' in asked.prompt.text and asked.prompt.media[0].kind == "image"
