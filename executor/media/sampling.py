"""Which frames of a video are looked at, and at which size: arithmetic only.

Invariant: for the same total, rate and settings the indices and sizes are those of transformers 5.23's video
processors with `do_sample_frames=True` (qwen2_vl and qwen3_vl), wherever those give an answer at all.
The two families differ in both rules; a processor hands in the one it wants. Knows neither files nor pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from executor.errors import UserError
from executor.media.image import check_aspect_ratio, fit_area, smart_resize


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled. `rule` is `strided` (Qwen2.5-VL) or `spread` (Qwen3-VL)."""

    rule: Callable[[int, float, "Sampling"], list[int]]
    fps: float = 2.0  # frames looked at per second of video
    num_frames: int | None = None  # set: about this many, whatever fps says
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2
    start_s: float | None = None  # only the frames from here
    end_s: float | None = None  # to here, both included (qwen_vl_utils: video_start, video_end)

    def __post_init__(self) -> None:
        if not self.fps > 0 or (self.num_frames is not None and self.num_frames < 1):
            raise UserError(f"fps {self.fps}, num_frames {self.num_frames}: both must be above 0")
        if not 1 <= self.min_frames <= self.max_frames:
            raise UserError(
                f"min_frames {self.min_frames}, max_frames {self.max_frames}: want 1 <= min_frames <= max_frames"
            )

    def window(self, total_frames: int, frame_rate: float) -> tuple[int, int]:
        """First frame and number of frames of the stretch from `start_s` to `end_s`, cut to what the video has.

        As qwen_vl_utils' calculate_video_frame_range; like there, a stretch of fewer than two frames is refused.
        """
        if self.start_s is None and self.end_s is None:
            return 0, total_frames
        duration_s = total_frames / frame_rate
        first = math.ceil(min(self.start_s or 0.0, duration_s) * frame_rate)
        last = total_frames - 1
        if self.end_s is not None:
            last = min(math.floor(min(self.end_s, duration_s) * frame_rate), last)
        if first >= last:
            raise UserError(
                f"video_start {self.start_s or 0} to video_end {self.end_s or 'the end'}: fewer than two frames; the "
                f"video has {total_frames} in {duration_s:.2f} seconds"
            )
        return first, last - first + 1

    def indices(self, total_frames: int, frame_rate: float) -> list[int]:
        """Ascending indices into the `total_frames` >= 1 of a video that shows `frame_rate` of them per second."""
        first, num_frames = self.window(total_frames, frame_rate)
        return [first + index for index in self.rule(num_frames, frame_rate, self)]


def strided(total_frames: int, frame_rate: float, sampling: Sampling) -> list[int]:
    """Qwen2.5-VL: equal strides from frame 0, an even count (transformers: Qwen2VLVideoProcessor.sample_frames).

    Departures: a video shorter than one temporal patch gives all it has (transformers divides by zero), and the index
    one past the end, which its floating point stride yields for many lengths (17 frames, 14 wanted: 15), is left out.
    """
    patch = sampling.temporal_patch_size
    if total_frames < patch:
        return list(range(total_frames))
    if sampling.num_frames is not None:
        wanted = round(sampling.num_frames / patch) * patch
    else:
        most = math.floor(min(sampling.max_frames, total_frames) / patch) * patch
        wanted = total_frames / frame_rate * sampling.fps
        wanted = math.floor(min(max(wanted, sampling.min_frames), most, total_frames) / patch) * patch
    wanted = max(wanted, patch)
    if wanted > total_frames:
        raise UserError(f"{wanted} frames asked for by num_frames, the video has {total_frames}")
    # torch's float32 arange, because its rounding decides which frame is taken.
    return torch.arange(0, total_frames, total_frames / wanted).int().tolist()[:wanted]


def spread(total_frames: int, frame_rate: float, sampling: Sampling) -> list[int]:
    """Qwen3-VL: evenly spread from the first frame to the last (transformers: Qwen3VLVideoProcessor.sample_frames)."""
    wanted = sampling.num_frames
    if wanted is None:
        wanted = int(total_frames / frame_rate * sampling.fps)
        wanted = min(max(wanted, sampling.min_frames), sampling.max_frames, total_frames)
    return np.linspace(0, total_frames - 1, wanted).round().astype(int).tolist()


def frame_size_per_frame(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    temporal_patch_size: int = 2,
    max_video_tokens: int | None = None,
) -> tuple[int, int]:
    """Qwen2.5-VL: (height, width) of every frame; `min_pixels` and `max_pixels` bound one frame.

    max_video_tokens None: transformers' `cap_pixels_per_frame=False`. A number (128000 there): True; a frame may then
    also not exceed its even share of 90 % of that many tokens, unless the share is below 1.05 * min_pixels.
    """
    num_frames = max(num_frames, temporal_patch_size)  # a single frame is repeated before the resize
    if max_video_tokens is not None:
        total_pixels = int(max_video_tokens * factor * factor * 0.9)
        share = min(max_pixels, total_pixels * temporal_patch_size // num_frames)
        max_pixels = max(share, int(min_pixels * 1.05))
    return smart_resize(height, width, factor, min_pixels, max_pixels)


def frame_size_of_all(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    temporal_patch_size: int = 2,
    max_video_tokens: int | None = None,
) -> tuple[int, int]:
    """Qwen3-VL: (height, width) of every frame; `min_pixels` and `max_pixels` bound the sum over all frames.

    max_video_tokens None: transformers' `cap_pixels_per_frame=False`. A number (768 there): True; a frame may then
    not exceed that many tokens either, nor its even share of max_pixels, unless that is below 1.05 * min_pixels.
    """
    check_aspect_ratio(height, width)
    num_frames = max(num_frames, temporal_patch_size)  # a single frame is repeated before the resize
    if max_video_tokens is not None:
        share = min(max_video_tokens * factor * factor, max_pixels // num_frames)
        max_pixels = max(share, int(min_pixels * 1.05)) * num_frames
    if height < factor or width < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / temporal_patch_size) * temporal_patch_size * rounded[0] * rounded[1]
    return fit_area(height, width, volume, rounded, factor, min_pixels, max_pixels, num_frames)
