"""Pictures and videos into patches: ours beside transformers' fast processors and beside the decoder alone.

    python -m tests.benchmarks.preprocessing [--quality 85] [--repeats 15] [--video FILE | --no-video]

One thread of torch; times are those that all threads together have computed for, so that other processes matter less.
A 1080p JPEG whose spectrum falls as that of photographs does (amplitude 1/f), at the bounds of the
published checkpoints. `host_ms`: from the file's bytes to what travels to the device: decoded, resized, with its
digest; `patches_ms`: normalised patches of it, by a CPU. `reference_ms`: the same by Pillow and transformers'
torchvision-backed processor, which gives float32 patches, and `reference_bfloat16_ms` with these cast to what a model
takes. A minute of 1080p H.264 at 30 frames a second, sampled at 2:
`decoder_ms` is PyAV decoding the same packets and no more, with as many threads; `reference_ms` is transformers' own
reader and processor. Shapes and values are compared before anything is timed. Not a test: timings on shared machines
vary.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from executor.checkpoint.settings import PixelSettings
from executor.media.container import _DECODER_THREADS
from executor.media.image import decode_image, resize, smart_resize
from executor.media.patches import normalize_patchify
from executor.media.sampling import Sampling, frame_size_of_all, frame_size_per_frame, spread, strided
from executor.media.video import read_video
from executor.prompt.digest import make_media_item
from tests import torchvision_reference

HEIGHT, WIDTH = 1080, 1920
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Of published checkpoints: patch size, mean and std, the bounds of a picture.
PICTURES = {"qwen2_5_vl": (14, *CLIP, 3136, 12845056), "qwen3_vl": (16, *HALF, 65536, 16777216)}
# Rules of sampling and size, and the bounds: Qwen2.5's of a frame, Qwen3's of all frames together.
VIDEOS = {
    "qwen2_5_vl": (strided, frame_size_per_frame, 3136, 768 * 28 * 28),
    "qwen3_vl": (spread, frame_size_of_all, 4096, 25165824),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", type=int, default=85)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--video", type=Path, help="instead of one that is made")
    parser.add_argument("--no-video", action="store_true")
    args = parser.parse_args()
    torchvision_reference.install()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"torch": torch.__version__, "picture": {}, "video": {}}
    photo = photograph(HEIGHT, WIDTH)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=args.quality)
    report["jpeg_bytes"] = len(buffer.getvalue())
    for family in PICTURES:
        report["picture"][family] = measure_picture(family, buffer.getvalue(), args.repeats)
    if not args.no_video:
        with tempfile.TemporaryDirectory() as folder:
            path = args.video or write_clip(Path(folder) / "clip.mp4", photo)
            report["video_bytes"] = path.stat().st_size
            for family in VIDEOS:
                report["video"][family] = measure_video(family, path)
    print(json.dumps(report))


def photograph(height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: noise with the spectrum of photographs; brightness varies more than colour."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def noise(power: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**power
        plane = np.fft.irfft2(spectrum, s=(height, width))
        return plane / plane.std()

    brightness = noise(1.1)
    planes = [128 + 50 * (brightness + 0.2 * noise(1.4)) for _ in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)


def settings_of(family: str) -> PixelSettings:
    patch, mean, std, least, most = PICTURES[family]
    return PixelSettings(patch, 2, 2, mean, std, least, most)


def host_part(data: bytes, settings: PixelSettings) -> Any:
    """From a file's bytes to the item that travels, as `PromptBuilder.open_picture` does it."""
    frame = decode_image(data)
    size = smart_resize(*frame.shape[1:], settings.patch_size * 2, settings.min_pixels, settings.max_pixels)
    return make_media_item("image", resize(frame[None], *size), settings)


def patches(pixels: torch.Tensor, settings: PixelSettings, dtype: torch.dtype) -> torch.Tensor:
    shape = settings.patch_size, settings.temporal_patch_size, settings.merge_size
    return normalize_patchify(pixels, settings.mean, settings.std, *shape, dtype)


