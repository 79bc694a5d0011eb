"""Qwen2.5-VL's prompts: one run of tokens for a video, positions that follow its seconds.

Source: the Qwen2.5-VL technical report (arXiv 2502.13923, section 2.1) for time-aligned M-RoPE; transformers'
Qwen2_5_VLProcessor, Qwen2VLVideoProcessor and Qwen2_5_VLModel.get_rope_index for the numbers.
Legend: T prompt tokens, t/h/w a grid in merged tokens.
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
from models.qwen2_5_vl.config import parse

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
COMMON = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
PICTURE_DEFAULTS = {**COMMON, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}
VIDEO_DEFAULTS = {
    **COMMON,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},  # of one frame
    "do_sample_frames": False,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
    "max_video_tokens": 128000,
}

# Where neither the checkpoint nor the recipe bounds videos. Of one frame: qwen_vl_utils' VIDEO_MAX_PIXELS. Of all
# frames: what the technical report (arXiv 2502.13923) evaluates videos with.
FRAME_TOKENS = 768
VIDEO_TOKENS = 24576


def mrope_positions(
    num_tokens: int,
    spans: Sequence[Span],
    media: Sequence[MediaItem],
    *,
    merge_size: int,
    tokens_per_second: float,
) -> tuple[np.ndarray, int]:
    """Positions [3, T] int64 and delta.

    A video's temporal index is its seconds times `tokens_per_second`, rounded down, computed in float32 as
    transformers does. Text resumes after the greatest position of a span, as in training (transformers 5.23 instead
    resumes after the greater of h and w, and so lets text overlap a long video).
    """
    grids = []
    for span in spans:
        item = media[span.media_index]
        t, h, w = item.grid_thw
        interval = np.float32(tokens_per_second) * np.float32(item.seconds_per_grid)
        times = (np.arange(t, dtype=np.float32) * interval).astype(np.int64)
        grids.append((times, h // merge_size, w // merge_size))
    return place_spans(num_tokens, spans, grids)


class Processor(PromptBuilder):
    parse_config = staticmethod(parse)
    picture_defaults = PICTURE_DEFAULTS
    video_defaults = VIDEO_DEFAULTS
    box_convention = "absolute"  # pixels of the resized picture
    replaces_video_pair = False
    sizes_all_frames = False

    def sampling_rule(self) -> Callable:
        from executor.media.sampling import strided

        return strided

    def frame_size(self, num_frames: int, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        """The checkpoint's bounds are on one frame, and they are those of its pictures: a minute of 1080p would be
        161,482 tokens. Unless the recipe or the message says otherwise, a frame has at most FRAME_TOKENS and all
        frames together VIDEO_TOKENS, each counted for two frames as the encoder merges them; a bound of all frames is
        shared out among them, and where a share is less than the least frame, the share holds.
        """
        from executor.media.sampling import frame_size_per_frame

        video = self.video
        token_px = video.factor**2
        of_all = options.video_max_pixels
        if of_all is None:
            of_all = options.video_tokens(VIDEO_TOKENS) * token_px * video.temporal_patch_size
        of_each = options.frame_max_pixels or min(video.max_pixels, FRAME_TOKENS * token_px)
        num_encoded = num_frames + -num_frames % video.temporal_patch_size  # the last one is repeated
        most = min(of_each, of_all // num_encoded)
        least = options.frame_min_pixels or min(video.min_pixels, most)
        if least > most:
            raise UserError(f"min_pixels {least} of a frame is above max_pixels {most}; set both, or neither")
        capped = options.cap_pixels_per_frame or video.cap_pixels_per_frame
        return frame_size_per_frame(
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
        return [Fill(index, item.num_tokens, self.tokens.video)]

    def positions(self, num_tokens: int, spans: Sequence[Span], media: Sequence[MediaItem]) -> tuple[np.ndarray, int]:
        return mrope_positions(
            num_tokens,
            spans,
            media,
            merge_size=self.picture.merge_size,
            tokens_per_second=self.config.vision.tokens_per_second,
        )
