"""One entry of a data set, in any of the forms the field uses, to Samples. docs/datasets.md has the table of forms.

Text:  messages | conversations | question | prompt | text | turns (the first turn is asked)
Media: media | images | image | image_url | videos | video: a path, URL, data: URL, {"path"}, {"url"}, {"bytes": base64}
       or a list of these (a list in it, or of still pictures under `video`: frames of one video); placed where the text
       says <image> or <video>, else before it. A folder as the only media asks the question of every file in it.
       AISBench's rows have type and path.
Answer: answer | reference | response, or a last message by the assistant.
Opens no media: whether a file can be read is found when it is its turn; only its existence is checked here.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.options import (
    OPTION_KEYS,
    generation_of,
    media_options_of,
    template_kwargs_of,
    tools_of,
    with_options,
    with_system,
)
from dataset.sample import Sample, media_key
from dataset.sources import dereference, folder_files, frames_of, media_kind, named_medium, resolve
from executor.errors import ODD_DATA_ERRORS, UserError, nearest, printable
from executor.prompt.messages import describe, normalise_messages

logger = logging.getLogger(__name__)

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
# What data sets keep beside a question, for their own use: it changes no answer.
METADATA_KEYS = frozenset(
    (
        *("id", "uid", "qid", "question_id", "image_id", "video_id", "user_id", "index", "idx", "key", "name", "title"),
        *("type", "path", "url", "category", "subcategory", "sub_category", "l2_category", "task", "task_type", "tags"),
        *("subset", "split", "source", "dataset", "data_source", "difficulty", "level", "language", "lang", "license"),
        *("metadata", "meta", "domain", "topic", "field", "duration", "width", "height", "image_size", "version"),
        *("answers", "gt", "ground_truth", "label", "choice_answer", "model", "model_a", "model_b", "winner", "judge"),
        *("tstamp", "timestamp", "anony", "conversation_a", "conversation_b", "custom_id", "stream", "user", "store"),
    )
)
# What would change the answer and is not part of this release, with the values that would not.
UNSUPPORTED_KEYS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "function_call": ("auto",),
    "best_of": (1,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "guidance_scale": (1,),
    **dict.fromkeys(
        ("functions", "logit_bias", "bad_words", "bad_words_ids", "force_words_ids", "allowed_token_ids"), ()
    ),
    **dict.fromkeys(("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("continue_final_message", "prompt_logprobs", "top_logprobs", "echo", "suffix", "prefix"), ()),
    **dict.fromkeys(("use_beam_search", "no_repeat_ngram_size", "min_length", "max_length", "typical_p", "top_a"), ()),
    **dict.fromkeys(("logits_processors", "mm_processor_kwargs", "prompt_embeds", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(
        ("enable_thinking", "thinking_budget", "reasoning_effort", "extra_body", "raw_fps", "lora_request"), ()
    ),
}
# Other words for media that rows may hold beside ours: a medium under them must not be left out without a word.
PLACE_KEYS = ("path", "url", "name", "source")
KNOWN_KEYS = frozenset(
    (*TEXT_KEYS, *MEDIA_KEYS, *REFERENCE_KEYS, *OPTION_KEYS, *METADATA_KEYS, *UNSUPPORTED_KEYS, "audio", "audios")
)
ID_CHARACTERS = 80  # of a row's id in its place
DEFAULT_QUESTIONS = {  # by the kinds of what is asked about
    ("image",): ("Describe this image.", "Describe these images."),
    ("video",): ("Describe this video.", "Describe these videos."),
    ("image", "video"): ("", "Describe these images and videos."),
}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "developer": "system"}
_MESSAGE_NAMES = {"role": "from", "content": "value"}  # and what ShareGPT calls them
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_MARKER = re.compile(r"<(image|video)>\n?")
_PLURALS = {"image": "pictures", "video": "videos"}


def read_entry(
    entry: Any,
    where: str,
    folder: Path,
    *,
    strict: bool = False,
    unused: Callable[[str], None] = lambda key: None,
) -> list[Sample]:
    """The samples of one entry (several only for a folder of media); a bad entry is a Sample with its error.

    `where` is file and line or entry, `folder` where relative media are looked for first. `strict` refuses keys that
    mean nothing here; public data sets have many of those, so else each is handed to `unused`.
    """
    try:
        return _read(entry, where, folder, strict, unused)
    except UserError as error:
        return [Sample(where, error=printable(f"{where}: {error}"))]
    except ODD_DATA_ERRORS as error:
        logger.debug("%s", where, exc_info=True)
        return [Sample(where, error=printable(f"{where}: the row cannot be read ({type(error).__name__}: {error})"))]


def _read(entry: Any, where: str, folder: Path, strict: bool, unused: Callable[[str], None]) -> list[Sample]:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, Mapping):
        raise UserError(f"an entry is a text or an object, got a {type(entry).__name__}")
    refuse_half_characters(entry)
    if isinstance(entry.get("body"), Mapping) and "custom_id" in entry:  # a line of OpenAI's batch files
        entry = {"id": entry["custom_id"], **entry["body"]}
    if strict:
        _refuse_unknown_keys(entry)
    named = str(entry["id"]) if isinstance(entry.get("id"), str | int) and entry["id"] != "" else None
    where = f"{where} ({named[:ID_CHARACTERS]})" if named else where
    _report_unused(entry, folder, unused)
    options = media_options_of(entry)
    messages, references = _messages(entry, folder)
    messages = with_system(messages, entry)
    media = [resolve(kind, source, folder) for kind, source in _named_media(entry)]
    more = {
        "references": references,
        "generation": generation_of(entry),
        "tools": tools_of(entry),
        "template_kwargs": template_kwargs_of(entry),
    }
    samples = []
    for name, parts in _each(media):
        placed = [_with_options(message, options) for message in _insert(messages, parts)]
        normalise_messages(placed)  # so that whatever is wrong is said here, and a sample's parts have their types
        samples.append(Sample(f"{where} ({printable(name)})" if name else where, tuple(placed), **more))
    return samples


def ask(prompt: str | None, sources: Sequence[str], where: str = "data_config") -> list[Sample]:
    """The samples of one's own prompt about one's own files; without a prompt, of the default question for their kind.

    Raises UserError for a file that is not there.
    """
    if prompt is not None:
        samples = read_entry({"prompt": prompt, "media": list(sources)}, where, Path.cwd())
    else:
        parts = [resolve(None, source, Path.cwd()) for source in sources]
        samples = []
        for name, each in _each(parts):
            kinds = tuple(sorted({part["type"] for part in each}))
            question = DEFAULT_QUESTIONS[kinds][len(each) > 1]
            message = {"role": "user", "content": [*each, {"type": "text", "text": question}]}
            samples.append(Sample(f"{where} ({printable(name)})" if name else where, (message,)))
        asked = sorted({sample.question for sample in samples})
        logger.info("no data_config.prompt: asking %s", " and ".join(f'"{question}"' for question in asked))
    if len(samples) == 1 and samples[0].error:
        raise UserError(samples[0].error)
    return samples


def refuse_half_characters(value: Any) -> None:
    """JSON can hold one half of a character of two (\\ud83d): it is no text, and no tokenizer takes it."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            half = None if item.isascii() else _HALF_CHARACTER.search(item)
            if half:
                shown = printable(item[max(half.start() - 20, 0) : half.end()])
                raise UserError(f"a text holds half a character ({shown}): it was cut or is damaged")
        elif isinstance(item, Mapping):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item


