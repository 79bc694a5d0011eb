"""What a data set yields: requests as OpenAI-like messages, each with the place it came from.

A row that cannot be asked is a Sample too, with `error` set: one bad row in a file of many stops no other.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

MEDIA_TYPES = ("image", "video", "image_url", "video_url")


@dataclass(frozen=True)
class Sample:
    """One request. `messages` are as the processors take them; media are absolute paths, URLs or bytes."""

    id: str  # "dataset.jsonl:12": file and line or entry
    messages: tuple[dict[str, Any], ...] = ()
    reference: str | None = None  # the answer the data set gives, if it does
    error: str | None = None

    @property
    def question(self) -> str:
        """The text of the last user message."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                content = message.get("content")
                parts = content if isinstance(content, list) else [{"text": content}]
                return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str)).strip()
        return ""

    @property
    def media_parts(self) -> list[dict[str, Any]]:
        """The parts of all messages that hold a picture or video, in order."""
        contents = [message.get("content") for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [part for part in parts if isinstance(part, dict) and media_key(part)]

    @property
    def media(self) -> list[str]:
        """Short names of the pictures and videos, for people."""
        return [_short(media_source(part)) for part in self.media_parts]

    def fingerprint(self) -> str:
        """Digest of what is asked: equal for equal messages, whatever row they stand in."""
        return hashlib.sha256(json.dumps(self.messages, default=_plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Samples read one by one, as often as needed; `len` is known before."""

    path: Path
    count: int
    read: Callable[[], Iterator[Sample]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        return islice(self.read(), self.count)

    def first(self, limit: int | None) -> "Dataset":
        """The data set's first `limit` samples; all of them for None."""
        return self if limit is None else Dataset(self.path, min(limit, self.count), self.read)


def media_key(part: dict[str, Any]) -> str | None:
    """Under which key a message part holds its picture or video; None for a text part."""
    kind = part.get("type") or next((name for name in MEDIA_TYPES if name in part), None)
    if kind not in MEDIA_TYPES:
        return None
    return next((key for key in (kind, "url", "path") if key in part), None)


def media_source(part: dict[str, Any]) -> Any:
    """The path, URL or bytes of a media part."""
    value = part[media_key(part)]
    return value.get("url") if isinstance(value, dict) else value


def _short(source: Any) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    text = str(source)
    if text.startswith("data:"):
        return f"{text[5:].split(';')[0].split(',')[0] or 'data'}, base64"
    return text.rsplit("/", 1)[-1] or text


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
