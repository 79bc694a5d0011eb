"""Where a picture or video comes from: paths, bytes, base64 data URLs, PIL pictures, arrays, lists of frames.

Job: turn whatever the user named into a `Media` whose kind is known from its first bytes, within limits.
Invariant: nothing is decoded here, and a video that lies in a file is never read into memory.
Does not know models, tensors or how pixels are decoded (image.py, video.py). Fetches nothing over the network.
"""

import base64
import binascii
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from executor.errors import UserError, nearest
from executor.media.formats import HEAD_BYTES, Kind, foreign, sniff

Content = Path | bytes | Image.Image | np.ndarray | tuple["Media", ...]


@dataclass(frozen=True)
class MediaLimits:
    """How large a source may be. What is above a limit is refused, never cut."""

    paths: bool = True  # whether a string may name a file; a server that answers strangers says no
    image_bytes: int = 256 * 2**20
    image_pixels: int = 89_000_000  # of one picture or one video frame, before any resize
    video_bytes: int = 16 * 2**30
    video_duration_s: float = 6 * 3600.0
    video_frames: int = 1_000_000  # in the file, not of the sample


DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True, eq=False)
class Media:
    """One picture or video, not decoded yet. `content` is what `decode_image` and `read_video` take."""

    kind: Kind
    content: Content  # a tuple: the frames of a video, each a Media of kind "image"
    source: str  # for messages: the path, or "base64 data", "an array", ...


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
            return _from_bytes(_decode_data_url(source, limits), kind, "base64 data", limits)
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
        if scheme and scheme[1].lower() == "file":
            return _from_path(path_of_file_url(source), kind, limits)
        if scheme:
            raise UserError(
                f"{_short(source)}: {scheme[1]}:// addresses are not read; download the file and give its path, or a "
                "base64 data: URL"
            )
        return _from_path(Path(source), kind, limits)
    if isinstance(source, Path):
        return _from_path(source, kind, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), kind, "bytes", limits)
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
    if not limits.paths:
        raise UserError(f"{_short(path)}: paths are not allowed here; send the media as a base64 data: URL")
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


def _from_bytes(data: bytes, kind: Kind | None, source: str, limits: MediaLimits) -> Media:
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
    return Media("video", tuple(load_media(frame, "image", limits) for frame in frames), source)


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
    allowed = limits.image_bytes if kind == "image" else limits.video_bytes
    if num_bytes > allowed:
        raise UserError(f"{source}: {num_bytes} bytes, at most {allowed} allowed for {_a(kind)}; make it smaller")
    return kind


def _decode_data_url(url: str, limits: MediaLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise UserError(f"{_short(url)}: a data: URL must read data:<type>;base64,<data>")
    allowed = max(limits.image_bytes, limits.video_bytes)
    if len(payload) * 3 // 4 > allowed + 2:
        raise UserError(f"{_short(url)}: about {len(payload) * 3 // 4} bytes, at most {allowed} allowed")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{_short(url)}: not valid base64 ({error})") from error


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
