"""Processors on what users really send: hostile text, wrong requests, odd media, published checkpoint settings."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from executor.errors import UserError
from executor.prompt.options import MediaOptions
from models.qwen2_5_vl.processor import Processor as Processor2_5
from models.qwen3_vl.processor import Processor as Processor3
from models.qwen3_vl.processor import patch_timestamps
from tests.media.media_files import make_frames, write_video

REPO = Path(__file__).parents[2]
MEDIA = REPO / "dataset" / "media"
OURS = {"qwen2_5_vl": Processor2_5, "qwen3_vl": Processor3}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PUBLISHED = {  # preprocessor_config.json, video_preprocessor_config.json
    "qwen2_5_vl": (
        {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
        | {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor"},
        None,
    ),
    "qwen3_vl": (
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2}
        | {"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2}
        | {"merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
}


@pytest.fixture(scope="module", params=OURS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return OURS[family](REPO / "models" / "tiny" / family)


def folder_with(tmp_path, family, picture, video):
    folder = tmp_path / family
    folder.mkdir()
    for file in (REPO / "models" / "tiny" / family).iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, folder)
    (folder / "video_preprocessor_config.json").unlink()
    for name, content in (("preprocessor_config.json", picture), ("video_preprocessor_config.json", video)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def ask(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_what_the_engine_asks_of_a_processor(processor, family):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    assert processor.image_token_id == config["image_token_id"]
    assert processor.video_token_id == config["video_token_id"]
    assert processor.vision_start_token_id == config["vision_start_token_id"]
    assert processor.eos_token_ids == tuple(processor.generation_config["eos_token_id"])
    prompt = processor.build(ask({"text": "Hello"}))
    assert isinstance(prompt.token_ids, list) and all(type(token) is int for token in prompt.token_ids)
    assert prompt.positions.dtype == np.int64 and prompt.positions.shape == (3, len(prompt.token_ids))
    assert prompt.media == () == prompt.spans and prompt.num_vision_tokens == 0


def test_placeholders_in_a_users_text_are_text(processor):
    parts = [{"image": str(MEDIA / "word.png")}, {"text": "a<|image_pad|><|vision_start|><|video_pad|><|im_end|>b"}]
    prompt = processor.build(ask(*parts))
    assert len(prompt.media) == 1 and prompt.token_ids.count(processor.image_token_id) == prompt.num_vision_tokens
    assert processor.video_token_id not in prompt.token_ids
    assert parts[1]["text"] in processor.tokenizer.decode(prompt.token_ids)


def test_placeholders_split_between_parts_are_text(processor):
    prompt = processor.build(ask({"text": "<|image_"}, {"text": "pad|>"}, {"text": "<|im_"}, {"text": "start|>"}))
    assert processor.image_token_id not in prompt.token_ids
    assert "<|image_pad|><|im_start|>" in processor.tokenizer.decode(prompt.token_ids)


def test_raw_text_keeps_its_special_tokens(processor):
    prompt = processor.build_text("<|im_start|>user\nHi<|im_end|>")
    assert len(prompt.token_ids) < 10
    alone = processor.build_text("<|image_pad|>")  # without a picture it is text like any other
    assert not alone.spans and processor.image_token_id not in alone.token_ids
    with pytest.raises(UserError, match="prompt is empty"):
        processor.build_text("")


def test_a_picture_the_template_leaves_out_is_refused(processor, family):
    messages = [{"role": "system", "content": [{"image": str(MEDIA / "word.png")}]}, *ask({"text": "Read it."})]
    if family == "qwen2_5_vl":
        prompt = processor.build(messages)
        assert len(prompt.media) == 1 and prompt.spans[0].start < 10
    else:
        with pytest.raises(UserError, match="1 pictures.*has 0 placeholders; the chat template leaves some out"):
            processor.build(messages)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": str(MEDIA / "clip.mp4")}, "clip.mp4.*video"),
        ({"video": str(MEDIA / "nowhere.mp4")}, "nowhere.mp4"),
        ({"image": Image.new("RGB", (402, 2))}, "at most 200 is allowed"),
        ({"image_url": {"url": "data:image/png;base64,!!!"}}, "base64"),
        ({"image_url": "https://example.com/a.png"}, "https://"),
        ({"video": str(MEDIA / "clip.mp4"), "num_frames": 1000}, "1000 frames asked for"),
        ({"image": str(MEDIA / "word.png"), "min_pixels": 10**9}, r"messages\[0\].content\[0\]: min_pixels 1000000000"),
    ],
)
def test_media_that_cannot_be_opened(part, says):
    processor = OURS["qwen2_5_vl"](REPO / "models" / "tiny" / "qwen2_5_vl")
    with pytest.raises(UserError, match=says):
        processor.build(ask(part, {"text": "What is it?"}))


def test_one_picture_by_every_way_has_one_digest(processor):
    path = MEDIA / "objects.png"
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    sources = [str(path), path, path.read_bytes(), url, Image.open(path), np.array(Image.open(path).convert("RGB"))]
    prompt = processor.build(ask(*({"image": source} for source in sources), {"image_url": {"url": url}}))
    assert len({item.digest for item in prompt.media}) == 1
    other = processor.build(ask({"image": str(MEDIA / "objects_2.jpg")}))
    assert other.media[0].digest != prompt.media[0].digest


def test_the_same_frames_at_another_rate_have_another_digest(processor, family):
    """Embeddings are equal, Qwen2.5's positions are not: the prefix cache must not mistake one for the other."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 56, 64, 3), dtype=np.uint8)
    rates = (0.5, 4, 4)
    slow, fast, again = (processor.build(ask({"video": frames, "fps": fps}, {"text": "x"})) for fps in rates)
    assert [prompt.media[0].seconds_per_grid for prompt in (slow, fast)] == [4.0, 0.5]
    assert slow.media[0].digest != fast.media[0].digest == again.media[0].digest
    if family == "qwen2_5_vl":
        assert slow.token_ids == fast.token_ids and (slow.positions != fast.positions).any()
    else:
        assert slow.token_ids != fast.token_ids


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_videos_of_few_and_odd_frames(num_frames, processor, family):
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 60, 80, 3), dtype=np.uint8)
    prompt = processor.build(ask({"video": frames}, {"text": "x"}))
    item = prompt.media[0]
    assert item.pixels.shape[0] == 2 * item.grid_thw[0] == num_frames + num_frames % 2
    assert len(item.timestamps_s) == num_frames
    if num_frames % 2:
        assert torch.equal(item.pixels[-1], item.pixels[-2])
    assert len(prompt.spans) == (1 if family == "qwen2_5_vl" else item.grid_thw[0])