def measure_picture(family: str, data: bytes, repeats: int) -> dict[str, Any]:
    from transformers import Qwen2VLImageProcessor

    settings = settings_of(family)
    bounds = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    reference = Qwen2VLImageProcessor(size=bounds, **arguments(settings))
    item = host_part(data, settings)
    ours = patches(item.pixels, settings, torch.float32)
    assert torch.equal(ours, reference(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"])
    del ours
    ways: dict[str, Callable[[], Any]] = {
        "host_ms": lambda: host_part(data, settings),
        "patches_float32_ms": lambda: patches(item.pixels, settings, torch.float32),
        "patches_bfloat16_ms": lambda: patches(item.pixels, settings, torch.bfloat16),
        "reference_ms": lambda: reference(Image.open(io.BytesIO(data)), return_tensors="pt"),
        "reference_bfloat16_ms": lambda: reference(Image.open(io.BytesIO(data)), return_tensors="pt")[
            "pixel_values"
        ].to(torch.bfloat16),
        "jpeg_alone_ms": lambda: Image.open(io.BytesIO(data)).load(),
    }
    found = {name: round(value, 2) for name, value in in_turns(ways, repeats).items()}
    whole = found["host_ms"] + found["patches_float32_ms"]
    return {
        "grid": item.grid_thw,
        "bytes_to_device": item.pixels.numel(),
        **found,
        "times_as_fast": round(found["reference_ms"] / whole, 2),
        "times_as_fast_bfloat16": round(
            found["reference_bfloat16_ms"] / (found["host_ms"] + found["patches_bfloat16_ms"]), 2
        ),
    }  # fmt: skip


def arguments(settings: PixelSettings) -> dict[str, Any]:
    """Of transformers' processors."""
    return {
        "patch_size": settings.patch_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "merge_size": settings.merge_size,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians in milliseconds; what disturbs one disturbs all."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            taken[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def measure_video(family: str, path: Path) -> dict[str, Any]:
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
    from transformers.video_utils import load_video

    rule, size_rule, least, most = VIDEOS[family]
    settings = settings_of(family)
    size_of = partial(size_rule, factor=settings.patch_size * 2, min_pixels=least, max_pixels=most)
    kind = Qwen2VLVideoProcessor if family == "qwen2_5_vl" else Qwen3VLVideoProcessor
    reference = kind(
        size={"shortest_edge": least, "longest_edge": most}, cap_pixels_per_frame=False, **arguments(settings)
    )

    def ours() -> Any:
        video = read_video(path, Sampling(rule), size_of=size_of)
        make_media_item("video", video.frames, settings)
        return video

    def theirs() -> torch.Tensor:
        frames, _ = load_video(str(path), backend="pyav", sample_indices_fn=partial(reference.sample_frames, fps=2))
        return reference(frames, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]

    video, expected = ours(), theirs()
    assert torch.equal(patches(video.frames, settings, torch.float32), expected)
    del expected
    found = in_turns(
        {
            "host_ms": ours,
            "decoder_ms": lambda: decode_alone(path, video.indices[-1]),
            "patches_bfloat16_ms": lambda: patches(video.frames, settings, torch.bfloat16),
            "reference_ms": theirs,
        },
        1,
    )
    whole = found["host_ms"] + found["patches_bfloat16_ms"]
    return {
        "frames": list(video.frames.shape),
        "decoded_frames": video.decoded_frames,
        "bytes_to_device": video.frames.numel(),
        **{name: round(value) for name, value in found.items()},
        "host_to_decoder": round(found["host_ms"] / found["decoder_ms"], 2),
        "times_as_fast": round(found["reference_ms"] / whole, 2),
    }


def decode_alone(path: Path, last: int) -> None:
    """Every packet up to the last frame that is wanted through FFmpeg: all depend on those before them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = _DECODER_THREADS
        for number, _ in enumerate(container.decode(stream)):
            if number == last:
                break


def write_clip(path: Path, photo: np.ndarray, seconds: int = 60, rate: int = 30) -> Path:
    """A slow pan over a picture twice as large, with a key frame every two seconds."""
    large = np.asarray(Image.fromarray(photo).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC))
    count = seconds * rate
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", Fraction(rate), options={"preset": "veryfast", "g": str(2 * rate)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(count):
            top, left = HEIGHT * number // count, WIDTH * number // count
            window = np.ascontiguousarray(large[top : top + HEIGHT, left : left + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    main()
