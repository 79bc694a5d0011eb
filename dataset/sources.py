"""Where a row's pictures and videos are: names to paths, URLs or bytes; folders to the files in them.

Opens no media beyond their first bytes: whether one can be decoded is found when it is its turn.
"""

import base64
import binascii
import logging
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset.sample import MEDIA_TYPES, media_key
from executor.errors import UserError, nearest, printable
from executor.host.env import REPO_ROOT
from executor.media.media import named_kind, path_of_file_url, sniff
from executor.prompt.messages import HARMLESS_PART_KEYS, OPTION_RULES

logger = logging.getLogger(__name__)

HEAD_BYTES = 512
SOURCE_KEYS = ("bytes", "base64", "url", "path", "image", "image_url", "video", "video_url")  # of an object
OPTION_KEYS = (*OPTION_RULES, *HARMLESS_PART_KEYS, "detail")
_URL = re.compile(r"^(https?|data):", re.IGNORECASE)
_FILE_URL = re.compile(r"^file://", re.IGNORECASE)
_BASE64_AT_LEAST = 100  # shorter text is a file name that is not there
_NAME_AT_MOST = 4096  # longer text is no file name: what Linux takes for a path


def resolve(kind: str | None, source: Any, folder: Path) -> dict[str, Any] | Path:
    """A media part for a message, or a folder of media. Relative names are looked for from `folder` first.

    kind None: by the first bytes. A list is the frames of one video. Raises UserError for what is not there.
    """
    if isinstance(source, list | tuple):
        if kind == "image":
            raise UserError("a picture is one path, URL or base64 text, got a list inside the list")
        return {"type": "video", "video": [frame_source(frame, folder) for frame in source]}
    options: dict[str, Any] = {}
    if isinstance(source, Mapping):
        named = source.get("type")
        if kind is None and isinstance(named, str) and named in MEDIA_TYPES:
            kind = named.removesuffix("_url")
        source, options = _split(source)
        if isinstance(source, list | tuple) and kind == "video":
            return {"type": kind, kind: [frame_source(frame, folder) for frame in source], **options}
    source = locate(source, folder)
    if isinstance(source, Path):
        if source.is_dir() and not (kind == "video" and _holds_frames(source)):
            return source
        source = str(source)
    kind = kind or media_kind(source)
    return {"type": kind, kind: source, **options}


