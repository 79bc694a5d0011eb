"""Small copies of the pictures that a report shows, as data: URLs; of a video its first frame.

A picture that is not there any more, is damaged, or lies on another machine is a reason in words, never an error: a
report is made long after its run. Nothing is fetched over a network. Equal sources are read once.
"""

import base64
import io
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image
from tqdm import tqdm

from dataset.sample import Sample, media_source
from executor.errors import ODD_DATA_ERRORS, UserError, printable
from executor.evaluate.compare import Pair
from executor.media.image import open_picture, upright
from executor.media.media import DEFAULT_LIMITS, is_web_address, load_media

logger = logging.getLogger(__name__)

LARGE_PX, SMALL_PX = 768, 256
"""The longer side of the pictures of samples that changed, and of all others: thousands of those may be in a report."""
MOST_PICTURES = 8  # of one sample
JPEG_QUALITY = 80
THREADS = 4
BAR_AFTER_S = 3.0

FindSample = Callable[[int, str], Sample | None]
"""The sample of this index and id in the data set, for pictures that lie in it; None where it cannot be had."""


@dataclass(frozen=True)
class Thumbnail:
    """`url` is a data: URL; "" where there is no picture, and `reason` says why."""

    name: str
    url: str = ""
    size: tuple[int, int] = (0, 0)  # width and height in pixels
    reason: str = ""


def thumbnails(pairs: Sequence[Pair], find: FindSample) -> list[list[Thumbnail]]:
    """The pictures of every pair, in their order. Equal ones are equal strings."""
    sizes: dict[tuple[Any, ...], int] = {}
    keys = [_keys(pair) for pair in pairs]
    for pair, some in zip(pairs, keys, strict=True):
        wanted = LARGE_PX if pair.change else SMALL_PX
        for key in some:
            sizes[key] = max(sizes.get(key, 0), wanted)

    def made(key: tuple[Any, ...]) -> dict[str, Any]:
        return _made(key, sizes[key], find)

    with ThreadPoolExecutor(THREADS) as threads:
        interval_s = 0.2 if sys.stderr.isatty() else 30.0  # a log file gets a line now and then
        every = {"total": len(sizes), "unit": "picture", "delay": BAR_AFTER_S, "mininterval": interval_s}
        bar = tqdm(threads.map(made, sizes), **every)
        done = dict(zip(sizes, bar, strict=True))
    return [
        [Thumbnail(name, **done[key]) for name, key in zip(pair.first.media, some, strict=False)]
        for pair, some in zip(pairs, keys, strict=True)
    ]


def _keys(pair: Pair) -> list[tuple[Any, ...]]:
    """What each picture is known by: its path or address, else its place in the data set."""
    places: Iterable[str | None] = pair.first.sources[:MOST_PICTURES]
    row = pair.first
    return [(row.index, row.id, at) if place is None else (place,) for at, place in enumerate(places)]


def _made(key: tuple[Any, ...], side_px: int, find: FindSample) -> dict[str, Any]:
    """The fields of a Thumbnail but its name."""
    try:
        if len(key) == 1:
            source = key[0]
        else:
            index, name, at = key
            sample = find(index, name)
            if sample is None:
                return {"reason": "the picture lies in the data set, which is not at hand"}
            source = media_source(sample.media_parts[at])
        picture = _shrunk(source, side_px)
        return {"url": _url(picture), "size": picture.size}
    except UserError as error:
        return {"reason": printable(str(error))}
    except ODD_DATA_ERRORS as error:
        logger.debug("%s", key, exc_info=True)
        place = key[0] if len(key) == 1 else key[1]
        return {"reason": printable(f"{place}: the picture cannot be read ({type(error).__name__}: {error})")}


def _shrunk(source: Any, side_px: int) -> Image.Image:
    if isinstance(source, list | tuple):  # frames of a video
        source = source[0]
    if is_web_address(source):
        raise UserError(f"{source} is not fetched for a report")
    media = load_media(source)
    picture = _first_frame(media) if media.kind == "video" else _picture(media, side_px)
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return picture


def _url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _picture(media: Any, side_px: int) -> Image.Image:
    with open_picture(media.content, media.source, DEFAULT_LIMITS) as picture:
        picture.draft("RGB", (side_px, side_px))  # a JPEG is decoded no larger than it must be
        return Image.fromarray(upright(picture))


def _first_frame(media: Any) -> Image.Image:
    """Of the frames that a model samples, which always begin with the first."""
    from executor.media.sampling import Sampling, spread  # these load torch
    from executor.media.video import read_video

    sampling = Sampling(spread, num_frames=1, min_frames=1, max_frames=1)
    frames = read_video(media.content, sampling, source=media.source).frames
    return Image.fromarray(frames[0].permute(1, 2, 0).numpy())
