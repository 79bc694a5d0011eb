"""From OpenAI-like messages to the text of a prompt, with what the user wrote kept apart from what the template wrote.

Invariant: a special token in the rendered pieces was written by the template, never by the user; the user's
"<|im_start|>" stays ordinary text. Media are left as the template's single placeholders.
Knows no model family, opens no media, counts no tokens.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from executor.checkpoint.settings import load_chat_template, load_tokenizer
from executor.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "image_url", "video", "video_url")
SOURCE_KEYS = {  # where a part of this type keeps its picture or video
    "image": ("image", "url", "path"),
    "image_url": ("image_url",),
    "video": ("video", "url", "path"),
    "video_url": ("video_url",),
}
IMAGE_OVERRIDES = ("min_pixels", "max_pixels")
VIDEO_OVERRIDES = ("max_pixels", "total_pixels", "fps", "num_frames", "min_frames", "max_frames")
RESERVED_KWARGS = {  # of apply_chat_template: they have their own argument, or would change what it returns
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that mean nothing: stand-ins while a template renders

Piece = str | int  # text to be tokenized as ordinary text, or a special token's id


@dataclass(frozen=True, eq=False)
class MediaPart:
    """A picture or video that a message asks about, not opened yet."""

    kind: Literal["image", "video"]
    source: Any  # path, URL, data URL, bytes, PIL image or array
    where: str  # "messages[0].content[1]", for errors
    overrides: Mapping[str, float] = field(default_factory=dict)  # min_pixels, fps, ... of this part alone


def normalise_messages(messages: Any) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """Check messages and take their media out.

    Returns the messages as chat templates expect them (parts have a type, media parts no source) and the media in
    order of appearance. Raises UserError for anything that a template would leave out or stumble over.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(
            f'messages must be a non-empty list of {{"role", "content"}} objects, got {_describe(messages)}'
        )
    normal, media = [], []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f'{where} must be an object with "role" and "content", got {_describe(message)}')
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: unknown role {role!r}{nearest(str(role), ROLES)}; allowed: {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and role == "assistant" and message.get("tool_calls"):
            content = ""
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            parts = [_normalise_part(part, f"{where}.content[{i}]", media) for i, part in enumerate(content)]
            normal.append({**message, "content": parts})
        elif isinstance(content, str):
            normal.append({**message, "content": content})
        else:
            raise UserError(f"{where}.content must be a string or a list of parts, got {_describe(content)}")
    return normal, media


def _normalise_part(part: Any, where: str, media: list[MediaPart]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise UserError(f'{where} must be an object such as {{"type": "text", "text": ...}}, got {_describe(part)}')
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in PART_TYPES if name in part), None)
        if kind is None:
            raise UserError(f"{where} has no type and none of the keys {', '.join(PART_TYPES)}; got {sorted(part)}")
    if kind not in PART_TYPES:
        raise UserError(
            f"{where}: unknown part type {kind!r}{nearest(str(kind), PART_TYPES)}; allowed: {', '.join(PART_TYPES)}"
        )
    if kind == "text":
        _refuse_unknown_keys(part, ("type", "text"), where)
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}.text must be a string, got {_describe(part.get('text'))}")
        return {"type": "text", "text": part["text"]}
    family = kind.removesuffix("_url")
    overrides = IMAGE_OVERRIDES if family == "image" else VIDEO_OVERRIDES
    _refuse_unknown_keys(part, ("type", *SOURCE_KEYS[kind], *overrides), where)
    key = next((name for name in SOURCE_KEYS[kind] if part.get(name) is not None), None)
    if key is None:
        raise UserError(f"{where}: the {family} is missing; give it as {SOURCE_KEYS[kind][0]!r}: a path, URL or data")
    source = part[key]
    if isinstance(source, Mapping):
        _refuse_unknown_keys(source, ("url",), f"{where}.{key}")
        source = source.get("url")
    if source is None or (isinstance(source, str | bytes) and not source):
        raise UserError(f"{where}.{key} is empty; give a path, URL or data")
    given = {name: part[name] for name in overrides if part.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{where}.{name} must be a number above 0, got {value!r}")
    media.append(MediaPart(family, source, where, given))
    return {"type": family, family: ""}


def _refuse_unknown_keys(part: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in part:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), allowed)}; allowed: {', '.join(allowed)}")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


