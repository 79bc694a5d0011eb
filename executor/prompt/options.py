"""What a recipe and a message's part say about how pictures and videos are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from executor.prompt.messages import MediaPart
from executor.prompt.request_options import RequestOptions
from executor.recipe.schema import Recipe

# How the options of a part are called here.
_PICTURE_NAMES = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
_VIDEO_NAMES = {"min_pixels": "frame_min_pixels", "max_pixels": "frame_max_pixels"}
# The official tools share total_pixels out among pairs of frames: one frame may have 2 * total_pixels / frames.
_FRAMES_OF_A_PAIR = 2
# After the resize. More tokens than any context holds; a number beyond it would be allocated first and refused later.
MAX_PICTURE_PIXELS = 2**27
MAX_VIDEO_PIXELS = 2**30  # of all frames


@dataclass(frozen=True)
class MediaOptions:
    """What a recipe says about pictures and videos; None: what the checkpoint says."""

    min_pixels: int | None = None  # of a picture after the resize
    max_pixels: int | None = None
    video_min_pixels: int | None = None  # of all frames of a video together; Qwen3-VL only
    video_max_pixels: int | None = None
    frame_min_pixels: int | None = None  # of one frame of a video
    frame_max_pixels: int | None = None
    fps: float | None = None  # frames sampled per second of video
    num_frames: int | None = None  # or so many from the whole video
    start_s: float | None = None  # only this stretch of a video
    end_s: float | None = None
    resized: tuple[int, int] | None = None  # (height, width) wanted, before it is rounded to whole tokens
    min_frames: int | None = None
    max_frames: int | None = None
    cap_pixels_per_frame: bool = False  # as the reference implementation does; transformers will make it the default
    video_timestamps: Literal["per_frame", "outer_pair"] = "per_frame"  # Qwen3-VL only
    max_model_len: int | None = None  # tokens of a request: a video leaves room in them where nothing else is said
    limits: Any = None  # executor.media.media's limits; None: its defaults

    def video_tokens(self, most: int) -> int:
        """`most` tokens of one video, or fewer that leave a quarter of a request for its text and the answer."""
        return most if self.max_model_len is None else max(1, min(most, self.max_model_len * 3 // 4))

    def with_overrides(self, part: MediaPart) -> "MediaOptions":
        """The options for one part of a message, which may carry its own (checked by normalise_messages)."""
        return self._changed(part.kind, part.overrides)

    def of_request(
        self, kind: Literal["image", "video"], said: RequestOptions, *, sizes_all_frames: bool
    ) -> "MediaOptions":
        """The options for pictures, or videos, of a request. `sizes_all_frames`: whether a size is that of a video's
        frames together, else it is that of one."""
        if kind == "image":
            return self._changed(kind, said.image)
        names = ("video_min_pixels", "video_max_pixels") if sizes_all_frames else tuple(_VIDEO_NAMES.values())
        size = {name: value for name, value in zip(names, said.video_size, strict=True) if value is not None}
        if said.cap_pixels_per_frame is not None:
            size["cap_pixels_per_frame"] = said.cap_pixels_per_frame
        return replace(self, **size)._changed(kind, said.video)

    def _changed(self, kind: Literal["image", "video"], given: Mapping[str, Any]) -> "MediaOptions":
        names = _VIDEO_NAMES if kind == "video" else _PICTURE_NAMES
        changed = {names[name]: given[name] for name in names if name in given}
        changed |= {name: given[name] for name in ("fps", "num_frames", "min_frames", "max_frames") if name in given}
        if "fps" in given:
            changed["num_frames"] = None  # a number of frames from elsewhere would win
        if "total_pixels" in given:
            changed["video_max_pixels"] = given["total_pixels"] * _FRAMES_OF_A_PAIR
        changed |= {f"{end}_s": given[f"video_{end}"] for end in ("start", "end") if f"video_{end}" in given}
        if "resized_height" in given:
            changed["resized"] = (given["resized_height"], given["resized_width"])
        return replace(self, **changed)


def media_options(recipe: Recipe) -> MediaOptions:
    """What the recipe says about pictures and videos."""
    data = recipe.data
    return MediaOptions(
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        video_max_pixels=data.video_max_pixels,
        frame_max_pixels=data.frame_max_pixels,
        fps=data.fps,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        cap_pixels_per_frame=data.cap_pixels_per_frame,
        video_timestamps=data.video_timestamps,
        max_model_len=recipe.scheduler.max_model_len,
    )