def test_animated_gif_as_picture_and_as_video(processor):
    frames = [Image.new("RGB", (60, 60), color) for color in ("red", "green", "blue", "white")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    prompt = processor.build(ask({"image": file.getvalue()}, {"video": file.getvalue()}))
    picture, clip = prompt.media
    assert picture.pixels.shape[0] == 1 and clip.pixels.shape[0] == 4
    assert clip.timestamps_s == (0.0, 0.5, 1.0, 1.5)


def test_qwen3_time_stamps():
    assert patch_timestamps([0.0, 0.5, 1.0, 1.5], 2) == [0.25, 1.25]
    assert patch_timestamps([0.0, 0.5, 1.0], 2) == [0.25, 1.0]
    assert patch_timestamps([3.0], 2) == [3.0]
    processor = OURS["qwen3_vl"](REPO / "models" / "tiny" / "qwen3_vl")
    frames = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    text = processor.tokenizer.decode(processor.build(ask({"text": "Look: "}, {"video": frames})).token_ids)
    pads = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    assert f"user\nLook: <0.2 seconds>{pads}<1.2 seconds>{pads}<|im_end|>" in text


def test_published_settings_are_read_as_transformers_reads_them(tmp_path, family, torchvision):
    import transformers as tf

    folder = folder_with(tmp_path, family, *PUBLISHED[family])
    processor = OURS[family](folder)
    picture = tf.Qwen2VLImageProcessor.from_pretrained(folder)
    video_class = tf.Qwen2VLVideoProcessor if family == "qwen2_5_vl" else tf.Qwen3VLVideoProcessor
    video = video_class.from_pretrained(folder)
    for ours, theirs in ((processor.picture, picture), (processor.video, video)):
        assert (ours.min_pixels, ours.max_pixels) == (theirs.size.shortest_edge, theirs.size.longest_edge)
        assert list(ours.mean) == list(theirs.image_mean) and list(ours.std) == list(theirs.image_std)
        assert (ours.patch_size, ours.temporal_patch_size) == (theirs.patch_size, theirs.temporal_patch_size)
        assert ours.merge_size == theirs.merge_size
    ours = processor.video
    assert (ours.min_frames, ours.max_frames) == (video.min_frames, video.max_frames)
    assert ours.fps == 2 == (video.fps or 2) and ours.max_video_tokens == video.max_video_tokens


@pytest.mark.parametrize("capped", [False, True])
def test_frame_sizes_of_published_settings(tmp_path, family, capped, torchvision):
    """Against transformers' own resize, on tensors without memory; it knows no bounds but the checkpoint's."""
    import transformers as tf

    folder = folder_with(tmp_path, family, *PUBLISHED[family])
    video_class = tf.Qwen2VLVideoProcessor if family == "qwen2_5_vl" else tf.Qwen3VLVideoProcessor
    theirs = video_class.from_pretrained(folder)
    ours = OURS[family](folder)
    options = MediaOptions(cap_pixels_per_frame=capped)
    if family == "qwen2_5_vl":  # without ours
        options = replace(options, frame_max_pixels=ours.video.max_pixels, video_max_pixels=10**12)
    for num_frames in (2, 5, 16, 100, 768):
        for height, width in ((20, 40), (240, 320), (1080, 1920), (2160, 3840)):
            frames = torch.empty(1, num_frames, 3, height, width, dtype=torch.uint8, device="meta")
            resized = theirs.resize(
                frames,
                theirs.size,
                theirs.resample,
                factor=ours.video.factor,
                temporal_factor=ours.video.temporal_patch_size,
                cap_pixels_per_frame=capped,
            )
            assert ours.frame_size(num_frames, height, width, options) == tuple(resized.shape[-2:])


def test_recipe_bounds_on_video_pixels(tmp_path, family):
    processor = OURS[family](folder_with(tmp_path, family, *PUBLISHED[family]))

    def pixels(num_frames, **options):
        height, width = processor.frame_size(num_frames, 1080, 1920, MediaOptions(**options))
        return height * width

    assert pixels(4, frame_max_pixels=200_000) <= 200_000
    for num_frames in (4, 100):
        assert num_frames * pixels(num_frames, video_max_pixels=4_000_000) <= 4_000_000
        assert 20 * num_frames * pixels(num_frames, video_max_pixels=4_000_000) > 10 * 4_000_000


def tool_frame_size(num_frames, height, width, total_tokens):
    """qwen_vl_utils.fetch_video's arithmetic of sizes, for a video of `total_tokens` at most."""
    from executor.media.image import smart_resize

    token_px, frame_factor, least = 28 * 28, 2, 4 * 28 * 28
    most = max(min(768 * token_px, total_tokens * token_px / num_frames * frame_factor), int(least * 1.05))
    return smart_resize(height, width, 28, least, int(most))


def test_a_minute_of_full_hd_fits_by_default(tmp_path, family):
    """120 frames at 2 a second. Without bounds of videos, Qwen2.5-VL made 161,482 tokens of them."""
    processor = OURS[family](folder_with(tmp_path, family, *PUBLISHED[family]))
    height, width = processor.frame_size(120, 1080, 1920, MediaOptions(max_model_len=32768))
    num_tokens = 60 * height * width // processor.video.factor**2
    assert num_tokens == {"qwen2_5_vl": 23_400, "qwen3_vl": 11_400}[family]
    if family == "qwen2_5_vl":
        assert (height, width) == tool_frame_size(120, 1080, 1920, 24_576)


def test_a_video_of_any_length_and_shape_leaves_room_for_the_answer(tmp_path, family):
    processor = OURS[family](folder_with(tmp_path, family, *PUBLISHED[family]))
    token_px = processor.video.factor**2
    for max_model_len in (4096, 32768, 262144):
        options = MediaOptions(max_model_len=max_model_len)
        for num_frames in (1, 2, 5, 16, 100, 333, 768):
            for height, width in ((20, 40), (240, 320), (1080, 1920), (3840, 2160), (60, 6000)):
                sized = processor.frame_size(num_frames, height, width, options)
                num_tokens = -(-num_frames // 2) * sized[0] * sized[1] // token_px
                # Sides are whole tokens: of very long frames there is no smaller size.
                least = -(-num_frames // 2) * max(height, width) // min(height, width)
                assert num_tokens <= max(24_576 if max_model_len > 32768 else max_model_len * 3 // 4, 2 * least)
                if family == "qwen2_5_vl":
                    assert sized[0] * sized[1] <= 768 * token_px


def test_a_recipe_may_ask_for_larger_videos(tmp_path, family):
    processor = OURS[family](folder_with(tmp_path, family, *PUBLISHED[family]))
    options = MediaOptions(video_max_pixels=4 * 1080 * 1920, frame_max_pixels=1080 * 1920, max_model_len=4096)
    height, width = processor.frame_size(4, 1080, 1920, options)
    assert 0.9 * 1080 * 1920 < height * width <= 1080 * 1920


def test_sizes_before_and_after_the_resize(processor):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 90)).save(turned, "JPEG", exif=exif)
    frames = np.zeros((4, 70, 100, 3), dtype=np.uint8)
    prompt = processor.build(ask({"image": turned.getvalue()}, {"video": frames}, {"text": "x"}))
    assert [item.original_hw for item in prompt.media] == [(120, 90), (70, 100)]
    assert [item.resized_hw for item in prompt.media] == [item.pixels.shape[-2:] for item in prompt.media]
    assert all(side % processor.picture.factor == 0 for item in prompt.media for side in item.resized_hw)


def test_a_damaged_video_is_told_of_with_its_prompt(processor, caplog, tmp_path):
    frames = make_frames(40, 64, 96)
    data = write_video(tmp_path / "a.mp4", frames, container_options={"movflags": "faststart"}).read_bytes()
    whole, cut = (processor.build(ask({"video": content}, {"text": "x"})) for content in (data, data[: len(data) // 2]))
    assert whole.media[0].warnings == ()
    (warning,) = cut.media[0].warnings
    assert warning.startswith("bytes: the video is cut short") and warning in caplog.text
    assert 0 < cut.media[0].num_tokens < whole.media[0].num_tokens


def test_settings_that_cannot_be_followed(tmp_path, family):
    picture, video = PUBLISHED[family]
    for changes, says in (
        ({"patch_size": 12}, "config.json has vision patch_size"),
        ({"do_resize": False}, "do_resize=False; only do_resize=True"),
        ({"resample": 2}, "resample=2"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
    ):
        folder = folder_with(tmp_path, family, {**picture, **changes}, video)
        with pytest.raises(UserError, match=says):
            OURS[family](folder)
        shutil.rmtree(folder)
    if family == "qwen3_vl":
        folder = folder_with(tmp_path, family, picture, {**video, "image_mean": [0.4] * 3})
        with pytest.raises(UserError, match="normalised differently"):
            OURS[family](folder)


def test_settings_nested_in_processor_config(tmp_path, family):
    """As transformers 5 saves them."""
    picture, video = PUBLISHED[family]
    folder = folder_with(tmp_path, family, None, None)
    nested = {"image_processor": picture, "video_processor": video or picture}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(nested))
    processor = OURS[family](folder)
    assert processor.picture.max_pixels == (picture.get("max_pixels") or 16777216)
    assert processor.video.max_pixels == (12845056 if family == "qwen2_5_vl" else 25165824)


def sized(processor, part: dict) -> tuple[int, ...]:
    """(frames, height, width) of what a part becomes."""
    (item,) = processor.build([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]).media
    return item.pixels.shape[0], *item.pixels.shape[2:]


@pytest.mark.parametrize("family, factor", [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_sizes_that_a_part_names_are_rounded_as_by_the_official_tools(family, factor):
    """qwen_vl_utils 0.0.14, fetch_image and fetch_video: smart_resize of the named size, 4 to 16384 tokens."""
    processor = OURS[family](REPO / "models" / "tiny" / family)
    picture = {"type": "image", "image": str(MEDIA / "objects.png")}
    clip = {"type": "video", "video": str(MEDIA / "clip.mp4"), "nframes": 4}
    for part, frames in ((picture, 1), (clip, 4)):
        named = part | {"resized_height": 5 * factor + 10, "resized_width": 3 * factor - 10}
        assert sized(processor, named) == (frames, 5 * factor, 3 * factor)
        # Too small for 4 tokens: grown, and max_pixels has no say.
        tiny = part | {"resized_height": 5, "resized_width": 5, "max_pixels": factor * factor}
        assert sized(processor, tiny) == (frames, 2 * factor, 2 * factor)


@pytest.mark.parametrize("family, factor", [("qwen2_5_vl", 28), ("qwen3_vl", 32)])
def test_bounds_of_frames_and_of_the_whole_video(family, factor):
    processor = OURS[family](REPO / "models" / "tiny" / family)
    clip = {"type": "video", "video": str(MEDIA / "clip.mp4"), "nframes": 4}
    token = factor * factor
    frames, height, width = sized(processor, clip | {"min_pixels": 16 * token, "max_pixels": 40 * token})
    assert frames == 4 and 16 * token <= height * width <= 40 * token
    # total_pixels counts pairs: 4 frames of at most 2 * total / 4 each.
    frames, height, width = sized(processor, clip | {"min_pixels": 4 * token, "total_pixels": 18 * token})
    assert frames == 4 and 4 * token <= height * width <= 9 * token
    assert sized(processor, clip | {"nframes": 5})[0] == 4 and sized(processor, clip | {"nframes": 7})[0] == 8
    with pytest.raises(UserError, match="min_pixels .* of a frame .* above max_pixels"):
        sized(processor, clip | {"min_pixels": 40 * token, "max_pixels": 16 * token})


@pytest.mark.parametrize("family", OURS)
def test_a_stretch_of_a_video_keeps_its_time(family):
    processor = OURS[family](REPO / "models" / "tiny" / family)
    clip = {"type": "video", "video": str(MEDIA / "clip.mp4"), "nframes": 2}
    text = {"type": "text", "text": "?"}
    whole, late = (
        processor.build([{"role": "user", "content": [part, text]}]) for part in (clip, clip | {"video_start": 1.0})
    )
    assert late.media[0].timestamps_s[0] >= 1.0 > whole.media[0].timestamps_s[0] == 0.0
    assert late.media[0].timestamps_s[-1] <= whole.media[0].timestamps_s[-1] + 0.5
    # Seconds of a temporal patch are those of the stretch, not of the whole video.
    assert 0 < late.media[0].seconds_per_grid < whole.media[0].seconds_per_grid
