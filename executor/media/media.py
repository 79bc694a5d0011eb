"""Where a picture or video comes from: paths, bytes, base64 data URLs, PIL pictures, arrays, lists of frames.

Job: turn whatever the user named into a `Media` whose kind is known from its first bytes, within limits.
Invariant: nothing is decoded here, and a video that lies in a file is never read into memory.
What a string may name is in the limits: files anywhere (a user's own command) or below one folder (local.py), and
http(s) addresses of allowed hosts (fetch.py); `admit` asks only that, and opens nothing.
Does not know models, tensors or how pixels are decoded (image.py, video.py).
"""

import base64
import binascii
import math
import os
import re
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from executor.errors import UserError, nearest
from executor.media.fetch import Fetcher
from executor.media.formats import HEAD_BYTES, Kind, foreign, sniff
from executor.media.hosts import DOMAINS_KEY, key_for, parse_place, shown
from executor.media.local import FOLDER_KEY, Folder, opened_path

Content = Path | bytes | Image.Image | np.ndarray | tuple["Media", ...]


@dataclass(frozen=True)
class MediaLimits:
    """Where a source may come from, and how large it may be. What is above a limit is refused, never cut."""

    paths: bool = True  # whether a string may name a file; a server that answers strangers says no
    folder: Folder | None = None  # and then only one below this folder
    fetcher: Fetcher | None = None  # of http(s) addresses; None: they are refused
    pictures: int | None = None  # of one prompt
    videos: int | None = None
    fetched_bytes: int = 2**30  # over http(s), of one prompt: they lie in memory
    image_bytes: int = 256 * 2**20
    image_pixels: int = 89_000_000  # of one picture or one video frame, before any resize
    video_bytes: int = 16 * 2**30
    video_duration_s: float = 6 * 3600.0
    video_frames: int = 1_000_000  # in the file, not of the sample
    animation_pixels: int = 2**36  # of all frames of an animated picture, each of which must be drawn
    decode_s: float = math.inf  # of one video: a small file can hold much work

    def most_bytes(self, kind: Kind | None) -> int:
        """Bytes of one source of this kind; None: of either."""
        most = {"image": self.image_bytes, "video": self.video_bytes}
        return most.get(kind, max(most.values()))


DEFAULT_LIMITS = MediaLimits()


class Deadline:
    """When the work on one source must be done: `check` raises UserError from then on."""

    def __init__(self, source: str, limits: MediaLimits) -> None:
        self._source = source
        self._limit_s = limits.decode_s
        self._started_s = time.monotonic()

    def check(self) -> None:
        if time.monotonic() - self._started_s > self._limit_s:
            raise UserError(
                f"{self._source}: takes more than {self._limit_s:g} seconds to decode, the most that is allowed; make "
                "it shorter or smaller"
            )


@dataclass(frozen=True, eq=False)
class Media:
    """One picture or video, not decoded yet. `content` is what `decode_image` and `read_video` take."""

    kind: Kind
    content: Content  # a tuple: the frames of a video, each a Media of kind "image"
    source: str  # for messages: the path, or "base64 data", "an array", ...
    held: BinaryIO | None = None  # the open file that `content` is a path to


