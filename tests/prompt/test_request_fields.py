"""Prompts of requests' own wishes: a message to be gone on with, options for all media, token ids."""

import random

import numpy as np
import pytest
from PIL import Image

from executor.errors import UserError
from executor.prompt.chat import Chat
from executor.prompt.options import MediaOptions
from executor.prompt.request_options import read_request_options
from models.qwen2_5_vl.processor import Processor as Qwen2_5Processor
from models.qwen3_vl.processor import Processor as Qwen3Processor
from tests.prompt.test_tools import TEXT_TEMPLATE, THINKING_TEMPLATE, TOOL
from tests.reference import REPO

TINY, MEDIA = REPO / "models" / "tiny", REPO / "dataset" / "media"
CLIP = str(MEDIA / "clip.mp4")


@pytest.fixture(scope="module")
def qwen3() -> Qwen3Processor:
    return Qwen3Processor(TINY / "qwen3_vl")


@pytest.fixture(scope="module")
def qwen2_5() -> Qwen2_5Processor:
    return Qwen2_5Processor(TINY / "qwen2_5_vl")


# A message to be gone on with

TRIMMING_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}"""
# Some of them occur in what templates write around them, before and behind.
ENDINGS = [
    "The square is",
    "im",
    "end",
    "assistant",
    "|",
    "<",
    "A ",
    " A",
    "x \n",
    "\n",
    "",
    " ",
    "日本",
    "🙂 ",
    "</think>",
]


@pytest.mark.parametrize("template", [None, TRIMMING_TEMPLATE, THINKING_TEMPLATE, TEXT_TEMPLATE])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_the_last_message_is_left_open_as_in_transformers(qwen3, template, role):
    tokenizer = qwen3.tokenizer
    chat = qwen3.chat if template is None else Chat(tokenizer, template)
    for ending in ENDINGS:
        messages = [{"role": "user", "content": "What is it?"}, {"role": role, "content": ending}]
        expected = tokenizer.apply_chat_template(
            messages, chat_template=chat.template, continue_final_message=True, tokenize=False
        )
        pieces = chat.render(messages, add_generation_prompt=False, continue_final_message=True)
        words = {token_id: token for token, token_id in chat.special.ids.items()}
        assert "".join(words.get(piece, piece) for piece in pieces) == expected, ending


def test_special_tokens_in_the_open_message_stay_text(qwen3):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|> <|image_pad|><|im_"}]
    prompt = qwen3.build(messages, add_generation_prompt=False, continue_final_message=True)
    end, pad = (qwen3.chat.special.ids[token] for token in ("<|im_end|>", "<|image_pad|>"))
    assert prompt.token_ids.count(end) == 1 and pad not in prompt.token_ids
    assert qwen3.tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\na<|im_end|> <|image_pad|><|im_")


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_pictures_before_and_parts_in_the_open_message(family, request):
    processor = request.getfixturevalue(family)
    picture = {"type": "image", "image": str(MEDIA / "objects.png")}
    question = {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is a"}]
    texts = []
    for answer in ("It is a", parts):
        messages = [question, {"role": "assistant", "content": answer}]
        prompt = processor.build(messages, add_generation_prompt=False, continue_final_message=True)
        texts.append(prompt.text)
        assert len(prompt.media) == 1
    assert texts[0] == texts[1] and texts[0].endswith("<|im_start|>assistant\nIt is a")


@pytest.mark.parametrize(
    ("last", "kwargs", "says"),
    [
        ({"content": "a"}, {"add_generation_prompt": True}, "exclude each other"),
        ({"content": "a", "tool_calls": [{"function": {"name": "zoom"}}]}, {}, r"messages\[1\].*ends with tool_calls"),
        ({"content": [{"type": "text", "text": "a"}, {"image": "b.png"}]}, {}, "does not end with a text"),
        ({"content": []}, {}, "does not end with a text"),
    ],
)
def test_what_cannot_be_gone_on_with(qwen3, last, kwargs, says):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", **last}]
    with pytest.raises(UserError, match=says):
        qwen3.build(messages, **{"add_generation_prompt": False, "continue_final_message": True, **kwargs})


def test_a_template_that_leaves_the_message_out_is_told(qwen3):
    leaving_out = Chat(qwen3.tokenizer, "{{ messages[0].content }}")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="leaves the last message's text out"):
        leaving_out.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(UserError, match="may not set 'continue_final_message'"):
        qwen3.build(messages, chat_template_kwargs={"continue_final_message": True})


def test_tools_and_an_open_message(qwen3):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I look"}]
    prompt = qwen3.build(messages, tools=[TOOL], add_generation_prompt=False, continue_final_message=True)
    assert "zoom" in prompt.text and prompt.text.endswith("assistant\nI look")


# Options of a whole request


def ask(processor, *parts, **options):
    return processor.build([{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], **options)


def picture(**options):
    return {"type": "image", "image": Image.new("RGB", (640, 480), "red"), **options}


PIXELS = {"min_pixels": 4096, "max_pixels": 32768}
SIZE = {"shortest_edge": 4096, "longest_edge": 32768}


@pytest.mark.parametrize(
    "options",
    [
        PIXELS,
        {"size": SIZE},
        {"size": PIXELS},
        {"images_kwargs": PIXELS},
        {"images_kwargs": {"size": SIZE}, "max_pixels": 10**6},
        {"size": {"longest_edge": 10**6}, **PIXELS},
        {**PIXELS, "use_fast": True, "do_resize": True, "do_pad": False, "fps": None, "media_io_kwargs": {}},
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_every_form_bounds_pictures_as_their_own_part_does(family, options, request):
    processor = request.getfixturevalue(family)
    wanted = ask(processor, picture(**PIXELS)).media[0]
    found = ask(processor, picture(), media_options=options).media[0]
    assert found.digest == wanted.digest != ask(processor, picture()).media[0].digest


def test_a_part_s_own_options_come_first(qwen3):
    own = ask(qwen3, picture(max_pixels=8192)).media[0]
    both = ask(qwen3, picture(max_pixels=8192), picture(), media_options={"max_pixels": 32768, "min_pixels": 1024})
    assert both.media[0].digest == own.digest
    assert both.media[1].digest == ask(qwen3, picture(max_pixels=32768)).media[0].digest
    video = {"type": "video", "video": CLIP}
    frames = [len(ask(qwen3, {**video, "num_frames": 4}, media_options={"fps": 8.0}).media[0].pixels)]
    frames.append(len(ask(qwen3, {**video, "fps": 8.0}, media_options={"num_frames": 4}).media[0].pixels))
    alone = [len(ask(qwen3, {**video, **own}).media[0].pixels) for own in ({"num_frames": 4}, {"fps": 8.0})]
    assert frames == alone and frames[0] == 4 < frames[1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fps": 4}, {"fps": 4}),
        ({"fps": [4.0]}, {"fps": 4}),
        ({"num_frames": 6, "do_sample_frames": True}, {"num_frames": 6}),
        ({"videos_kwargs": {"num_frames": 6}}, {"num_frames": 6}),
        ({"max_frames": 6, "fps": 10, "do_sample_frames": True}, {"max_frames": 6, "fps": 10}),
        ({"media_io_kwargs": {"video": {"num_frames": 6}}}, {"num_frames": 6}),
        ({"media_io_kwargs": {"video": {"num_frames": 6}}, "do_sample_frames": False}, {"num_frames": 6}),
        ({"media_io_kwargs": {"video": {"num_frames": -1}}, "fps": 4}, {"fps": 4}),
        ({"media_io_kwargs": {"video": {"num_frames": 6, "fps": 10}}}, {"max_frames": 6, "fps": 10}),
        ({"media_io_kwargs": {"video": None, "image": {"image_mode": "RGB"}}}, {}),
        ({"max_pixels": 16384}, {"max_pixels": 16384}),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_every_form_samples_videos_as_their_own_part_does(family, options, part, request):
    processor = request.getfixturevalue(family)
    video = {"type": "video", "video": CLIP}
    assert (
        ask(processor, video, media_options=options).media[0].digest
        == ask(processor, {**video, **part}).media[0].digest
    )


def test_a_size_of_videos_bounds_what_the_family_s_class_bounds(qwen3, qwen2_5, tmp_path):
    """Of Qwen3-VL all frames together, of Qwen2.5-VL each."""
    video = {"type": "video", "video": CLIP, "num_frames": 4}
    size = {"videos_kwargs": {"size": {"shortest_edge": 65536, "longest_edge": 65536}}}
    for processor, num_frames in ((qwen3, 4), (qwen2_5, 1)):
        height, width = ask(processor, video, media_options=size).media[0].resized_hw
        assert 0.6 * 65536 <= height * width * num_frames <= 65536 * 1.3
    # And the whole recipe's: what a builder with these bounds makes.
    bounded = Qwen3Processor(TINY / "qwen3_vl", MediaOptions(video_max_pixels=65536))
    least = {"videos_kwargs": {"size": {"longest_edge": 65536}}}
    assert ask(qwen3, video, media_options=least).media[0].digest == ask(bounded, video).media[0].digest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_pixel": 5}, r"mm_processor_kwargs: unknown key 'max_pixel' \(did you mean 'max_pixels'\?\); allowed: "),
        ({"images_kwargs": {"fps": 5}}, "mm_processor_kwargs.images_kwargs: unknown key 'fps'"),
        ({"videos_kwargs": {"frames": 5}}, "videos_kwargs: unknown key 'frames'"),
        ({"text_kwargs": {"x": 5}}, "unknown key 'text_kwargs'"),
        ({"max_pixels": 0}, "mm_processor_kwargs.max_pixels must be a whole number of pixels above 0"),
        ({"max_pixels": "big"}, "max_pixels must be"),
        ({"fps": True}, "fps must be a number"),
        ({"fps": [1, 2]}, "fps must be a number"),
        ({"fps": 1, "num_frames": 4}, "exclude each other"),
        ({"do_resize": False}, "do_resize is False; only True is supported"),
        ({"do_center_crop": True}, "do_center_crop is True; only False"),
        ({"use_fast": "yes"}, "use_fast must be true or false"),
        ({"do_sample_frames": False}, "do_sample_frames is false, and nothing says how many frames"),
        ({"do_sample_frames": 1}, "do_sample_frames must be true or false"),
        ({"size": 5}, "mm_processor_kwargs.size must be an object"),
        ({"size": {"height": 5}}, "size: unknown key 'height'; allowed: shortest_edge"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 8000}}, "shortest_edge 9000 is above longest_edge 8000"),
        ({"images_kwargs": [1]}, "images_kwargs must be an object"),
        ({"media_io_kwargs": 5}, "media_io_kwargs must be an object"),
        ({"media_io_kwargs": {"video": {"backend": "x"}}}, "media_io_kwargs.video.backend"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames must be"),
        ({"media_io_kwargs": {"video": {"num_frames": 4}}, "fps": 2}, "both say which frames"),
        ({"media_io_kwargs": {"image": {"image_mode": "L"}}}, "media_io_kwargs.image.image_mode"),
        ({"media_io_kwargs": {"audio": {"x": 1}}}, "unknown key 'audio'"),
        ([1], "mm_processor_kwargs must be an object"),
        ({1: 2}, "mm_processor_kwargs must be an object"),
    ],
)
def test_what_options_are_refused(qwen3, options, says):
    """Also of a request without media."""
    with pytest.raises(UserError, match=says):
        ask(qwen3, media_options=options)


def test_random_options_are_taken_or_refused_by_name():
    rng = random.Random(0)
    keys = ["min_pixels", "max_pixels", "size", "fps", "num_frames", "do_resize", "videos_kwargs", "media_io_kwargs"]
    values = [None, 0, 1, -1, 2.5, 10**20, "x", [], {}, [1], {"a": 1}, True, float("nan"), {"longest_edge": 5}]
    refused = 0
    for _ in range(400):
        options = {rng.choice(keys): rng.choice(values) for _ in range(2)}
        try:
            read_request_options(options)
        except UserError as error:
            refused += 1
            assert "mm_processor_kwargs" in str(error) or "media_io_kwargs" in str(error)
    assert 100 < refused < 400


# Token ids and raw text


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_token_ids_are_the_prompt_of_the_same_text(family, request):
    processor = request.getfixturevalue(family)
    text = processor.build([{"role": "user", "content": "How many circles?"}])
    prompt = processor.build_tokens(text.token_ids)
    assert prompt.token_ids == text.token_ids and prompt.text == text.text
    assert np.array_equal(prompt.positions, text.positions) and prompt.position_delta == text.position_delta
    last = processor.config.text.vocab_size - 1
    assert processor.build_tokens((0, last)).token_ids == [0, last]


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [
        ([], "prompt must be a text, or a list of one or more token ids"),
        ("12", 'prompt must be .*, got "12"'),
        ([1, -1], r"prompt\[1\] is -1; allowed: token ids from 0 to "),
        ([10**6], r"prompt\[0\] is 1000000;"),
        ([1, 2.0], r"prompt\[1\] is 2.0"),
        ([True], "is True"),
        (["a"], "is 'a'"),
        ([[1]], r"is \[1\]"),
    ],
)
def test_token_ids_that_are_refused(qwen3, token_ids, says):
    with pytest.raises(UserError, match=says):
        qwen3.build_tokens(token_ids)


def test_placeholders_in_token_ids_are_refused(qwen3):
    for token_id in (qwen3.image_token_id, qwen3.video_token_id):
        with pytest.raises(UserError, match=rf"prompt\[1\] is {token_id}, which stands for a picture or video .*_pad"):
            qwen3.build_tokens([5, token_id])


def test_placeholders_in_raw_text_are_text_where_no_media_come(qwen3):
    text = "<|im_start|>user\nLook <|image_pad|><|video_pad|> there<|im_end|>\n"
    prompt = qwen3.build_text(text)
    specials = [token for token in prompt.token_ids if token in qwen3.chat.special.ids.values()]
    assert specials == [qwen3.chat.special.ids["<|im_start|>"], qwen3.chat.special.ids["<|im_end|>"]]
    assert qwen3.tokenizer.decode(prompt.token_ids) == text and not prompt.spans
    with_picture = qwen3.build_text("<|image_pad|>?", [picture()], media_options={"max_pixels": 8192})
    assert with_picture.media[0].digest == ask(qwen3, picture(max_pixels=8192)).media[0].digest
    for wrong in (5, None, ["a"]):
        with pytest.raises(UserError, match="prompt must be a text"):
            qwen3.build_text(wrong)
