"""Prompts from messages equal those of transformers' processors: token ids, grids, pixels, positions.

Videos are handed to transformers decoded, with their rate, because its own decoders are not installed.
Two departures are followed on purpose (design): text after a long Qwen2.5 video, tested in
test_processor_positions.py, and the form of a Qwen3 video in the text, tested in both forms here.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from executor.prompt.options import MediaOptions
from models.qwen2_5_vl.processor import Processor as Processor2_5
from models.qwen3_vl.processor import Processor as Processor3
from tests.models.test_processor_positions import bare, by_hand_2_5

REPO = Path(__file__).parents[2]
MEDIA = REPO / "dataset" / "media"
OURS = {"qwen2_5_vl": Processor2_5, "qwen3_vl": Processor3, "qwen3_vl_moe": Processor3}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@cache
def ours(family, **options):
    return OURS[family](REPO / "models" / "tiny" / family, MediaOptions(**options))


@cache
def reference(family):
    """transformers' processor of the tiny folder, on torchvision."""
    import transformers as tf

    folder = REPO / "models" / "tiny" / family
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    image_processor = tf.Qwen2VLImageProcessor.from_pretrained(folder)
    names = ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")
    if family != "qwen2_5_vl":
        names = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    video_processor = getattr(tf, names[1]).from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    return getattr(tf, names[0])(image_processor, tokenizer, video_processor, chat_template=template)


def decode(path):
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, {"fps": float(stream.average_rate), "total_num_frames": len(frames), "duration": None}


def expected(family, messages, *, outer_pair=False, **kwargs):
    """What transformers makes of the same messages."""
    processor = reference(family)
    images, videos, metadata = [], [], []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                source = part["image"]
                picture = source if isinstance(source, Image.Image) else Image.open(source)
                images.append(picture.convert("RGB"))
            elif part["type"] == "video":
                frames, facts = decode(part["video"])
                videos.append(frames)
                metadata.append(facts)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    if family != "qwen2_5_vl" and not outer_pair:
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    if videos:
        kwargs |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": True, "return_metadata": True}
        if "num_frames" not in kwargs:
            kwargs.setdefault("fps", 2)
    with torch.no_grad():
        return processor(text=[text], images=images or None, return_tensors="pt", **kwargs)


def rope_index(family, batch):
    import transformers as tf

    folder = REPO / "models" / "tiny" / family
    if family == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

        model = bare(Qwen2_5_VLModel, tf.Qwen2_5_VLConfig.from_pretrained(folder))
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

        model = bare(Qwen3VLModel, tf.Qwen3VLConfig.from_pretrained(folder))
    keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {key: batch[key] for key in keys if key in batch}
    positions, delta = model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], **grids)
    return positions[:, 0].numpy(), int(delta)


def patches(processor, item):
    from executor.media.patches import normalize_patchify

    settings = processor.video if item.kind == "video" else processor.picture
    return normalize_patchify(
        item.pixels,
        settings.mean,
        settings.std,
        settings.patch_size,
        settings.temporal_patch_size,
        settings.merge_size,
        torch.float32,
    )


def overlaps(prompt):
    """Whether a Qwen2.5 video lasts longer than its frames are large: then 5.23 lets the text after it overlap."""
    last = [(item.grid_thw[0] - 1) * item.seconds_per_grid * 2 for item in prompt.media]
    return any(time >= max(item.grid_thw[1:]) // 2 for time, item in zip(last, prompt.media, strict=True))


def assert_equal(family, prompt, batch):
    assert prompt.token_ids == batch["input_ids"][0].tolist()
    processor = ours(family)
    for kind, grid_key, pixel_key in (
        ("image", "image_grid_thw", "pixel_values"),
        ("video", "video_grid_thw", "pixel_values_videos"),
    ):
        items = [item for item in prompt.media if item.kind == kind]
        grids = batch[grid_key].tolist() if grid_key in batch else []
        assert [list(item.grid_thw) for item in items] == grids
        if items:
            pixels = torch.cat([patches(processor, item) for item in items])
            assert torch.equal(pixels, batch[pixel_key])
    if family == "qwen2_5_vl" and overlaps(prompt):
        wanted, delta = by_hand_2_5(batch["mm_token_type_ids"][0].tolist(), prompt.spans, prompt.media)
    else:
        wanted, delta = rope_index(family, batch)
    np.testing.assert_array_equal(prompt.positions, wanted)
    assert prompt.position_delta == delta


def assert_spans_cover(prompt, processor):
    """Spans are the placeholder runs, and each media item's embeddings are used once, in order."""
    pads = {processor.image_token_id, processor.video_token_id}
    marked = [index for index, token in enumerate(prompt.token_ids) if token in pads]
    covered, next_offset = [], [0] * len(prompt.media)
    for span in prompt.spans:
        covered += range(span.start, span.start + span.num_tokens)
        assert span.offset == next_offset[span.media_index]
        next_offset[span.media_index] += span.num_tokens
    assert covered == marked
    assert next_offset == [item.num_tokens for item in prompt.media]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def image(source):
    return {"type": "image", "image": source if isinstance(source, Image.Image) else str(MEDIA / source)}


def video(name):
    return {"type": "video", "video": str(MEDIA / name)}


def text(words):
    return {"type": "text", "text": words}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "How many sides has a square?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n\n<tool_call> ok?"}],
    "picture": [user(image("objects.png"), text("How many objects are there?"))],
    "picture last": [user(text("Look:"), image("number.jpg"))],
    "three pictures": [user(image("objects.png"), image("word.png"), text("Same?"), image("objects_2.jpg"))],
    "turns": [
        {"role": "system", "content": [text("Answer with one word.")]},
        user(image("word.png"), text("Read it.")),
        {"role": "assistant", "content": "cat"},
        user(text("And this one?"), image("number.jpg")),
        {"role": "assistant", "content": [text("7")]},
        {"role": "user", "content": "Sure?"},
    ],
    "video": [user(video("clip.mp4"), text("What moves?"))],
    "two videos": [
        user(text("First:"), video("clip.mp4"), text("then "), video("clip_2.mp4"), text(" Which is longer?"))
    ],
    "mixed": [user(video("clip_2.mp4"), image("word.png"), text("!")), user(image("number.jpg"), video("clip.mp4"))],
}


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"))
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(family, name, torchvision):
    messages = CONVERSATIONS[name]
    prompt = ours(family).build(messages)
    assert_equal(family, prompt, expected(family, messages))
    assert_spans_cover(prompt, ours(family))


