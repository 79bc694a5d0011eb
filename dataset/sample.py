"""What a data set yields: requests as OpenAI-like messages, each with the place it came from.

A row that cannot be asked is a Sample too, with `error` set: one bad row in a file of many stops no other.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.errors import printable

MEDIA_TYPES = ("image", "video", "image_url", "video_url")
DIGEST_CHUNK_BYTES = 2**20

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as parts of the picture's width and height, 0 to 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `messages` are as the processors take them; media are absolute paths, URLs or bytes."""

    id: str  # "dataset.jsonl:12": file and line or entry
    messages: tuple[dict[str, Any], ...] = ()
    references: tuple[str, ...] = ()  # the answers the data set accepts; a letter where there are choices
    error: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)  # the row's own keys of generation_config, checked
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's own chat_template_kwargs
    choices: tuple[str, ...] = ()  # the texts of A, B, C, ...
    boxes: tuple[Box, ...] = ()  # where the thing asked for is, in the sample's only picture
    labels: Mapping[str, str] = field(default_factory=dict)  # what scores are broken down by: {"subject": "Math"}

    @property
    def reference(self) -> str | None:
        """The first answer the data set accepts, for people; None where it gives none."""
        return self.references[0] if self.references else None

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
        more = [dict(self.generation), self.tools, dict(self.template_kwargs)]
        asked = [self.messages, *more] if any(more) else self.messages
        return hashlib.sha256(json.dumps(asked, default=_plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Samples in their order. Each is there, or is read from its file when it is asked for and not kept.

    A row of much text (an embedded picture) is of the second kind: a file of thousands never lies in memory.
    """

    path: Path
    samples: Sequence[Sample | Callable[[], Sample]]
    files: tuple[Path, ...] = ()  # what the samples were read from

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return sample if isinstance(sample, Sample) else sample()

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def first(self, limit: int | None) -> "Dataset":
        """The data set's first `limit` samples; all of them for None."""
        return self if limit is None else Dataset(self.path, self.samples[:limit], self.files)

    def digest(self) -> str:
        """Of what is asked, wherever the files lie; a file is taken byte by byte, so that no row is read for it."""
        digest = hashlib.sha256(str(len(self)).encode())
        if not self.files:
            for sample in self:
                digest.update(json.dumps([sample.question, sample.media]).encode())
            return digest.hexdigest()
        for path in self.files:
            with open(path, "rb") as file:
                while chunk := file.read(DIGEST_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def media_key(part: Mapping[str, Any]) -> str | None:
    """Under which key a message part holds its picture or video; None for a text part."""
    kind = part.get("type") or next((name for name in MEDIA_TYPES if name in part), None)
    if kind not in MEDIA_TYPES:
        return None
    family = kind.removesuffix("_url")
    return next((key for key in (kind, family, f"{family}_url", "url", "path") if part.get(key) is not None), None)


def media_source(part: Mapping[str, Any]) -> Any:
    """The path, URL or bytes of a media part; of a video also the list of its frames."""
    value = part[media_key(part)]
    return value.get("url") if isinstance(value, Mapping) else value


def _short(source: Any) -> str:
    if isinstance(source, list | tuple):
        return f"{len(source)} frames ({_short(source[0])} ...)" if source else "no frames"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    text = str(source)
    if text[:5].lower() == "data:":
        return f"{text[5:200].split(';')[0].split(',')[0] or 'data'}, base64"
    return printable(text.rsplit("/", 1)[-1] or text)


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
