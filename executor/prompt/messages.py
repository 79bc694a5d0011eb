"""OpenAI-like messages checked and brought into one form, with their pictures and videos taken out.

Every form that clients, data sets and the official tools (qwen_vl_utils) write is read here, or refused by name:
what is returned holds only what a chat template renders. Opens no media, renders nothing, knows no model family.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from executor.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system"}  # OpenAI's newer name
PART_TYPES = ("text", "image", "image_url", "video", "video_url")
SOURCE_KEYS = {  # where a part of this type keeps its picture or video
    "image": ("image", "image_url", "url", "path"),
    "image_url": ("image_url", "image", "url"),
    "video": ("video", "video_url", "url", "path"),
    "video_url": ("video_url", "video", "url"),
}
# Of a part: hints to caches and to clients, which change no answer.
HARMLESS_PART_KEYS = ("uuid", "cache_control")
UNSUPPORTED_MESSAGE_KEYS = {  # what no chat template here shows to a model, and what to do
    "function_call": "write it as tool_calls",
    "audio": "these models do not hear; remove it",
    "prefix": "an answer cannot be begun for the model; remove it",
    "partial": "an answer cannot be begun for the model; remove it",
}
DETAIL_PIXELS = {"auto": None, "high": None, "low": 512 * 512}  # OpenAI's `detail`: the picture's most pixels

PIXELS = (1, 2**40, "a whole number of pixels above 0, at most 2**40")
FRAMES = (1, 10**6, "a whole number of frames from 1 to 1000000")
OPTION_RULES: dict[str, tuple[float, float, str]] = {  # least, most, in words
    "min_pixels": PIXELS,
    "max_pixels": PIXELS,
    "total_pixels": PIXELS,
    "resized_height": PIXELS,
    "resized_width": PIXELS,
    "num_frames": FRAMES,
    "nframes": FRAMES,
    "min_frames": FRAMES,
    "max_frames": FRAMES,
    "fps": (0.001, 10_000, "a number from 0.001 to 10000"),
    "sample_fps": (0.001, 10_000, "a number from 0.001 to 10000"),
    "video_start": (0, 1e9, "seconds, 0 or more"),
    "video_end": (math.ulp(0.0), 1e9, "seconds, above 0"),
}
REAL_OPTIONS = ("fps", "sample_fps", "video_start", "video_end")  # the others are whole numbers
IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
VIDEO_OPTIONS = tuple(OPTION_RULES)
NUM_FRAMES_MULTIPLE = 2  # `nframes` of the official tools counts in pairs


@dataclass(frozen=True, eq=False)
class MediaPart:
    """A picture or video that a message asks about, not opened yet."""

    kind: Literal["image", "video"]
    source: Any  # path, URL, data URL, bytes, PIL image or array; of a video also a list of these: its frames
    where: str  # "messages[0].content[1]", for errors
    overrides: Mapping[str, float] = field(default_factory=dict)  # of this part alone; names as in OPTION_RULES


def normalise_messages(messages: Any) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """Check messages and take their media out.

    Returns the messages as chat templates expect them (parts have a type, media parts no source, nothing is null) and
    the media in order of appearance. Raises UserError for anything that a template would leave out or stumble over.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError(f'messages must be a non-empty list of {{"role", "content"}} objects, got {describe(messages)}')
    normal: list[dict[str, Any]] = []
    media: list[MediaPart] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f'{where} must be an object with "role" and "content", got {describe(message)}')
        normal.append(_normalise_message(message, where, media))
    return normal, media


