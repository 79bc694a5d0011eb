"""What a row says besides its question: how it is answered, how its media are prepared, its system text and tools.

Keys have the names, types and bounds that they have in a recipe; the names of OpenAI, vLLM and the official tools are
read too. Whatever is wrong raises UserError, and belongs to that row alone.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dataset.sample import MEDIA_TYPES
from executor.errors import UserError
from executor.prompt.chat import check_template_kwargs, tool_names
from executor.prompt.messages import IMAGE_OPTIONS, describe, media_overrides
from executor.recipe.schema import GenerationSection, build_recipe

OTHER_GENERATION_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
GENERATION_KEYS = tuple(name for name in GenerationSection.model_fields if name != "draw")
# Of a row: as in the recipe, min_pixels and max_pixels bound pictures; a video's frames are bounded in its own part.
PICTURE_KEYS = IMAGE_OPTIONS
VIDEO_KEYS = (
    *("fps", "num_frames", "nframes", "min_frames", "max_frames", "sample_fps"),
    *("video_start", "video_end", "resized_height", "resized_width"),
)
TOTAL_KEYS = ("video_max_pixels", "total_pixels")
FRAME_KEY = "frame_max_pixels"  # max_pixels of a video's part
_FRAMES_OF_A_PAIR = 2  # total_pixels counts pairs of frames, video_max_pixels frames
SYSTEM_KEYS = ("system", "system_prompt")
OPTION_KEYS = (
    *(*GENERATION_KEYS, *OTHER_GENERATION_NAMES, "do_sample", "generation_config"),
    *dict.fromkeys((*PICTURE_KEYS, *VIDEO_KEYS, *TOTAL_KEYS, FRAME_KEY)),
    *(*SYSTEM_KEYS, "tools", "chat_template_kwargs"),
)


def generation_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own keys of generation_config, at its top level or under that name."""
    nested = entry.get("generation_config") or {}
    if not isinstance(nested, Mapping):
        raise UserError(f"generation_config must be an object, got {describe(nested)}")
    given: dict[str, Any] = {}
    for holder in (nested, {key: entry[key] for key in OPTION_KEYS if key in entry}):
        for key, value in holder.items():
            name = OTHER_GENERATION_NAMES.get(key, key)
            if value is None or (holder is not nested and name not in (*GENERATION_KEYS, "do_sample")):
                continue
            earlier = given.setdefault(name, value)
            if earlier is not value and earlier != value:  # NaN is not equal to itself
                raise UserError(f"{name} is given twice: {earlier!r} and {value!r}")
    do_sample = given.pop("do_sample", None)
    if do_sample is not None and not isinstance(do_sample, bool):
        raise UserError(f"do_sample must be true or false, got {describe(do_sample)}")
    if not given:
        return {} if do_sample is None else {"do_sample": do_sample}
    recipe = build_recipe({"model_config": {"model_path": "-"}, "generation_config": given}, "this row")
    checked = recipe.generation.model_dump(include=set(given))
    return checked if do_sample is None else {**checked, "do_sample": do_sample}


def media_options_of(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The row's own options, by kind of medium: {"image": ..., "video": ...}; names as in a message's part."""
    given = {key: entry[key] for key in (*PICTURE_KEYS, *VIDEO_KEYS) if entry.get(key) is not None}
    totals = {key: entry[key] for key in TOTAL_KEYS if entry.get(key) is not None}
    if len(totals) > 1:
        raise UserError("video_max_pixels and total_pixels bound the same; give one of them")
    pictures = {key: value for key, value in given.items() if key in PICTURE_KEYS}
    videos = {key: value for key, value in given.items() if key in VIDEO_KEYS}
    if entry.get(FRAME_KEY) is not None:
        videos["max_pixels"] = entry[FRAME_KEY]
    for key, value in totals.items():
        checked = media_overrides({"total_pixels": value}, "this row")["total_pixels"]
        videos["total_pixels"] = max(1, checked // _FRAMES_OF_A_PAIR) if key == "video_max_pixels" else checked
    return {"image": media_overrides(pictures, "this row"), "video": media_overrides(videos, "this row")}


def with_options(part: dict[str, Any], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A media part with the row's options that it does not set itself. `num_frames` and `fps` replace each other."""
    kind = part.get("type") or next(name for name in MEDIA_TYPES if name in part)
    extra = dict(options[kind.removesuffix("_url")])
    frames, rates = {"num_frames", "nframes"}, {"fps", "sample_fps"}
    if (frames | rates) & part.keys():
        extra = {key: value for key, value in extra.items() if key not in frames | rates}
    if {"resized_height", "resized_width"} & part.keys():
        extra = {key: value for key, value in extra.items() if not key.startswith("resized")}
    return {**extra, **{key: value for key, value in part.items() if value is not None}}


def with_system(messages: Sequence[dict[str, Any]], entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages with the row's system text before them."""
    messages = list(messages)
    for key in SYSTEM_KEYS:
        text = entry.get(key)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UserError(f"{key} must be a text, got {describe(text)}")
        if messages[0]["role"] == "system":
            if messages[0]["content"] == text:
                continue
            raise UserError(f"there are two system texts: {key}, and the first message's; keep one of them")
        messages.insert(0, {"role": "system", "content": text})
    return messages


def tools_of(entry: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The row's tools: a list of JSON schemas, or its JSON text."""
    tools = entry.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            raise UserError(f"tools: not valid JSON: {error}") from error
    if not tools and not isinstance(tools, int | float):
        return ()
    if not isinstance(tools, list):
        raise UserError(f"tools must be a list of JSON schemas, got {describe(tools)}")
    tool_names(tools)
    return tuple(dict(tool) for tool in tools)


def template_kwargs_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own chat_template_kwargs."""
    given = entry.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"chat_template_kwargs must be an object, got {describe(given)}")
    check_template_kwargs(given)
    return dict(given)
