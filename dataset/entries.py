"""One entry of a data set, in any of the forms the field uses, to Samples.

Text:  messages | conversations | question | prompt | text | turns (the first turn is asked)
Media: media | images | image | image_url | videos | video: a path, URL, data: URL, {"path"}, {"url"}, {"bytes": base64}
       or a list of these; placed where the text says <image> or <video>, else before it. A folder as the only media
       asks the question of every file in it.
Answer: answer | reference | response, or a last message by the assistant.
Opens no media: whether a file can be read is found when it is its turn; only its existence is checked here.
"""

import base64
import binascii
import mimetypes
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.sample import Sample, media_key, media_source
from executor.errors import UserError, nearest
from executor.host.env import REPO_ROOT
from executor.media.media import expand_folder, sniff

TEXT_KEYS = ("messages", "conversations", "question", "prompt", "text", "turns")
MEDIA_KEYS = {
    "media": None,
    "images": "image",
    "image": "image",
    "image_url": "image",
    "videos": "video",
    "video": "video",
}
REFERENCE_KEYS = ("answer", "reference", "response")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MARKER = re.compile(r"<(image|video)>\n?")
_URL = re.compile(r"^(https?|data):", re.IGNORECASE)
HEAD_BYTES = 512
_BASE64_AT_LEAST = 100  # shorter text is a file name that is not there


def read_entry(entry: Any, where: str, folder: Path, *, strict: bool = False) -> list[Sample]:
    """The samples of one entry (several only for a folder of media); a bad entry is a Sample with its error.

    `where` is file and line or entry, `folder` where relative media are looked for first. `strict` refuses keys that
    mean nothing here; public data sets have many of those.
    """
    try:
        if isinstance(entry, str):
            entry = {"text": entry}
        if not isinstance(entry, Mapping):
            raise UserError(f"an entry is a text or an object, got a {type(entry).__name__}")
        if strict:
            _refuse_unknown_keys(entry)
        messages, reference = _messages(entry)
        media = [_resolve(kind, source, folder) for kind, source in _named_media(entry)]
        named = str(entry["id"]) if isinstance(entry.get("id"), str | int) else None
        return _place(messages, media, reference, f"{where} ({named})" if named else where, folder)
    except UserError as error:
        return [Sample(where, error=f"{where}: {error}")]


def ask(prompt: str, sources: Sequence[str], where: str = "data_config") -> list[Sample]:
    """The samples of one's own prompt about one's own files. UserError for a file that is not there."""
    samples = read_entry({"prompt": prompt, "media": list(sources)}, where, Path.cwd())
    if samples[0].error:
        raise UserError(samples[0].error)
    return samples


def _refuse_unknown_keys(entry: Mapping[str, Any]) -> None:
    known = (*TEXT_KEYS, *MEDIA_KEYS, *REFERENCE_KEYS, "id")
    for key in entry:
        if key not in known:
            raise UserError(f"unknown key '{key}'{nearest(str(key), known)}; known: {', '.join(known)}")