class SpecialTokens:
    """The tokenizer's special tokens, and how they are kept apart from the same characters in a user's text.

    While a template renders, the first character of every special token in the user's strings is a stand-in of the
    private use planes. So the template still sees the rest of the text (it may look for "</think>"), and what looks
    like a special token afterwards is one. A special token's beginning at the end of a string is treated alike,
    because templates put strings side by side.
    Added tokens that the tokenizer does not call special ("<tool_call>", "<think>") belong to a model's own answers
    and mean the same wherever they stand.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        longest_first = sorted(ids, key=len, reverse=True)
        heads = sorted({token[0] for token in ids})
        beginnings = sorted({token[:end] for token in ids for end in range(1, len(token))}, key=len, reverse=True)
        self._heads = heads
        self._token = re.compile("|".join(map(re.escape, longest_first)))
        self._head = re.compile(
            f"(?=[{re.escape(''.join(heads))}])(?:(?={self._token.pattern})"
            f"|(?=(?:{'|'.join(map(re.escape, beginnings))})\\s*\\Z))."
        )

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        added = tokenizer.added_tokens_decoder
        return cls({token.content: token_id for token_id, token in added.items() if token.special})

    def stand_ins(self, *values: Any) -> dict[str, str] | None:
        """A stand-in for each first character that none of the strings in `values` uses; None when none is needed."""
        strings = list(chain.from_iterable(map(_strings, values)))
        if not any(self._head.search(text) for text in strings):
            return None
        used = set().union(*strings)
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        return {head: next(free) for head in self._heads}

    def mark(self, value: Any, stand_ins: Mapping[str, str] | None) -> Any:
        """`value` (strings in lists and objects) with stand-ins written in."""
        if not stand_ins:
            return value
        if isinstance(value, str):
            return self._head.sub(lambda match: stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.mark(key, stand_ins): self.mark(item, stand_ins) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, stand_ins) for item in value]
        return value

    def split(self, text: str, stand_ins: Mapping[str, str] | None = None) -> list[Piece]:
        """`text` at its special tokens; stand-ins are turned back in the pieces between."""
        back = {ord(stand_in): head for head, stand_in in (stand_ins or {}).items()}
        pieces: list[Piece] = []
        end = 0
        for match in self._token.finditer(text):
            if match.start() > end:
                pieces.append(text[end : match.start()].translate(back))
            pieces.append(self.ids[match[0]])
            end = match.end()
        if end < len(text):
            pieces.append(text[end:].translate(back))
        return pieces


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class Chat:
    """A checkpoint's tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.special = SpecialTokens.of(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "Chat":
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, load_chat_template(folder, tokenizer))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """Pieces of the rendered template. `messages` as `normalise_messages` returns them; `tools` as JSON schemas."""
        from jinja2.exceptions import TemplateError

        template_kwargs = dict(template_kwargs or {})
        for key in template_kwargs:
            if key in RESERVED_KWARGS:
                raise UserError(f"chat_template_kwargs may not set {key!r}: it has its own argument or no meaning here")
        if tools and not re.search(r"\btools\b", self.template):
            raise UserError(f"{len(tools)} tools were given, but this checkpoint's chat template takes none")
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise UserError(f"tools[{index}] must be a JSON schema object, got {_describe(tool)}")
        user = [messages, list(tools) if tools else None, template_kwargs]
        stand_ins = self.special.stand_ins(user)
        marked_messages, marked_tools, marked_kwargs = (self.special.mark(value, stand_ins) for value in user)
        try:
            text = self.tokenizer.apply_chat_template(
                marked_messages,
                tools=marked_tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **marked_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's chat template cannot render these messages: {error}") from error
        return self.special.split(text, stand_ins)