def load_media(
    source: str | bytes | Path | Image.Image | np.ndarray | Sequence | Media,
    kind: Kind | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Media:
    """Finds what `source` is and checks that it exists, is within `limits`, and is of the kind asked for.

    source: a path, bytes of a file, a `data:...;base64,` URL, a PIL picture, an array ([H, W], [H, W, C] a picture;
    [F, H, W, 3] a video), a list of pictures (the frames of a video; so is a folder when kind is "video").
    kind None: by the first bytes; animated pictures (GIF, WebP, PNG) are then pictures, and videos where "video" is
    asked for. Errors: UserError naming the source.
    """
    if isinstance(source, Media):
        if kind is not None and kind != source.kind:
            raise UserError(f"{source.source}: asked for as {kind}, but it is {_a(source.kind)}")
        return source
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            frames = _frames_of_data_url(source)
            if frames:
                return _from_frames(frames, kind, limits, "base64 data")
            return from_bytes(_decode_data_url(source, limits), kind, "base64 data", limits)
        if is_web_address(source):
            data = _fetcher(source, limits).fetch(source, limits.most_bytes(kind))
            return from_bytes(data, kind, shown(source), limits)
        _check_name(source, limits)
        if limits.folder is not None:
            return _from_folder(limits.folder, source, kind, limits)
        if source[:7].lower() == "file://":
            return _from_path(path_of_file_url(source), kind, limits)
        return _from_path(Path(source), kind, limits)
    if isinstance(source, Path):
        return _from_path(source, kind, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return from_bytes(bytes(source), kind, "bytes", limits)
    if isinstance(source, Image.Image):
        return Media(kind or "image", source, getattr(source, "filename", "") or "a PIL picture")
    if isinstance(source, np.ndarray):
        return _from_array(source, kind)
    if isinstance(source, list | tuple):
        return _from_frames(source, kind, limits, f"a list of {len(source)} frames")
    raise UserError(
        f"media: got {type(source).__name__}, want a path, bytes, a data: URL, a PIL picture, an array or a list of "
        "frames"
    )


def admit(source: object, limits: MediaLimits = DEFAULT_LIMITS) -> None:
    """Raises UserError where `load_media` would not read this for where it comes from; opens, asks and decodes nothing.

    So a request is known to be allowed before the first of its files is looked at.
    """
    if isinstance(source, list | tuple):
        _check_num_frames(len(source), limits, f"a list of {len(source)} frames")
        for frame in source:
            admit(frame, limits)
    elif isinstance(source, Path) and limits.folder is not None:
        admit(str(source), limits)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        frames = _frames_of_data_url(source)
        _check_num_frames(len(frames), limits, "base64 data")
        _check_base64_size(source, limits)
    elif isinstance(source, str) and is_web_address(source):
        _fetcher(source, limits).check(source)
    elif isinstance(source, str):
        _check_name(source, limits)
        if limits.folder is not None:
            limits.folder.find(source)


def is_web_address(source: object) -> bool:
    return isinstance(source, str) and re.match(r"https?:", source, re.IGNORECASE) is not None


def web_addresses(source: object) -> Iterator[str]:
    """The http(s) addresses in a source: itself, or those among its frames."""
    if isinstance(source, list | tuple):
        for frame in source:
            yield from web_addresses(frame)
    elif is_web_address(source):
        yield source


def _fetcher(url: str, limits: MediaLimits) -> Fetcher:
    if limits.fetcher is None:
        try:
            key = key_for(parse_place(url)) or DOMAINS_KEY
        except UserError:  # no whole address
            key = DOMAINS_KEY
        raise UserError(
            f"{shown(url)}: http(s) addresses are not read here, because {key} is empty; add the host to it, "
            f"or give the media as {'a path or ' if limits.paths else ''}a base64 data: URL"
        )
    return limits.fetcher


def _check_name(source: str, limits: MediaLimits) -> None:
    """Whether a string may be a path at all."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    if scheme and scheme[1].lower() != "file":
        raise UserError(
            f"{_short(source)}: {_short(scheme[1], 20)}:// addresses are not read; give the media as a base64 data: URL"
            f"{' or a path' if limits.paths else ''}"
        )
    if not limits.paths:
        if len(source) > 100 and re.fullmatch(r"[A-Za-z0-9+/=\s]+", source[:4096]):
            raise UserError(f"{_short(source, 40)}: base64 text is given as data:image/png;base64,TEXT")
        raise UserError(
            f"{_short(source)}: no files may be named here, because {FOLDER_KEY} is not set; send the media as a "
            "base64 data: URL"
        )


_ENDINGS: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".jpe", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".avif", ".heic"),
    "video": (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv"),
}


def named_kind(name: str) -> Kind | None:
    """What a file says of itself by its name's ending."""
    ending = os.path.splitext(name)[1].lower()
    return next((kind for kind, endings in _ENDINGS.items() if ending in endings), None)


def path_of_file_url(url: str) -> Path:
    """The path that a file: URL names: as it stands if there is such a file, else with %20 and the like read."""
    path = url[len("file://") :]
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    return Path(path if os.path.exists(path) else urllib.parse.unquote(path))


def _frames_of_data_url(url: str) -> list[str]:
    """The frames of `data:video/jpeg;base64,A,B,C` (vLLM's form of a video) as data URLs of pictures; else []."""
    header, _, payload = url.partition(",")
    if header.lower() != "data:video/jpeg;base64":
        return []
    return [f"data:image/jpeg;base64,{frame}" for frame in payload.split(",")]


def expand_folder(folder: str | Path, kind: Kind | None = "image") -> list[Path]:
    """The pictures (kind "image"), videos ("video") or both (None) in a folder, by name, `2.png` before `10.png`.

    Told apart by their first bytes; other files, hidden ones and sub-folders are passed over.
    Errors: UserError when the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{_near(folder)}")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    found = []
    for path in sorted(files, key=lambda path: _name_order(path.name)):
        sniffed = sniff(_head(path))
        if sniffed and kind in (None, sniffed[0]):
            found.append(path)
    if not found:
        wanted = {"image": "picture", "video": "video", None: "picture or video"}[kind]
        raise UserError(f"{folder}: no {wanted} among the {len(files)} files of this folder")
    return found


def _frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder that is a video. A broken one is refused: without it the others' times are wrong."""
    frames = expand_folder(folder)
    taken = {path.name for path in frames}
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.is_dir()
        if not hidden and path.name not in taken and named_kind(path.name) == "image":
            raise UserError(f"{path}: a frame of this video is empty, damaged or a link to nothing; mend or remove it")
    return frames


def _from_path(path: Path, kind: Kind | None, limits: MediaLimits) -> Media:
    if not limits.paths or limits.folder is not None:  # of Python's callers; strings have been looked at
        admit(str(path), limits)
        return _from_folder(limits.folder, str(path), kind, limits)
    try:
        if path.is_dir():
            if kind == "video":
                return _from_frames(_frames_in(path), kind, limits, str(path))
            raise UserError(f"{path}: is a folder, not a picture or video; name a file in it, or ask for it as a video")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{_short(path)}: is a link to {_short(os.readlink(path))}, which is not there")
        if not path.exists():
            raise UserError(f"{_short(path)}: no such file{_near(path)}")
        if not path.is_file():
            raise UserError(f"{_short(path)}: is no regular file (a pipe, socket or device); give the path of a file")
        num_bytes, head = path.stat().st_size, _head(path)
    except UserError:
        raise
    except OSError as error:  # no permission, a name too long for the file system, ...
        raise UserError(f"{_short(path)}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"{_short(path)}: not a path ({error})") from error
    return Media(_check(num_bytes, head, kind, str(path), limits), path, str(path))


def _from_folder(folder: Folder, name: str, kind: Kind | None, limits: MediaLimits) -> Media:
    """A picture is read at once, so that a video of many of them holds no files open."""
    file = folder.open(name)
    try:
        num_bytes = os.fstat(file.fileno()).st_size
        kind = _check(num_bytes, file.read(HEAD_BYTES), kind, _short(name), limits)
        if kind == "video":
            return Media(kind, opened_path(file), _short(name), file)
        file.seek(0)
        data = file.read(num_bytes)
    except OSError as error:
        raise UserError(f"{_short(name)}: cannot be read ({error.strerror})") from error
    file.close()
    return from_bytes(data, kind, _short(name), limits)


def from_bytes(data: bytes, kind: Kind | None, source: str, limits: MediaLimits) -> Media:
    """The bytes of a file that came from `source`. Errors as `load_media`."""
    return Media(_check(len(data), data[:HEAD_BYTES], kind, source, limits), data, source)


def _from_array(array: np.ndarray, kind: Kind | None) -> Media:
    if array.ndim not in (2, 3, 4):
        raise UserError(f"an array: got shape {array.shape}, want [H, W], [H, W, C] or, for a video, [F, H, W, 3]")
    found: Kind = "video" if array.ndim == 4 else "image"
    if kind is not None and kind != found:
        raise UserError(f"an array: asked for as {kind}, but shape {array.shape} is that of {_a(found)}")
    return Media(found, array, "an array")


def _from_frames(frames: Sequence, kind: Kind | None, limits: MediaLimits, source: str) -> Media:
    if kind == "image":
        raise UserError(f"{source}: several frames are a video; give a picture by itself")
    if not frames:
        raise UserError(f"{source}: a video needs at least one frame")
    _check_num_frames(len(frames), limits, source)
    return Media("video", tuple(load_media(frame, "image", limits) for frame in frames), source)


def _check_num_frames(num_frames: int, limits: MediaLimits, source: str) -> None:
    if num_frames > limits.video_frames:
        raise UserError(f"{source}: {num_frames} frames, at most {limits.video_frames} allowed; leave some out")


def _check(num_bytes: int, head: bytes, kind: Kind | None, source: str, limits: MediaLimits) -> Kind:
    """The kind of a file with these first bytes, once its size and the kind asked for fit."""
    if num_bytes == 0:
        raise UserError(f"{source}: is empty (0 bytes)")
    sniffed = sniff(head)
    strange = foreign(head) if sniffed is None or sniffed[1] == "HEIF" else None
    if strange:
        raise UserError(f"{source}: not a readable picture or video: {strange}")
    if sniffed is None and kind is None:
        raise UserError(f"{source}: neither a picture nor a video by its first bytes ({head[:8]!r})")
    if sniffed and sniffed[0] == "video" and kind == "image":
        raise UserError(f"{source}: asked for as a picture, but it is a video ({sniffed[1]})")
    kind = kind or sniffed[0]
    allowed = limits.most_bytes(kind)
    if num_bytes > allowed:
        raise UserError(f"{source}: {num_bytes} bytes, at most {allowed} allowed for {_a(kind)}; make it smaller")
    return kind


def _decode_data_url(url: str, limits: MediaLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise UserError(f"{_short(url)}: a data: URL must read data:<type>;base64,<data>")
    _check_base64_size(url, limits)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{_short(url)}: not valid base64 ({error})") from error


def _check_base64_size(url: str, limits: MediaLimits) -> None:
    num_bytes, allowed = (len(url) - url.find(",") - 1) * 3 // 4, limits.most_bytes(None)
    if num_bytes > allowed + 2:
        raise UserError(f"{_short(url)}: about {num_bytes} bytes, at most {allowed} allowed")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _near(path: Path) -> str:
    """The nearest existing name beside a missing path, or what of its folder is missing."""
    parent = path.parent
    if not parent.is_dir():
        return f"; nor is there a folder {_short(parent)}"
    return nearest(path.name, [entry.name for entry in parent.iterdir()])


def _name_order(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name)  # digits as numbers; the tuple keeps numbers and text comparable
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _short(text: str | Path, length: int = 120) -> str:
    text = str(text)
    return text if len(text) <= length else text[: length - 3] + "..."


def _a(kind: Kind) -> str:
    return "a picture" if kind == "image" else "a video"
