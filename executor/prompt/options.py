"""What a recipe and a message's part say about how pictures and videos are prepared."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from executor.errors import UserError
from executor.prompt.chat import MediaPart


@dataclass(frozen=True)
class MediaOptions:
    """What a recipe says about pictures and videos; None: what the checkpoint says."""

    min_pixels: int | None = None  # of a picture after the resize
    max_pixels: int | None = None
    video_max_pixels: int | None = None  # of all frames of a video together
    frame_max_pixels: int | None = None  # of one frame of a video
    fps: float | None = None  # frames sampled per second of video
    num_frames: int | None = None  # or so many from the whole video
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
        """The options for one part of a message, which may carry its own."""
        given = dict(part.overrides)
        if part.kind == "video":
            if "fps" in given and "num_frames" in given:
                raise UserError(f"{part.where}: fps and num_frames exclude each other; give one of them")
            names = {"max_pixels": "frame_max_pixels", "total_pixels": "video_max_pixels"}
            given = {names.get(name, name): value for name, value in given.items()}
        return replace(self, **{name: value if name == "fps" else int(value) for name, value in given.items()})