def _refuse_unknown_keys(entry: Mapping[str, Any]) -> None:
    known = (*TEXT_KEYS, *MEDIA_KEYS, *REFERENCE_KEYS, "id", *OPTION_KEYS)
    for key in entry:
        if key not in known:
            raise UserError(f"unknown key '{key}'{nearest(str(key), known)}; known: {', '.join(known)}")


def _report_unused(entry: Mapping[str, Any], folder: Path, unused: Callable[[str], None]) -> None:
    if entry.get("audio") or entry.get("audios"):
        raise UserError("audio is not supported; ask about pictures, videos and texts")
    for key, neutral in UNSUPPORTED_KEYS.items():
        value = entry.get(key)
        if value and value not in neutral:
            raise UserError(f"{key} is not supported in a row, and would change the answer: remove it")
    _refuse_unread_media(entry, folder)
    texts = [key for key in TEXT_KEYS if entry.get(key) is not None]
    for key in (*texts[1:], *(key for key, value in entry.items() if key not in KNOWN_KEYS and value is not None)):
        unused(key)


def _refuse_unread_media(entry: Mapping[str, Any], folder: Path) -> None:
    """UserError for a medium under a key that is none of MEDIA_KEYS; those of PLACE_KEYS where there is no other."""
    has_media = any(entry.get(key) for key in MEDIA_KEYS) or entry.get("type") in ("image", "video")
    has_media = has_media or not any(isinstance(entry.get(key), str) for key in TEXT_KEYS)
    for key, value in entry.items():
        if key in KNOWN_KEYS and (has_media or key not in PLACE_KEYS):
            continue
        kind = named_medium(value, folder)
        if kind:
            raise UserError(
                f"the {kind} under '{printable(str(key))[:60]}' would not be looked at: did you mean '{kind}'?"
            )