def _normalise_message(message: Mapping[str, Any], where: str, media: list[MediaPart]) -> dict[str, Any]:
    role = message.get("role")
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}{nearest(str(role), ROLES)}; allowed: {', '.join(ROLES)}")
    given = {key: value for key, value in message.items() if isinstance(key, str) and value is not None}
    if "reasoning" in given:  # vLLM's newer name
        given.setdefault("reasoning_content", given.pop("reasoning"))
    if not isinstance(given.get("reasoning_content", ""), str):
        raise UserError(f"{where}.reasoning_content must be a string, got {describe(given['reasoning_content'])}")
    if not given.get("reasoning_content", True):
        del given["reasoning_content"]
    for key in UNSUPPORTED_MESSAGE_KEYS:
        if given.get(key):
            raise UserError(
                f"{where}: {key} is not supported, and would change the answer; {UNSUPPORTED_MESSAGE_KEYS[key]}"
            )
    calls = given.pop("tool_calls", None)
    if calls not in (None, []):
        if role != "assistant":
            raise UserError(f"{where}: tool_calls belong to the assistant, not to the role {role}")
        given["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = [_normalise_part(part, f"{where}.content[{i}]", media) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise UserError(f"{where}.content must be a string or a list of parts, got {describe(content)}")
    return {**given, "role": role, "content": content}


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise UserError(f"{where} must be a list, got {describe(calls)}")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f'{where}[{index}] must be {{"function": {{"name", "arguments"}}}}, got {describe(call)}')
        if not isinstance(function.get("arguments", ""), str | Mapping):
            raise UserError(
                f"{where}[{index}]: arguments must be an object or its JSON text, got {describe(function['arguments'])}"
            )
    return [dict(call) for call in calls]


def _normalise_part(part: Any, where: str, media: list[MediaPart]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise UserError(f'{where} must be an object such as {{"type": "text", "text": ...}}, got {describe(part)}')
    nulls = [key for key, value in part.items() if value is None]
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in PART_TYPES if name in part), None)
        if kind is None:
            keys = ", ".join(sorted(map(str, part))) or "nothing"
            raise UserError(f"{where} has no type and none of the keys {', '.join(PART_TYPES)}; got {keys}")
    if kind not in PART_TYPES:
        raise UserError(
            f"{where}: unknown part type {kind!r}{nearest(str(kind), PART_TYPES)}; allowed: {', '.join(PART_TYPES)}"
        )
    if kind == "text":
        _refuse_unknown_keys(part, ("type", "text", *HARMLESS_PART_KEYS), where)
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}.text must be a string, got {describe(part.get('text'))}")
        return {"type": "text", "text": part["text"]}
    media.append(_media_part(kind, part, nulls, where))
    return {"type": media[-1].kind, media[-1].kind: ""}


def _media_part(kind: str, part: Mapping[str, Any], nulls: Sequence[Any], where: str) -> MediaPart:
    family: Literal["image", "video"] = "image" if kind.startswith("image") else "video"
    options = IMAGE_OPTIONS if family == "image" else VIDEO_OPTIONS
    more = (*HARMLESS_PART_KEYS, "detail") if family == "image" else HARMLESS_PART_KEYS
    _refuse_unknown_keys(part, ("type", *SOURCE_KEYS[kind], *options, *more), where)
    named = [name for name in SOURCE_KEYS[kind] if name in part]
    if not named:
        null = next((name for name in SOURCE_KEYS[kind] if name in nulls), None)
        hint = f" ({null} is null)" if null else ""
        raise UserError(
            f"{where}: the {family} is missing{hint}; give it as {SOURCE_KEYS[kind][0]!r}: a path, URL or data"
        )
    if len(named) > 1:
        raise UserError(f"{where}: one part holds one {family}, got it as {' and as '.join(named)}; give one of them")
    detail = part.get("detail")
    source = part[named[0]]
    if isinstance(source, Mapping):
        source = {key: value for key, value in source.items() if value is not None}
        _refuse_unknown_keys(source, ("url", *more), f"{where}.{named[0]}")
        detail = source.get("detail", detail)
        source = source.get("url")
    if source is None or (isinstance(source, str | bytes | list | tuple) and not source):
        raise UserError(f"{where}.{named[0]} is empty; give a path, URL or data")
    if isinstance(source, list | tuple) and family == "image":
        raise UserError(f"{where}.{named[0]} is a list; one part holds one picture: give each its own part")
    overrides = media_overrides({name: part[name] for name in options if name in part}, where)
    if detail is not None:
        if not isinstance(detail, str) or detail not in DETAIL_PIXELS:
            raise UserError(f"{where}.detail must be one of {', '.join(DETAIL_PIXELS)}; got {detail!r}")
        if DETAIL_PIXELS[detail]:
            overrides.setdefault("max_pixels", DETAIL_PIXELS[detail])
    _check_together(overrides, where, frames_are_given=isinstance(source, list | tuple))
    return MediaPart(family, source, where, overrides)


