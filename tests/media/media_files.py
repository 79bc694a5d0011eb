"""Makes the videos that the tests read. Every frame differs from every other, so that a wrong one shows."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def make_frames(num_frames: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """uint8 [F, H, W, 3]: blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, 4, 4, 3), dtype=np.uint8)
    return blocks.repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)[:, :height, :width]


def write_video(
    path: Path,
    frames: np.ndarray,
    rate: Fraction | int = 10,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    rotation: int = 0,
    audio: bool = False,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames uint8 [F, H, W, 3] at a constant rate, or shown at `times_ms`."""
    container = av.open(str(path), "w", format=container_format, options=container_options or {})
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    if times_ms is not None:
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
    if rotation:
        stream.set_display_rotation(rotation)
    sound = container.add_stream("aac", rate=16000) if audio else None
    if sound is not None:
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        if times_ms is not None:
            frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
    if sound is not None:
        container.mux(sound.encode(None))
    container.close()
    return path


def decode_all(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]: every frame, in order, without seeking; the reference for the seeking reader."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
