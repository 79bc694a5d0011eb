"""From samples of a data set to the JSON of streamed chat completions, as any OpenAI-compatible server takes it.

What the recipe's generation_config says, and what a sample says itself, stands in the request; what neither says is
left to the server. Media are sent along as data: URLs, addresses of the web as they are.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.sample import Sample, media_key, media_source
from executor.errors import UserError
from executor.media.formats import sniff
from executor.media.media import is_web_address, path_of_file_url
from executor.recipe.schema import Recipe

NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # of generation_config -> of a request
OWN = ("do_sample", "draw", "logprobs")  # keys of generation_config that are said in another way, or not at all
MIME = {"JPEG": "jpeg", "PNG": "png", "WebP": "webp", "GIF": "gif", "MP4/MOV": "mp4", "AVI": "x-msvideo"}


def chat_body(sample: Sample, recipe: Recipe, model_name: str) -> bytes:
    """The request of one sample. Raises UserError for a sample with an error, and for a file that cannot be read."""
    if sample.error:
        raise UserError(sample.error)
    messages = [{**message, "content": _content(message.get("content"))} for message in sample.messages]
    if recipe.data.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    template_kwargs = {**recipe.data.chat_template_kwargs, **sample.template_kwargs}
    body = {
        "model": model_name,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling_fields({**recipe.generation.model_dump(), **sample.generation}),
        **({"tools": list(sample.tools)} if sample.tools else {}),
        **({"chat_template_kwargs": template_kwargs} if template_kwargs else {}),
    }
    return json.dumps(body, ensure_ascii=False).encode()


def sampling_fields(said: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of generation_config as fields of a request; None means "not said"."""
    fields = {NAMES.get(key, key): value for key, value in said.items() if value is not None and key not in OWN}
    if said.get("do_sample") is False:
        fields["temperature"] = 0
    if said.get("logprobs") is not None:
        fields |= {"logprobs": True, "top_logprobs": said["logprobs"]}
    return fields


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part) if isinstance(part, dict) and media_key(part) else part for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A picture or video as OpenAI and vLLM write it; the part's own options stand beside it."""
    key, source = media_key(part), media_source(part)
    kind = "video" if part.get("type", key).startswith("video") else "image"
    options = {name: value for name, value in part.items() if name not in (key, "type")}
    value = part[key] if isinstance(part[key], Mapping) else {}
    url = _frames_url(source) if isinstance(source, list | tuple) else _url(source, kind)
    return {"type": f"{kind}_url", f"{kind}_url": {**value, "url": url}, **options}


def _url(source: Any, kind: str) -> str:
    if isinstance(source, str) and (is_web_address(source) or source[:5].lower() == "data:"):
        return source
    content = _read(source)
    found = sniff(content[:512])
    form = MIME.get(found[1]) if found else None
    return f"data:{kind}/{form or 'octet-stream'};base64,{base64.b64encode(content).decode()}"


def _frames_url(frames: Any) -> str:
    """The frames of one video in vLLM's form. UserError for frames that are no JPEG files: that form has no others."""
    contents = [_read(frame) for frame in frames]
    if any(sniff(content[:512]) != ("image", "JPEG") for content in contents):
        raise UserError("frames of a video are sent as JPEG, and these are other pictures; save them as JPEG files")
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(content).decode() for content in contents)


def _read(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source
    path = path_of_file_url(source) if str(source)[:7].lower() == "file://" else Path(source)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from error