def _messages(entry: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The conversation up to and with the last user message, and the answer that the entry gives to it."""
    key = next((name for name in TEXT_KEYS if entry.get(name) is not None), None)
    if key is None:
        raise UserError(
            f"there is no question: none of the keys {', '.join(TEXT_KEYS)}; got {', '.join(entry) or 'nothing'}"
        )
    value = entry[key]
    if key == "turns":
        value = _first_turn(value)
    if key in ("messages", "conversations", "turns") and not isinstance(value, str):
        if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
            raise UserError(f"{key} must be a list of messages with role and content")
        messages = [_message(message, f"{key}[{index}]") for index, message in enumerate(value)]
    elif isinstance(value, str | list) and value:
        messages = [{"role": "user", "content": value}]
    else:
        raise UserError(f"{key} must be a text that is not empty, got {value!r}")
    reference = next((entry[name] for name in REFERENCE_KEYS if entry.get(name) is not None), None)
    if messages[-1]["role"] == "assistant":
        content = messages.pop()["content"]
        reference = reference if reference is not None or not isinstance(content, str) else content
    if not messages or messages[-1]["role"] == "system":
        raise UserError(f"{key} holds no question of a user")
    return messages, None if reference is None else str(reference)


def _first_turn(turns: Any) -> Any:
    turn = turns[0] if isinstance(turns, list) and turns else turns
    if isinstance(turn, Mapping):
        return [turn]
    if isinstance(turn, str | list) and turn:
        return turn
    raise UserError(f"turns must be a list of turns, each a list of messages; got {turns!r}")


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role not in _ROLES and role != "tool":
        raise UserError(f"{where}: role must be one of {', '.join(_ROLES)}, tool; got {role!r}")
    rest = {key: value for key, value in message.items() if key in ("tool_calls", "tool_call_id", "name")}
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _named_media(entry: Mapping[str, Any]) -> Iterable[tuple[str | None, Any]]:
    for key, kind in MEDIA_KEYS.items():
        value = entry.get(key)
        if value is None or value == "":
            continue
        for source in value if isinstance(value, list) else [value]:
            yield kind, source


def _resolve(kind: str | None, source: Any, folder: Path) -> dict[str, Any] | Path:
    """A media part for a message, or a folder of media."""
    if isinstance(source, Mapping):
        inner = next((source[key] for key in ("bytes", "url", "path") if source.get(key)), None)
        if inner is None:
            raise UserError(f"a picture or video needs bytes, url or path; got {', '.join(source) or 'nothing'}")
        if source.get("bytes") and not str(inner).startswith("data:"):
            inner = _decode(inner)
        source = inner
    if isinstance(source, str):
        source = _locate(source, folder)
    if isinstance(source, Path):
        if source.is_dir():
            return source
        source = str(source)
    elif not isinstance(source, str | bytes):
        raise UserError(f"a picture or video is a path, URL or base64 text, got a {type(source).__name__}")
    kind = kind or media_kind(source)
    return {"type": kind, kind: source}


def _locate(source: str, folder: Path) -> str | bytes | Path:
    if _URL.match(source):
        return source
    given = Path(source.removeprefix("file://")).expanduser()
    places = (
        [given]
        if given.is_absolute()
        else [root / given for root in (folder, folder / "images", Path.cwd(), REPO_ROOT)]
    )
    for place in places:
        # Path.exists raises where a name is longer than a file system takes, which base64 is.
        if os.path.exists(place):
            return place.resolve()
    if len(source) >= _BASE64_AT_LEAST:
        try:
            return base64.b64decode(source, validate=True)
        except binascii.Error:
            pass
    looked = ", ".join(dict.fromkeys(str(place.parent) for place in places))
    raise UserError(f"there is no file {source[:200]} (looked in {looked})")


def _decode(value: Any) -> bytes:
    if isinstance(value, list) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        return bytes(value)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UserError(f"the bytes of a picture or video are not base64: {error}") from error


def media_kind(source: str | bytes) -> str:
    """image or video: by the first bytes where they are at hand, else by what the URL says of itself."""
    if isinstance(source, bytes):
        found = sniff(source[:HEAD_BYTES])
    elif _URL.match(source):
        guess = mimetypes.guess_type(source.split("?")[0].split("#")[0])[0] or ""
        is_video = guess.startswith("video/") or source[:11].lower() == "data:video/"
        return "video" if is_video else "image"
    else:
        with open(source, "rb") as file:
            found = sniff(file.read(HEAD_BYTES))
    return found[0] if found else "image"  # what is neither is refused by name when it is opened


def _place(
    messages: list[dict[str, Any]], media: list[Any], reference: str | None, where: str, folder: Path
) -> list[Sample]:
    messages = [_with_paths(message, folder) for message in messages]
    folders = [item for item in media if isinstance(item, Path)]
    if not folders:
        return [Sample(where, tuple(_insert(messages, media)), reference)]
    if len(media) > 1:
        raise UserError(f"a folder must be the only media of a question; got {folders[0]} among {len(media)}")
    files = expand_folder(folders[0], None)
    parts = [{"type": media_kind(str(path)), media_kind(str(path)): str(path)} for path in files]
    return [
        Sample(f"{where} ({path.name})", tuple(_insert(messages, [part])), reference)
        for path, part in zip(files, parts, strict=True)
    ]


def _with_paths(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The message with relative paths of its own media parts made absolute."""
    if not isinstance(message["content"], list):
        return message
    parts = []
    for part in message["content"]:
        key = media_key(part) if isinstance(part, dict) else None
        source = media_source(part) if key else None
        if isinstance(source, str) and not _URL.match(source):
            found = _locate(source, folder)
            part = {**part, key: str(found) if isinstance(found, Path) else found}
        parts.append(part)
    return {**message, "content": parts}


def _insert(messages: Sequence[dict[str, Any]], media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put media where user messages say <image> or <video>, else before the text of the first user message."""
    waiting = list(media)
    placed = []
    for message in messages:
        content = message["content"]
        if waiting and message["role"] == "user" and isinstance(content, str) and _MARKER.search(content):
            message = {**message, "content": _fill_markers(content, waiting)}
        placed.append(message)
    if waiting and len(waiting) < len(media):
        raise UserError(
            f"{len(media)} pictures and videos are given for {len(media) - len(waiting)} <image>/<video> marks"
        )
    if waiting:
        first = next(index for index, message in enumerate(placed) if message["role"] != "system")
        content = placed[first]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        placed[first] = {**placed[first], "content": [*waiting, *parts]}
    return placed


def _fill_markers(text: str, waiting: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of `text` with its marks replaced by media taken off the front of `waiting`."""
    parts, start = [], 0
    for mark in _MARKER.finditer(text):
        if not waiting:
            raise UserError("there are more <image>/<video> marks than pictures and videos")
        if text[start : mark.start()]:
            parts.append({"type": "text", "text": text[start : mark.start()]})
        parts.append(waiting.pop(0))
        start = mark.end()
    if text[start:]:
        parts.append({"type": "text", "text": text[start:]})
    return parts
