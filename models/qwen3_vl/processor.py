"""Qwen3-VL's prompts (dense and MoE): a time stamp in text before every temporal patch of a video.

Source: transformers' Qwen3VLProcessor, Qwen3VLVideoProcessor and Qwen3VLModel.get_rope_index.
Legend: T prompt tokens, h/w a grid in merged tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np

from executor.errors import UserError
from executor.prompt.builder import PromptBuilder
from executor.prompt.chat import Piece
from executor.prompt.expand import Fill
from executor.prompt.options import MediaOptions
from executor.prompt.positions import place_spans
from executor.schedule.request import MediaItem, Span
from models.qwen3_vl.config import parse

PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
HALF = (0.5, 0.5, 0.5)
PICTURE_DEFAULTS = {  # checkpoints share Qwen2-VL's picture class, whose own defaults are for 14-pixel patches
    **PATCHES,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
}
VIDEO_DEFAULTS = {
    **PATCHES,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},  # of all frames together
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
    "max_video_tokens": 768,
}


def patch_timestamps(frame_timestamps_s: Sequence[float], temporal_patch_size: int) -> list[float]:
    """Seconds of each temporal patch: the mean of its first and last frame. The last frame fills the last patch."""
    seconds = list(frame_timestamps_s)
    seconds += seconds[-1:] * (-len(seconds) % temporal_patch_size)
    firsts, lasts = seconds[::temporal_patch_size], seconds[temporal_patch_size - 1 :: temporal_patch_size]
    return [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]


def mrope_positions(
    num_tokens: int, spans: Sequence[Span], media: Sequence[MediaItem], *, merge_size: int
) -> tuple[np.ndarray, int]:
    """Positions [3, T] int64 and delta. Every span is one frame at time 0: time stamps tell frames apart."""
    now = np.zeros(1, dtype=np.int64)
    grids = [(now, *(side // merge_size for side in media[span.media_index].grid_thw[1:])) for span in spans]
    return place_spans(num_tokens, spans, grids)


class Processor(PromptBuilder):
    parse_config = staticmethod(parse)
    picture_defaults = PICTURE_DEFAULTS
    video_defaults = VIDEO_DEFAULTS
    box_convention = "relative_1000"  # thousandths of its height and width

    sizes_all_frames = True

    @property
    def replaces_video_pair(self) -> bool:
        # transformers 5.23 leaves the template's pair around all frames; the weights were trained without it.
        return self.options.video_timestamps == "per_frame"

    def sampling_rule(self) -> Callable:
        from executor.media.sampling import spread

        return spread

    def frame_size(self, num_frames: int, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        """The bounds are on all frames together, the checkpoint's as well as a recipe's `video_max_pixels`. The
        checkpoint's yields where a request has not the room for it."""
        from executor.media.sampling import frame_size_of_all

        video = self.video
        frames_of_patches = num_frames + -num_frames % video.temporal_patch_size  # the last one is repeated
        frame_px = video.factor**2 * video.temporal_patch_size * num_frames // frames_of_patches
        room = options.video_tokens(-(-video.max_pixels // frame_px)) * frame_px
        most = options.video_max_pixels or min(video.max_pixels, room)
        if options.frame_max_pixels:
            most = min(most, options.frame_max_pixels * num_frames)
        least = min(options.video_min_pixels or video.min_pixels, most)
        if options.frame_min_pixels:
            least = options.frame_min_pixels * num_frames
            if least > most:
                raise UserError(
                    f"min_pixels {options.frame_min_pixels} of a frame is {least} pixels of {num_frames} frames, above "
                    f"max_pixels {most}; set both, or neither"
                )
        capped = options.cap_pixels_per_frame or video.cap_pixels_per_frame
        return frame_size_of_all(
            num_frames,
            height,
            width,
            factor=video.factor,
            min_pixels=least,
            max_pixels=most,
            temporal_patch_size=video.temporal_patch_size,
            max_video_tokens=video.max_video_tokens if capped else None,
        )

    def video_pieces(self, index: int, item: MediaItem) -> list[Piece | Fill]:
        per_patch = item.num_tokens // item.grid_thw[0]
        pieces: list[Piece | Fill] = []
        for patch, seconds in enumerate(patch_timestamps(item.timestamps_s, self.video.temporal_patch_size)):
            fill = Fill(index, per_patch, self.tokens.video, offset=patch * per_patch)
            pieces += [f"<{seconds:.1f} seconds>", self.tokens.start, fill, self.tokens.end]
        return pieces

    def positions(self, num_tokens: int, spans: Sequence[Span], media: Sequence[MediaItem]) -> tuple[np.ndarray, int]:
        return mrope_positions(num_tokens, spans, media, merge_size=self.picture.merge_size)
