"""A resized picture or video as the engine takes it, with the digest that it is known by."""

import hashlib
import math
from typing import Any, Literal

from executor.checkpoint.settings import PixelSettings
from executor.schedule.request import MediaItem

DIGEST_BYTES = 16


def media_digest(
    kind: str, pixels: Any, grid_thw: tuple[int, int, int], settings: PixelSettings, seconds_per_grid: float = 0.0
) -> bytes:
    """Digest of all that the embeddings depend on: resized pixels (uint8 tensor), grid, kind, patches, mean and std.

    And of a video's `seconds_per_grid`, though embeddings do not know it: positions may follow from it, and the
    prefix cache takes equal tokens and digests for equal keys and values.
    """
    frame = (kind, tuple(pixels.shape), grid_thw, settings.patch_size, settings.temporal_patch_size)
    digest = hashlib.sha256()  # CPUs have instructions for it: twice as fast as blake2b
    digest.update(repr((*frame, settings.merge_size, settings.mean, settings.std, seconds_per_grid)).encode())
    digest.update(memoryview(pixels.contiguous().numpy()).cast("B"))
    return digest.digest()[:DIGEST_BYTES]


def make_media_item(
    kind: Literal["image", "video"],
    pixels: Any,
    settings: PixelSettings,
    *,
    source: str = "",
    seconds_per_grid: float = 0.0,
    timestamps_s: tuple[float, ...] = (),
    original_hw: tuple[int, int] = (0, 0),
    warnings: tuple[str, ...] = (),
) -> MediaItem:
    """pixels: uint8 tensor [F, C, H, W], resized; a video's last frame is repeated to fill its temporal patch."""
    from executor.media.patches import repeat_last

    steps = 1
    if kind == "video":
        pixels = repeat_last(pixels, settings.temporal_patch_size)
        steps = pixels.shape[0] // settings.temporal_patch_size
    grid_thw = (steps, pixels.shape[2] // settings.patch_size, pixels.shape[3] // settings.patch_size)
    return MediaItem(
        kind=kind,
        digest=media_digest(kind, pixels, grid_thw, settings, seconds_per_grid),
        pixels=pixels,
        grid_thw=grid_thw,
        num_tokens=math.prod(grid_thw) // settings.merge_size**2,
        source=source,
        seconds_per_grid=seconds_per_grid,
        timestamps_s=timestamps_s,
        original_hw=original_hw,
        warnings=warnings,
    )
