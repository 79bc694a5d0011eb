"""Pixels, grids and sampled frames equal transformers' default (torchvision-backed) processors, bit for bit."""

from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from executor.checkpoint.settings import PixelSettings
from executor.media.image import decode_image, resize, smart_resize
from executor.media.patches import cut_frames, cut_rows, normalize_patchify
from executor.media.sampling import Sampling, frame_size_of_all, frame_size_per_frame, spread, strided
from executor.media.video import read_video
from executor.prompt.digest import make_media_item
from tests.media.media_files import make_frames, write_video

pytestmark = pytest.mark.usefixtures("torchvision")

QWEN2_5 = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
QWEN3 = {**QWEN2_5, "patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIZES = [(1, 1), (5, 7), (28, 28), (30, 5000), (33, 500), (64, 96), (100, 101), (223, 447), (480, 640), (900, 901)]


def patches(frames: torch.Tensor, config: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = {key: config[key] for key in ("patch_size", "temporal_patch_size", "merge_size")}
    return normalize_patchify(frames, config["image_mean"], config["image_std"], **shape, dtype=dtype)


def grid(frames: torch.Tensor, config: dict) -> list[int]:
    temporal, patch = config["temporal_patch_size"], config["patch_size"]
    return [-(-frames.shape[0] // temporal), frames.shape[2] // patch, frames.shape[3] // patch]


@pytest.mark.parametrize("config", [QWEN2_5, QWEN3], ids=["qwen2_5", "qwen3"])
@pytest.mark.parametrize("bounds", [(3136, 12845056), (65536, 200000)])
@pytest.mark.parametrize("size", SIZES)
def test_images(config: dict, bounds: tuple[int, int], size: tuple[int, int]) -> None:
    from transformers import Qwen2VLImageProcessor

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    reference = Qwen2VLImageProcessor(**config, size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    expected = reference(picture, return_tensors="pt")
    pixels = decode_image(picture)[None]
    height, width = smart_resize(*size, config["patch_size"] * config["merge_size"], *bounds)
    resized = resize(pixels, height, width)
    assert grid(resized, config) == expected["image_grid_thw"][0].tolist()
    assert torch.equal(patches(resized, config), expected["pixel_values"])
    assert torch.equal(patches(resized, config, torch.bfloat16), expected["pixel_values"].to(torch.bfloat16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr"])
def test_picture_modes(mode: str) -> None:
    from transformers import Qwen2VLImageProcessor

    rgba = np.random.default_rng(2).integers(0, 256, (56, 84, 4), dtype=np.uint8)
    picture = Image.fromarray(rgba)
    picture = picture.convert(mode) if mode in ("RGBA", "LA") else picture.convert("RGB").convert(mode)
    expected = Qwen2VLImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(patches(resize(decode_image(picture)[None], 56, 84), QWEN2_5), expected)


@pytest.mark.parametrize(("patch", "bound"), [(14, 12845056), (16, 16777216)])
def test_bytes_that_travel_for_a_picture_of_1080p(patch: int, bound: int) -> None:
    """A byte a colour and pixel, once: neither floats nor the second frame that a picture is repeated to."""
    settings = PixelSettings(patch, 2, 2, (0.5,) * 3, (0.5,) * 3, 65536, bound)
    frame = decode_image(Image.new("RGB", (1920, 1080), (10, 200, 30)))
    size = smart_resize(1080, 1920, settings.factor, settings.min_pixels, settings.max_pixels)
    item = make_media_item("image", resize(frame[None], *size), settings)
    assert item.pixels.dtype == torch.uint8 and item.pixels.is_contiguous()
    assert item.pixels.nbytes == 3 * size[0] * size[1] <= 8_000_000
    assert item.pixels.untyped_storage().nbytes() == item.pixels.nbytes


@pytest.mark.parametrize("config", [QWEN2_5, QWEN3], ids=["qwen2_5", "qwen3"])
def test_both_ways_to_cut(config: dict) -> None:
    """A CPU moves rows of pixels, other devices permute: the same bytes, also of a part of the rows."""
    patch = config["patch_size"]
    whole = torch.randint(0, 256, (4, 3, 6 * patch, 4 * patch), dtype=torch.uint8)
    for frames in (whole, whole[:, :, 2 * patch : 4 * patch], whole[:2]):
        by_row = cut_rows(frames, patch, 2)  # [F, N, C, ps * ps]
        paired = by_row.unflatten(0, (-1, 2)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        assert torch.equal(cut_frames(frames, patch, 2, 2), paired)


def video_processor(family: str, **settings):
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    kind, config = {"qwen2_5": (Qwen2VLVideoProcessor, QWEN2_5), "qwen3": (Qwen3VLVideoProcessor, QWEN3)}[family]
    return kind(**config, **settings), config


FAMILIES = {"qwen2_5": (strided, frame_size_per_frame, 128000), "qwen3": (spread, frame_size_of_all, 768)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("bounds", [(4096, 2000000), (100352, 602112), (1000, 90000)])
@pytest.mark.parametrize("shape", [(2, 20, 30), (3, 64, 96), (5, 7, 41), (8, 150, 200), (7, 30, 1800)])
def test_videos(family: str, cap: bool, bounds: tuple[int, int], shape: tuple[int, int, int]) -> None:
    _, size_rule, max_video_tokens = FAMILIES[family]
    size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    reference, config = video_processor(family, size=size, cap_pixels_per_frame=cap, do_sample_frames=False)
    frames = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = reference(frames, return_tensors="pt")
    size_of = partial(
        size_rule,
        factor=config["patch_size"] * config["merge_size"],
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        temporal_patch_size=2,
        max_video_tokens=max_video_tokens if cap else None,
    )
    video = read_video(frames, Sampling(spread), size_of=size_of)
    assert grid(video.frames, config) == expected["video_grid_thw"][0].tolist()
    assert torch.equal(patches(video.frames, config), expected["pixel_values_videos"])


@pytest.mark.parametrize("family", FAMILIES)
def test_frame_sizes_where_the_cap_binds(family: str) -> None:
    """Sizes alone, over lengths and shapes too large to compute pixels for."""
    _, size_rule, max_video_tokens = FAMILIES[family]
    bounds = {"qwen2_5": (128 * 28 * 28, 12845056), "qwen3": (131072, 234881024)}[family]
    reference, config = video_processor(family, size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
    seen = []
    # The reference's own `resize`, up to the point where pixels would be computed.
    base = type(reference).__mro__[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "resize", lambda self, image, size, resample: seen.append((size.height, size.width)))
        for cap in (False, True):
            for num_frames in (2, 3, 16, 63, 64, 768):
                for height, width in ((32, 32), (20, 700), (360, 640), (1080, 1920), (2160, 3840)):
                    factor = config["patch_size"] * config["merge_size"]
                    video = torch.empty(1, device="meta").expand(1, num_frames, 3, height, width)
                    reference.resize(video, reference.size, None, factor, 2, cap_pixels_per_frame=cap)
                    ours = size_rule(
                        num_frames,
                        height,
                        width,
                        factor=factor,
                        min_pixels=bounds[0],
                        max_pixels=bounds[1],
                        max_video_tokens=max_video_tokens if cap else None,
                    )
                    assert ours == seen[-1], (cap, num_frames, height, width)
    assert len(set(seen[: len(seen) // 2])) != len(set(seen[len(seen) // 2 :]))  # the cap does something


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_indices(family: str) -> None:
    from transformers.video_utils import VideoMetadata

    rule = FAMILIES[family][0]
    compared = 0
    for min_frames, max_frames in ((4, 768), (4, 16), (7, 33)):
        reference, _ = video_processor(family, min_frames=min_frames, max_frames=max_frames)
        for fps, num_frames in ((2, None), (0.5, None), (7.3, None), (None, 8), (None, 5)):
            for rate in (1.0, 24.0, 30000 / 1001, 25.0, 60.0):
                for total in (*range(2, 70), 333, 1000, 4999):
                    if num_frames and num_frames + 1 >= total:
                        continue
                    metadata = VideoMetadata(total_num_frames=total, fps=rate)
                    expected = reference.sample_frames(metadata, fps=fps, num_frames=num_frames).tolist()
                    # Qwen2.5's float stride may yield one index past the end: transformers then fails or skips it.
                    expected = [index for index in expected if index < total]
                    sampling = Sampling(rule, fps or 2.0, num_frames, min_frames, max_frames)
                    assert sampling.indices(total, rate) == expected, (min_frames, max_frames, fps, rate, total)
                    compared += 1
    assert compared > 4000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_frames", "rate"), [(50, Fraction(10)), (61, Fraction(30000, 1001)), (9, Fraction(2))])
def test_a_file_end_to_end(tmp_path: Path, family: str, num_frames: int, rate: Fraction) -> None:
    from transformers.video_utils import load_video

    rule, size_rule, _ = FAMILIES[family]
    path = write_video(tmp_path / "clip.mp4", make_frames(num_frames, 66, 98), rate, options={"g": "12"})
    size = {"shortest_edge": 4096, "longest_edge": 400000}
    reference, config = video_processor(family, size=size, cap_pixels_per_frame=False)
    # What transformers' processor does with a path, but for its preference for torchcodec over PyAV.
    sample = partial(reference.sample_frames, fps=2)
    frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=sample)
    expected = reference(frames, do_sample_frames=False, return_tensors="pt")
    factor = config["patch_size"] * config["merge_size"]
    size_of = partial(size_rule, factor=factor, min_pixels=4096, max_pixels=400000)
    video = read_video(path, Sampling(rule), size_of=size_of)
    assert list(video.indices) == [int(index) for index in metadata.frames_indices]
    assert list(video.timestamps_s) == [int(index) / metadata.fps for index in metadata.frames_indices]
    assert video.sampled_fps == metadata.sampled_fps
    assert (video.total_frames, video.frame_rate) == (metadata.total_num_frames, metadata.fps)
    assert video.duration_s == pytest.approx(metadata.duration)
    assert (video.height, video.width) == (metadata.height, metadata.width)
    assert grid(video.frames, config) == expected["video_grid_thw"][0].tolist()
    assert torch.equal(patches(video.frames, config), expected["pixel_values_videos"])