def _split(source: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What an object that names a medium says of its place, and its options: {"path": "a.mp4", "fps": 1}.

    Raises UserError for keys that are neither.
    """
    given = {key: value for key, value in source.items() if value is not None and key != "type"}
    places = [key for key in SOURCE_KEYS if given.get(key)]
    if not places:
        raise UserError(f"a picture or video needs bytes, url or path; got {', '.join(map(str, source)) or 'nothing'}")
    for key in given:
        if key not in (*SOURCE_KEYS, *OPTION_KEYS):
            raise UserError(
                f"unknown key {key!r} of a picture or video{nearest(str(key), (*SOURCE_KEYS, *OPTION_KEYS))}; "
                f"its place: {', '.join(SOURCE_KEYS)}; its options: {', '.join(OPTION_KEYS)}"
            )
    key = places[0]  # bytes before a path: the path is then the name that the bytes had
    inner = given[key]
    if isinstance(inner, Mapping):  # {"type": "image_url", "image_url": {"url": ...}}
        inner, more = _split(inner)
        given |= more
    elif key in ("bytes", "base64") and str(inner)[:5] != "data:":
        inner = _decode(inner)
    return inner, {key: value for key, value in given.items() if key in OPTION_KEYS}


def _holds_frames(folder: Path) -> bool:
    """Whether a folder that is called a video holds pictures only: its frames."""
    try:
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError:
        return False  # said when the folder is read
    kinds = {found[0] for found in map(sniff, map(_head, files)) if found}
    return kinds == {"image"}


def frame_source(frame: Any, folder: Path) -> str | bytes:
    """One frame of a video that is given as a list of pictures."""
    if isinstance(frame, list | tuple):
        raise UserError("a frame of a video is one picture, got a list")
    found = locate(frame, folder)
    return str(found) if isinstance(found, Path) else found


def locate(source: Any, folder: Path) -> str | bytes | Path:
    """What a row calls a picture or video, as a path that exists, a URL as it stands, or the bytes themselves."""
    if isinstance(source, Mapping):
        source, options = _split(source)
        if options:
            raise UserError(f"{next(iter(options))} belongs to a whole video, not to one of its frames")
    if isinstance(source, bytes):
        return source
    if source == "":
        raise UserError(
            "a picture or video is named by an empty text; give a path, URL or base64 text, or leave it out"
        )
    if not isinstance(source, str):
        raise UserError(f"a picture or video is a path, URL or base64 text, got a {type(source).__name__}")
    if _URL.match(source):
        return source
    return _locate_name(source, folder)


def named_medium(value: Any, folder: Path) -> str | None:
    """image or video where `value` (of a key that is none of ours) is plainly one: an existing file, a URL that ends
    like one, a data: URL, an object with such a place, or a list with one of these; else None."""
    if isinstance(value, Mapping):
        value = [value.get(key) for key in SOURCE_KEYS if key not in ("bytes", "base64")]
    if isinstance(value, list | tuple):
        found = (named_medium(item, folder) for item in value if isinstance(item, str | Mapping))
        return next((kind for kind in found if kind), None)
    if not isinstance(value, str) or not value.strip():
        return None
    if _URL.match(value):
        guess = value[5:11] if value[:5].lower() == "data:" else _guessed_type(value)
        return next((kind for kind in ("image", "video") if guess.lower().startswith(kind)), None)
    for place in _places(value, folder):
        if os.path.isfile(place):
            found = sniff(_head(place))
            return found[0] if found else named_kind(value)
    return None


def _guessed_type(url: str) -> str:
    return mimetypes.guess_type(url[:_NAME_AT_MOST].split("?")[0].split("#")[0])[0] or ""


def _places(source: str, folder: Path) -> list[Path]:
    """Where a file of this name may be."""
    if len(source) > _NAME_AT_MOST:
        return []
    name = str(path_of_file_url(source)) if _FILE_URL.match(source) else source
    given = Path(os.path.expanduser(name))
    roots = (folder, folder / "images", Path.cwd(), REPO_ROOT)
    return [given] if given.is_absolute() else [root / given for root in roots]


def _locate_name(source: str, folder: Path) -> bytes | Path:
    places = _places(source, folder)
    for place in places:
        if os.path.exists(place):
            return Path(os.path.abspath(place))  # links keep the name that the user knows
    if len(source) >= _BASE64_AT_LEAST:
        try:
            return base64.b64decode("".join(source.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
    looked = ", ".join(dict.fromkeys(str(place.parent) for place in places)) or "no folder: too long for a name"
    raise UserError(f"there is no file {source[:200]} (looked in {looked})")


def _decode(value: Any) -> bytes:
    if isinstance(value, list) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        return bytes(value)
    if not isinstance(value, str):
        raise UserError(f"the bytes of a picture or video are base64 text or numbers, got a {type(value).__name__}")
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the bytes of a picture or video are not base64: {error}") from error


def media_kind(source: str | bytes) -> str:
    """image or video: by the first bytes where they are at hand, else by what name or URL say of themselves.

    What is neither, or cannot be read, is refused by name when it is opened.
    """
    if isinstance(source, bytes):
        found = sniff(source[:HEAD_BYTES])
        return found[0] if found else "image"
    if _URL.match(source):
        is_video = _guessed_type(source).startswith("video/") or source[:11].lower() == "data:video/"
        return "video" if is_video else "image"
    found = sniff(_head(Path(source)))
    return found[0] if found else named_kind(source) or "image"


def _head(path: Path) -> bytes:
    """The first bytes of a file; none of what is no file (a pipe would wait for ever) or cannot be read."""
    try:
        if not path.is_file():
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def folder_files(folder: Path) -> list[Path]:
    """What of a folder is asked about, by name, `2.png` before `10.png`: its pictures and videos by their first bytes.

    And what its ending calls one though it is empty, damaged, unreadable or a link to nothing: such a file's error is
    its row's. A line in the log counts what is passed over. UserError where there is nothing to ask about.
    """
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{printable(str(folder))}: the folder cannot be read ({error.strerror})") from error
    counts: Counter[str] = Counter(_state(path) for path in paths)
    asked = [path for path in paths if _state(path) in (MEDIA, *BROKEN)]
    if not asked:
        others = sum(not path.is_dir() for path in paths)
        raise UserError(f"{printable(str(folder))}: no picture or video among the {others} files of this folder")
    notes = [f"{counts[state]} {state} passed over" for state in (FOLDERS, OTHERS) if counts[state]]
    notes += [f"{counts[state]} {state} get an error row" for state in BROKEN if counts[state]]
    if notes:
        logger.warning("%s: %d pictures and videos; %s", printable(str(folder)), counts[MEDIA], ", ".join(notes))
    return sorted(asked, key=name_order)


MEDIA, FOLDERS, OTHERS = "pictures and videos", "sub-folders", "other files"
BROKEN = ("links to nothing", "files of 0 bytes", "files that cannot be read", "damaged files")


def _state(path: Path) -> str:
    if path.is_dir():
        return FOLDERS
    named = named_kind(path.name)
    if not os.path.exists(path):
        return BROKEN[0] if named else OTHERS
    if sniff(_head(path)):
        return MEDIA
    if not named or not path.is_file():
        return OTHERS
    try:
        with open(path, "rb") as file:
            return BROKEN[3] if file.read(1) else BROKEN[1]
    except OSError:
        return BROKEN[2]


def name_order(path: Path) -> list[tuple[int, int, str]]:
    """Sorts digits as numbers."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def frames_of(sources: list[Any]) -> bool:
    """Whether the list under `video` is the still pictures of one video, rather than several videos."""
    named = [named_kind(source) for source in sources if isinstance(source, str)]
    animated = any(isinstance(source, str) and source.lower().endswith((".gif", ".webp")) for source in sources)
    return len(named) == len(sources) > 1 and set(named) == {"image"} and not animated


def dereference(parts: Iterator[Any], folder: Path) -> Iterator[Any]:
    """Message parts with the names of their own pictures, videos and frames made absolute."""
    for part in parts:
        key = media_key(part) if isinstance(part, Mapping) else None
        if key is None:
            yield part
            continue
        value = part[key]
        options: dict[str, Any] = {}
        if isinstance(value, Mapping):
            value, options = _split(value)
        if options:
            part = {**options, **part}
        if isinstance(value, list | tuple) and part.get("type", key).startswith("video"):
            yield {**part, key: [frame_source(frame, folder) for frame in value]}
        elif isinstance(value, str | bytes):
            yield {**part, key: _absolute(value, folder)}
        else:
            yield part  # refused by its type where messages are checked


def _absolute(source: Any, folder: Path) -> str | bytes:
    found = locate(source, folder)
    return str(found) if isinstance(found, Path) else found