@pytest.mark.parametrize("name", ["video", "two videos", "mixed"])
def test_outer_pair_is_the_form_of_transformers(name, torchvision):
    """The recipe's other form of a Qwen3 video, with one more pair of marks, as transformers 5.23 writes it."""
    messages = CONVERSATIONS[name]
    prompt = ours("qwen3_vl", video_timestamps="outer_pair").build(messages)
    assert_equal("qwen3_vl", prompt, expected("qwen3_vl", messages, outer_pair=True))
    videos = sum(item.kind == "video" for item in prompt.media)
    assert len(prompt.token_ids) == len(ours("qwen3_vl").build(messages).token_ids) + 2 * videos


SIZES = [(1, 1), (3, 300), (13, 27), (28, 28), (33, 200), (112, 112), (480, 640), (30, 5000), (1000, 1100)]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_many_sizes(family, torchvision):
    choose = np.random.default_rng(0)
    pictures = [Image.fromarray(choose.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES]
    messages = [user(*map(image, pictures), text("Which is largest?"))]
    prompt = ours(family).build(messages)
    assert_equal(family, prompt, expected(family, messages))
    assert_spans_cover(prompt, ours(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({"min_pixels": 40_000, "max_pixels": 50_000}, {"size": {"shortest_edge": 40_000, "longest_edge": 50_000}}),
        ({"max_pixels": 5_000}, {"size": {"shortest_edge": 3136, "longest_edge": 5_000}}),
    ],
)
def test_picture_bounds_of_the_recipe(family, options, kwargs, torchvision):
    if family == "qwen3_vl" and "min_pixels" not in options:
        kwargs = {"size": {"shortest_edge": 4096, "longest_edge": 5_000}}
    messages = CONVERSATIONS["three pictures"]
    prompt = ours(family, **options).build(messages)
    assert_equal(family, prompt, expected(family, messages, images_kwargs=kwargs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({"fps": 4.0}, {"fps": 4}),
        ({"fps": 1.0}, {"fps": 1}),
        ({"fps": 10.0, "max_frames": 6}, {"fps": 10, "max_frames": 6}),
        ({"num_frames": 8}, {"num_frames": 8}),
        ({"cap_pixels_per_frame": True}, {"cap_pixels_per_frame": True}),
    ],
)
def test_video_options_of_the_recipe(family, options, kwargs, torchvision, monkeypatch):
    if "max_frames" in options:
        # Qwen3's class reads it from itself, not from the call; likewise `fps` below.
        monkeypatch.setattr(reference(family).video_processor, "max_frames", options["max_frames"])
    if "num_frames" in options:
        monkeypatch.setattr(reference(family).video_processor, "fps", None)
    messages = CONVERSATIONS["two videos"]
    prompt = ours(family, **options).build(messages)
    batch = expected(family, messages, **kwargs)
    assert_equal(family, prompt, batch)
    if family == "qwen2_5_vl":
        seconds = [item.seconds_per_grid for item in prompt.media]
        assert torch.equal(torch.tensor(seconds), torch.as_tensor(batch["second_per_grid_ts"], dtype=torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_template_kwargs_and_tools(family):
    processor = ours(family)
    messages = CONVERSATIONS["three pictures"]
    prompt = processor.build(messages, chat_template_kwargs={"add_vision_id": True}, add_generation_prompt=False)
    assert "Picture 2: <|vision_start|><|image_pad|>" in prompt.text
    assert prompt.text.endswith("<|im_end|>\n")
    if family == "qwen3_vl":
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
        got = processor.build(CONVERSATIONS["text"], tools=[tool])
        wanted = processor.tokenizer.apply_chat_template(
            CONVERSATIONS["text"], tools=[tool], add_generation_prompt=True, return_dict=False
        )
        assert got.token_ids == wanted


def test_raw_text_equals_the_rendered_conversation():
    processor = ours("qwen3_vl")
    messages = CONVERSATIONS["mixed"]
    built = processor.build(messages)
    parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
    raw = processor.build_text(built.text, media=parts)
    assert raw.token_ids == built.token_ids
    assert [item.digest for item in raw.media] == [item.digest for item in built.media]
    np.testing.assert_array_equal(raw.positions, built.positions)