def media_overrides(given: Mapping[str, Any], where: str) -> dict[str, float]:
    """Options of one picture or video with their numbers checked, each by its OPTION_RULES. Raises UserError."""
    checked: dict[str, float] = {}
    for name, value in given.items():
        least, most, words = OPTION_RULES[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name not in REAL_OPTIONS and isinstance(value, float) and math.isfinite(value):
            value = int(value)  # 28 * 28 * 0.9, as the official examples have it
        if not is_number or not least <= value <= most:
            raise UserError(f"{where}.{name} must be {words}, got {describe_value(value)}")
        checked[name] = value
    if "nframes" in checked:
        frames = round(checked.pop("nframes") / NUM_FRAMES_MULTIPLE) * NUM_FRAMES_MULTIPLE
        if not frames:
            raise UserError(f"{where}.nframes counts in pairs of frames, got {given['nframes']}; give 2 or more")
        if checked.setdefault("num_frames", frames) != frames:
            raise UserError(f"{where}: nframes and num_frames mean the same; give one of them")
    return checked


def _check_together(overrides: dict[str, float], where: str, *, frames_are_given: bool) -> None:
    """Refuse options that contradict each other. `sample_fps` of given frames becomes their `fps`."""
    if "fps" in overrides and "num_frames" in overrides:
        raise UserError(f"{where}: fps and num_frames exclude each other; give one of them")
    if ("resized_height" in overrides) != ("resized_width" in overrides):
        raise UserError(f"{where}: resized_height and resized_width belong together; give both")
    start, end = overrides.get("video_start", 0), overrides.get("video_end", math.inf)
    if start >= end:
        raise UserError(f"{where}: video_start {start} is not before video_end {end}")
    cuts = [name for name in ("video_start", "video_end") if name in overrides]
    if frames_are_given and cuts:
        raise UserError(
            f"{where}: {cuts[0]} is for a video file; here the frames themselves are listed: leave some out"
        )
    if "sample_fps" in overrides:
        if not frames_are_given:
            raise UserError(f"{where}: sample_fps is the rate of frames given as a list; for a video file give fps")
        rate = overrides.pop("sample_fps")
        if overrides.setdefault("fps", rate) != rate:
            raise UserError(f"{where}: fps and sample_fps of given frames mean the same; give one of them")


def _refuse_unknown_keys(part: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in part:
        if key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), allowed)}; allowed: {', '.join(allowed)}")


def describe(value: Any) -> str:
    """The beginning of a value, for messages: as JSON, as clients write it, or type and repr of what has no JSON."""
    if isinstance(value, str | bytes):
        value = value[:61]  # a picture's bytes are long
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return _typed(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"


def describe_value(value: Any) -> str:
    return repr(value) if isinstance(value, bool | float | type(None)) else _typed(value).partition(" ")[2]


def _typed(value: Any) -> str:
    if isinstance(value, str | bytes):
        value = value[:61]
    text = repr(value) if isinstance(value, str | bytes | int | float | type(None)) else _head(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _head(value: Any) -> str:
    """repr, and the type's name alone where that does not end (nested too deeply)."""
    try:
        return repr(value)
    except RecursionError:
        return "nested too deeply to show"