def _messages(entry: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The conversation up to and with the last user message, and the answers that the entry accepts to it."""
    key = next((name for name in TEXT_KEYS if entry.get(name) is not None), None)
    if key is None:
        raise UserError(
            f"there is no question: none of the keys {', '.join(TEXT_KEYS)}; got {', '.join(entry) or 'nothing'}"
        )
    value = entry[key]
    value = _from_json_text(value, key)
    if key == "turns":
        value = _first_turn(value)
    are_messages = isinstance(value, list) and all(isinstance(item, Mapping) and _is_message(item) for item in value)
    if key in ("messages", "conversations", "turns") and not isinstance(value, str) or value and are_messages:
        if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
            raise UserError(f"{key} must be a list of messages with role and content")
        messages = [_message(message, f"{key}[{index}]", folder) for index, message in enumerate(value)]
    elif isinstance(value, str | list | Mapping) and value:
        messages = [{"role": "user", "content": _content(value, key, folder)}]
    else:
        raise UserError(f"{key} must be a text that is not empty, got {describe(value).partition(' ')[2]}")
    reference = next((entry[name] for name in REFERENCE_KEYS if entry.get(name) is not None), None)
    if messages[-1]["role"] == "assistant":
        last = Sample("", ({**messages.pop(), "role": "user"},)).question
        reference = last if reference is None and last else reference
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise UserError(f"{key} holds no question of a user")
    return messages, _texts(reference)


def _texts(reference: Any) -> tuple[str, ...]:
    """The accepted answers: one, or those of a list of plain values."""
    if isinstance(reference, list) and reference and not any(isinstance(item, list | Mapping) for item in reference):
        return tuple(str(item) for item in reference if item is not None and str(item).strip())
    return () if reference is None or reference in ([], {}) or not str(reference).strip() else (str(reference),)


def _is_message(item: Mapping[str, Any]) -> bool:
    return "role" in item and "content" in item or "from" in item and "value" in item


def _from_json_text(value: Any, key: str) -> Any:
    """Messages that were written as the text of their JSON, read; other values as they stand.

    UserError for another text under a key that holds messages.
    """
    if not isinstance(value, str) or key == "turns" and value[:1] not in ("[", "{"):
        return value
    try:
        read = json.loads(value) if value.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        read = None
    read = [read] if isinstance(read, Mapping) else read
    if isinstance(read, list) and read and all(isinstance(item, Mapping) and _is_message(item) for item in read):
        return read
    if key in ("messages", "conversations"):
        raise UserError(
            f"{key} must be a list of messages with role and content, or its JSON text; got {describe(value)}"
        )
    return value


def _first_turn(turns: Any) -> Any:
    turn = turns[0] if isinstance(turns, list) and turns else turns
    if isinstance(turn, Mapping):
        return [turn]
    if isinstance(turn, str | list) and turn:
        return turn
    raise UserError(f"turns must be a list of turns, each a list of messages; got {describe(turns)}")


def _message(message: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """A message with its role and content under OpenAI's names, and the media of its own keys among its parts."""
    role = message.get("role", message.get("from"))
    known = ("system", "user", "assistant", "tool", *_ROLES)
    if not isinstance(role, str) or role not in known:
        raise UserError(f"{where}: role must be one of {', '.join(known)}; got {describe(role)}")
    role = _ROLES.get(role, role)
    content = message.get("content", message.get("value"))
    if content is None and role == "assistant":
        content = ""
    taken = ("role", "content", *_MESSAGE_NAMES.values(), *MEDIA_KEYS)
    rest = {key: value for key, value in message.items() if key not in taken and value is not None}
    placed = {"role": role, "content": _content(content, f"{where}.content", folder), **rest}
    media = [resolve(kind, source, folder) for kind, source in _named_media(message)]
    if any(isinstance(part, Path) for part in media):
        raise UserError(f"{where}: a folder must be the only media of a row, beside its messages")
    return _insert([placed], media)[0]


def _content(value: Any, where: str, folder: Path) -> str | list[dict[str, Any]]:
    """A text, or parts: texts among them become parts, media have their files found."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, Mapping) else value
    if not isinstance(parts, list):
        raise UserError(f"{where} must be a text or a list of parts, got {describe(value)}")
    given: list[Any] = []
    for index, part in enumerate(parts):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise UserError(f"{where}[{index}] must be a text or an object with a type, got {describe(part)}")
        part = {key: item for key, item in part.items() if item is not None}
        if not isinstance(part.get("type", ""), str):
            raise UserError(f"{where}[{index}].type must be a text, got {describe(part['type'])}")
        given.append(part)
    return list(dereference(iter(given), folder))


def _named_media(entry: Mapping[str, Any]) -> Iterable[tuple[str | None, Any]]:
    for key, kind in MEDIA_KEYS.items():
        value = entry.get(key)
        if value is None or value == "":
            continue
        if key == "video" and isinstance(value, list) and frames_of(value):
            value = [value]
        for source in value if isinstance(value, list) else [value]:
            if source is not None:
                yield kind, source
    if entry.get("type") in ("image", "video", "audio") and entry.get("path") is not None:
        if entry["type"] == "audio":
            raise UserError("audio is not supported; ask about pictures, videos and texts")
        for source in entry["path"] if isinstance(entry["path"], list) else [entry["path"]]:
            yield entry["type"], source


def _each(media: list[Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, media parts) of every request that these media make: one, or one for each file of a folder."""
    folders = [item for item in media if isinstance(item, Path)]
    if not folders:
        return [("", media)]
    if len(media) > 1:
        raise UserError(f"a folder must be the only media of a question; got {folders[0]} among {len(media)}")
    requests = []
    for path in folder_files(folders[0]):
        kind = media_kind(str(path))
        requests.append((path.name, [{"type": kind, kind: str(path)}]))
    return requests


def _with_options(message: dict[str, Any], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(message["content"], list) or not any(options.values()):
        return message
    content = [with_options(part, options) if media_key(part) else part for part in message["content"]]
    return {**message, "content": content}


def _insert(messages: Sequence[dict[str, Any]], media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put media where user messages say <image> or <video>, else before the text of the first user message."""
    waiting = list(media)
    placed = []
    for message in messages:
        if waiting and message["role"] == "user":
            message = {**message, "content": _fill_markers(message["content"], waiting)}
        placed.append(message)
    if waiting and len(waiting) < len(media):
        raise UserError(
            f"{len(media)} pictures and videos are given for {len(media) - len(waiting)} <image>/<video> marks"
        )
    if waiting:
        first = next((i for i, message in enumerate(placed) if message["role"] == "user"), 0)
        content = placed[first]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        placed[first] = {**placed[first], "content": [*waiting, *parts]}
    return placed


def _fill_markers(content: str | list[dict[str, Any]], waiting: list[dict[str, Any]]) -> Any:
    """`content` with every <image> and <video> mark of its texts replaced by the next medium of that kind."""
    if isinstance(content, list):
        parts = []
        for part in content:
            is_text = part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            filled = _fill_markers(part["text"], waiting) if is_text else part
            parts += filled if isinstance(filled, list) else [part]
        return parts
    parts, start = [], 0
    for mark in _MARKER.finditer(content):
        index = next((index for index, part in enumerate(waiting) if part["type"] == mark[1]), None)
        if index is None:
            raise UserError(f"there are more <{mark[1]}> marks than {_PLURALS[mark[1]]}")
        if content[start : mark.start()]:
            parts.append({"type": "text", "text": content[start : mark.start()]})
        parts.append(waiting.pop(index))
        start = mark.end()
    if not parts:
        return content
    if content[start:]:
        parts.append({"type": "text", "text": content[start:]})
    return parts
