"""Videos: sampled frames of a file, an animated picture, a list of pictures or an array, with their time stamps.

Invariants: which frames are taken follows from time stamps (timeline.py) and the family's rule (sampling.py), not
from a rate assumed constant; only the sampled frames are held, resized one by one when the caller says to which size.
Does not know models, prompts or patches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from executor.errors import UserError
from executor.media.checksums import damage
from executor.media.container import ContainerFrames
from executor.media.extent import missing_bytes
from executor.media.formats import HEAD_BYTES, sniff
from executor.media.image import DECODE_ERRORS, decode_image, open_picture, resize, upright
from executor.media.media import DEFAULT_LIMITS, Deadline, Media, MediaLimits
from executor.media.sampling import Sampling
from executor.media.timeline import Timeline

# Animated pictures: delays of 10 ms or less are shown as 100 ms by every browser, so that is what people see.
_SHORTEST_DELAY_MS, _DEFAULT_DELAY_MS = 10, 100

SizeRule = Callable[[int, int, int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class SampledVideo:
    """The frames a model looks at. `decoded_*` and `seeks` say what it cost to get them."""

    frames: torch.Tensor  # uint8 [F, 3, H, W]; F as sampled, before any repeat to an even count
    timestamps_s: tuple[float, ...]  # [F], from the first frame of the video on
    indices: tuple[int, ...]  # [F], of the frames taken, in display order
    total_frames: int
    frame_rate: float  # of the video: nominal where it is constant, else the mean
    duration_s: float
    height: int  # of the video, before the resize
    width: int
    decoded_frames: int
    decoded_groups: int
    seeks: int
    warnings: tuple[str, ...]  # what is not there of a damaged video, each naming the source
    window_frames: int = 0  # of the stretch that was sampled; 0: of the whole video

    @property
    def sampled_fps(self) -> float:
        """Sampled frames per second of video (transformers: VideoMetadata.sampled_fps)."""
        return len(self.indices) / (self.window_frames or self.total_frames) * self.frame_rate


class _Frames(Protocol):
    """What frames are read from. `read` takes ascending distinct indices and yields (index, uint8 [H, W, 3])."""

    timeline: Timeline
    decoded_frames: int
    decoded_groups: int
    seeks: int
    warnings: Sequence[str]

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]: ...

    def close(self) -> None: ...


def read_video(
    content: bytes | Path | Image.Image | np.ndarray | Sequence,
    sampling: Sampling,
    *,
    source: str = "video",
    limits: MediaLimits = DEFAULT_LIMITS,
    size_of: SizeRule | None = None,
    frame_rate: float | None = None,
) -> SampledVideo:
    """Samples a video file (bytes or path), an animated picture, an array uint8 [F, H, W, 3] or a list of pictures.

    size_of: (num_frames, height, width) -> (height, width); each frame is resized to it as soon as it is decoded, so
    that a long video never lies in memory at full size. None: frames keep their size.
    frame_rate: of an array or list, in frames per second. None: they are taken as sampled already, at `sampling.fps`.
    A damaged file gives its whole frames, and `warnings` says what is not there.
    Errors: UserError naming `source` for what is empty, without whole frames, broken for the most part, above
    `limits`, or has fewer frames than asked for.
    """
    if frame_rate is not None and not frame_rate > 0:
        raise UserError(f"{source}: frame_rate must be above 0, got {frame_rate}")
    with closing(_open(content, source, limits, frame_rate or sampling.fps)) as opened:
        timeline = opened.timeline
        if timeline.num_frames > limits.video_frames:
            raise UserError(f"{source}: {timeline.num_frames} frames, at most {limits.video_frames} allowed")
        sampled_already = isinstance(opened, _GivenFrames) and frame_rate is None
        try:
            cut = sampling.start_s is not None or sampling.end_s is not None
            if sampled_already and timeline.num_frames <= sampling.max_frames and not cut:
                chosen = list(range(timeline.num_frames))
            else:
                chosen = sampling.indices(timeline.num_frames, timeline.frame_rate)
            indices = timeline.frames_at(chosen)
            frames, (height, width) = _collect(opened, indices, source, size_of)
        except UserError as error:
            raise UserError(_naming(source, str(error))) from error
    return SampledVideo(
        frames=frames,
        timestamps_s=tuple(index / timeline.frame_rate for index in chosen),
        indices=tuple(indices),
        total_frames=timeline.num_frames,
        frame_rate=timeline.frame_rate,
        duration_s=timeline.duration_s,
        height=height,
        width=width,
        decoded_frames=opened.decoded_frames,
        decoded_groups=opened.decoded_groups,
        seeks=opened.seeks,
        warnings=tuple(opened.warnings),
        window_frames=sampling.window(timeline.num_frames, timeline.frame_rate)[1],
    )


def _collect(
    opened: _Frames, indices: list[int], source: str, size_of: SizeRule | None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """uint8 [F, 3, H, W] for `indices` (ascending, repeats allowed), and the height and width before the resize."""
    frames: dict[int, torch.Tensor] = {}
    first_shape: tuple[int, ...] | None = None
    for index, pixels in opened.read(sorted(set(indices))):
        if first_shape is None:
            first_shape = pixels.shape
        if pixels.shape != first_shape:
            raise UserError(
                f"{source}: frame {index} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first one "
                f"{first_shape[1]}x{first_shape[0]}; all frames of a video must be of one size"
            )
        frame = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        frames[index] = frame if size_of is None else resize(frame, *size_of(len(indices), *pixels.shape[:2]))
    return torch.cat([frames[index] for index in indices]), first_shape[:2]


def _open(content: object, source: str, limits: MediaLimits, frame_rate: float) -> _Frames:
    if isinstance(content, np.ndarray | list | tuple):
        return _GivenFrames(content, source, limits, frame_rate)
    if isinstance(content, Image.Image):
        return _PictureFrames(content, source, limits)
    if isinstance(content, bytes):
        head, num_bytes = content[:HEAD_BYTES], len(content)
    else:
        try:
            with content.open("rb") as file:
                head, num_bytes = file.read(HEAD_BYTES), content.stat().st_size
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror})") from error
    if not head:
        raise UserError(f"{source}: the video is empty (0 bytes)")
    if num_bytes > limits.video_bytes:
        raise UserError(f"{source}: {num_bytes} bytes, at most {limits.video_bytes} allowed for a video")
    sniffed = sniff(head)
    if sniffed and sniffed[0] == "image":
        return _PictureFrames(content, source, limits)
    return ContainerFrames(content, source, limits)


class _GivenFrames:
    """Frames that are there already: uint8 [F, H, W, 3], or pictures (anything `decode_image` takes, or Media)."""

    decoded_groups = seeks = 0
    warnings: tuple[str, ...] = ()

    def __init__(self, frames: np.ndarray | Sequence, source: str, limits: MediaLimits, frame_rate: float):
        if isinstance(frames, np.ndarray) and (
            frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]
        ):
            raise UserError(f"{source}: got {frames.dtype} {list(frames.shape)}, want uint8 [F, H, W, 3]")
        if len(frames) == 0:
            raise UserError(f"{source}: the video is empty: no frame in it")
        self._frames, self._source, self._limits = frames, source, limits
        self.decoded_frames = 0
        self.timeline = Timeline(np.arange(len(frames)) / frame_rate, 1 / frame_rate, frame_rate)

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            frame = self._frames[index]
            if isinstance(self._frames, np.ndarray):
                yield index, np.array(frame)  # a copy: torch warns of read-only memory
                continue
            content, name = (
                (frame.content, frame.source) if isinstance(frame, Media) else (frame, f"{self._source}, frame {index}")
            )
            self.decoded_frames += 1
            yield index, decode_image(content, source=name, limits=self._limits).permute(1, 2, 0).numpy()

    def close(self) -> None:
        pass


class _PictureFrames:
    """An animated GIF, WebP or PNG, or a still picture as a video of one frame; each frame has its own delay."""

    decoded_groups = seeks = 0

    def __init__(self, content: bytes | Path | Image.Image, source: str, limits: MediaLimits):
        whole, self._num_missing_bytes = _without_cut_frame(content)
        whole, self._damage = _without_damaged_end(whole)
        self._picture = open_picture(whole, source, limits)
        self._owned = not isinstance(content, Image.Image)
        self._source, self.decoded_frames, self.warnings = source, 0, []
        self._deadline = Deadline(source, limits)
        try:
            delays_s = self._find_frames(limits)
        except BaseException:
            self.close()
            raise
        starts_s = np.concatenate([[0.0], np.cumsum(delays_s)[:-1]])
        rate = 1 / delays_s[0] if len(set(delays_s)) == 1 else None
        self.timeline = Timeline(starts_s, delays_s[-1], rate)
        if self.timeline.duration_s > limits.video_duration_s:
            self.close()
            raise UserError(
                f"{source}: {self.timeline.duration_s:.0f} seconds, at most {limits.video_duration_s:.0f} allowed"
            )

    def _find_frames(self, limits: MediaLimits) -> list[float]:
        """Seconds that each frame stays: known when it is decoded. Frames behind a damaged one are built upon it."""
        promised: int | None = None
        fault: Exception | str | None = None
        try:
            promised = getattr(self._picture, "n_frames", 1)
        except DECODE_ERRORS as error:  # counting walks through the file
            fault = error
        delays_s: list[float] = []
        while promised is None or len(delays_s) < promised:
            if len(delays_s) == limits.video_frames or (promised or 0) > limits.video_frames:
                raise UserError(
                    f"{self._source}: {promised or 'more'} frames, at most {limits.video_frames} allowed; cut it into "
                    "parts"
                )
            num_pixels = (promised or len(delays_s)) * math.prod(self._picture.size)
            if num_pixels > limits.animation_pixels:
                raise UserError(
                    f"{self._source}: an animation of {num_pixels} pixels in all its frames, at most "
                    f"{limits.animation_pixels} are drawn; send it as a video (MP4, WebM)"
                )
            self._deadline.check()
            try:
                self._show(len(delays_s))
            except DECODE_ERRORS as error:
                fault = error
                break
            delay_ms = self._picture.info.get("duration") or 0
            delays_s.append((delay_ms if delay_ms > _SHORTEST_DELAY_MS else _DEFAULT_DELAY_MS) / 1000)
        if not delays_s:
            fault = self._damage or fault
            raise UserError(f"{self._source}: the picture is damaged or incomplete, no whole frame is in it ({fault})")
        fault = (
            self._damage
            or fault
            or (f"{self._num_missing_bytes} bytes are missing" if self._num_missing_bytes else None)
        )
        if fault:
            of_all = f" of {promised}" if promised else ""
            self.warnings.append(
                f"{self._source}: the video is damaged or cut short ({fault}); the answer is from its first "
                f"{len(delays_s)}{of_all} frames"
            )
        return delays_s

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            self._deadline.check()
            try:
                self._show(index)
            except DECODE_ERRORS as error:
                raise UserError(f"{self._source}: frame {index} is damaged or incomplete ({error})") from error
            yield index, upright(self._picture)

    def close(self) -> None:
        if self._owned:
            self._picture.close()

    def _show(self, index: int) -> None:
        self._picture.seek(index)
        self._picture.load()
        self.decoded_frames += 1


def _without_cut_frame(content: bytes | Path | Image.Image) -> tuple[bytes | Path | Image.Image, int]:
    """An animated WebP that is cut short, up to its last whole frame, and how many bytes are missing.

    Other content as it stands, and 0: Pillow reads the beginnings of other animations, but libwebp only whole files.
    """
    if isinstance(content, Image.Image):
        return content, 0
    missing = missing_bytes(content)
    data = content if isinstance(content, bytes) else content.read_bytes() if missing else b""
    if not missing or data[8:12] != b"WEBP":
        return content, 0
    at, last_whole = 12, 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
        if at > len(data):
            break
        if kind == b"ANMF":
            last_whole = at
    if last_whole == 12:
        return content, 0
    return data[:4] + (last_whole - 8).to_bytes(4, "little") + data[8:last_whole], missing


def _without_damaged_end(content: bytes | Path | Image.Image) -> tuple[bytes | Path | Image.Image, str | None]:
    """A PNG or JPEG up to where it is damaged, and what the damage is; other content as it stands, and None."""
    found = None if isinstance(content, Image.Image) else damage(content, first_frame=False)
    if found is None:
        return content, None
    data = content if isinstance(content, bytes) else content.read_bytes()
    return data[: found[0]], found[1]


def _naming(source: str, message: str) -> str:
    return message if message.startswith(source) else f"{source}: {message}"
