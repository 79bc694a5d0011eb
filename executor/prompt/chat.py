"""From OpenAI-like messages to the text of a prompt, with what the user wrote kept apart from what the template wrote.

Invariant: a special token in the rendered pieces was written by the template, never by the user; the user's
"<|im_start|>" stays ordinary text. Media are left as the template's single placeholders.
Knows no model family, opens no media, counts no tokens.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from executor.checkpoint.settings import load_chat_template, load_tokenizer, load_tools_template
from executor.errors import UserError
from executor.prompt.messages import describe

logger = logging.getLogger(__name__)

RESERVED_KWARGS = {  # of apply_chat_template: they have their own argument, or would change what it returns
    *("conversation", "messages", "tools", "documents", "chat_template"),
    *("add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters that mean nothing: stand-ins while a template renders

Piece = str | int  # text to be tokenized as ordinary text, or a special token's id


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

    def unused(self, value: Any, stand_ins: Mapping[str, str] | None) -> str:
        """A character that neither the strings in `value` nor stand-ins use."""
        used = set((stand_ins or {}).values()).union(*_strings(value))
        return next(chr(code) for code in PRIVATE_USE if chr(code) not in used)

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
    """A checkpoint's tokenizer with its chat template, and the template for tools where that is another one.

    Qwen2.5-VL is published with two: chat_template.json's takes pictures and knows no tools, tokenizer_config.json's
    takes tools and knows texts only. Messages with tools are rendered with the second, each message's parts joined into
    one text in which a picture or video stands as the first template writes it.
    """

    def __init__(self, tokenizer: Any, template: str, tools_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tools_template = tools_template
        self.special = SpecialTokens.of(tokenizer)
        self._reported: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> "Chat":
        tokenizer = load_tokenizer(folder)
        return cls(tokenizer, load_chat_template(folder, tokenizer), load_tools_template(folder, tokenizer))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        placeholders: Mapping[str, str] | None = None,
    ) -> list[Piece]:
        """Pieces of the rendered template. `messages` as `normalise_messages` returns them; `tools` as JSON schemas.

        `continue_final_message`: they end where the last message's text does, whatever the template adds behind it.
        `placeholders`: what a picture ("image") and a video ("video") are in a template that takes texts only.
        Raises UserError for what the template would leave out: tools, calls, reasoning.
        """
        from jinja2.exceptions import TemplateError

        template_kwargs = dict(template_kwargs or {})
        check_template_kwargs(template_kwargs)
        tools = list(tools) if tools else None
        names = tool_names(tools or ())
        template, joins_parts = self._template_for(messages, names)
        self._check_keys(messages, template)
        user = [messages, tools, template_kwargs]
        stand_ins = self.special.stand_ins(user)
        marked_messages, marked_tools, marked_kwargs = (self.special.mark(value, stand_ins) for value in user)
        end_mark = None
        if continue_final_message:
            if add_generation_prompt:
                raise UserError(
                    "continue_final_message and add_generation_prompt exclude each other: the last message is gone on "
                    "with, or a new one begins; set one of them to false"
                )
            end_mark = self.special.unused(user, stand_ins)
            marked_messages = [*marked_messages[:-1], _with_end_mark(marked_messages[-1], len(messages) - 1, end_mark)]
        if joins_parts:
            number_media = bool(template_kwargs.get("add_vision_id"))
            marked_messages = join_parts(marked_messages, placeholders or {}, number_media=number_media)
        try:
            text = self.tokenizer.apply_chat_template(
                marked_messages,
                tools=marked_tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **marked_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint's chat template cannot render these messages: {error}") from error
        if end_mark is not None:
            text = _up_to(end_mark, text)
        pieces = self.special.split(text, stand_ins)
        self._check_rendered(pieces, names, messages)
        return pieces

    def _template_for(self, messages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[str, bool]:
        """The template that renders all of this, and whether it takes texts only."""
        words = {"tools"} if names else set()
        words |= {"tool_calls" for message in messages if message.get("tool_calls")}
        words |= {"tool" for message in messages if message["role"] == "tool"}
        if all(_mentions(self.template, word) for word in words):
            return self.template, False
        if self.tools_template is not None:
            return self.tools_template, True
        what = f"{len(names)} tools were given" if names else "the messages hold tool calls or answers of tools"
        raise UserError(
            f"{what}, but this checkpoint's chat template takes none, nor has tokenizer_config.json one that does; "
            "leave them out, or copy tokenizer_config.json from the original checkpoint"
        )

    def _check_keys(self, messages: Sequence[Mapping[str, Any]], template: str) -> None:
        """Refuse reasoning that the template does not know; say once which other keys it leaves out."""
        for index, message in enumerate(messages):
            if "reasoning_content" in message and not _mentions(template, "reasoning_content"):
                raise UserError(
                    f"messages[{index}] has reasoning_content, which this checkpoint's chat template leaves out "
                    "(Thinking checkpoints take it); remove it, or write it into the content"
                )
            for key in message:
                if key not in (*MESSAGE_KEYS, *self._reported) and not _mentions(template, key):
                    self._reported.add(key)
                    logger.warning("the key '%s' of messages has no place in this checkpoint's chat template", key)

    def _check_rendered(
        self, pieces: Sequence[Piece], names: Sequence[str], messages: Sequence[Mapping[str, Any]]
    ) -> None:
        """A template that mentions tools may still render none, or no calls."""
        text = "".join(piece if isinstance(piece, str) else " " for piece in pieces)
        calls = [call.get("function", call)["name"] for message in messages for call in message.get("tool_calls", ())]
        for name in (*names, *calls):
            forms = (name, json.dumps(name, ensure_ascii=False)[1:-1], json.dumps(name)[1:-1])
            if not any(form in text for form in forms):
                raise UserError(
                    f"the tool {name!r} is not in the text that this checkpoint's chat template makes: it would be "
                    "dropped; take a checkpoint whose template renders tools"
                )


def _with_end_mark(message: Mapping[str, Any], index: int, mark: str) -> dict[str, Any]:
    """The message with a mark behind its text. UserError where the text is not its end."""
    where = f"messages[{index}] is to be gone on with (continue_final_message), but"
    if message.get("tool_calls"):
        raise UserError(f"{where} ends with tool_calls; leave them out")
    content = message["content"]
    # The space: a template that cuts white space off a text's end does it to this one, and so tells.
    if isinstance(content, str):
        return {**message, "content": f"{content}{mark} "}
    if not content or content[-1]["type"] != "text":
        raise UserError(f"{where} does not end with a text; put one behind its other parts")
    return {**message, "content": [*content[:-1], {**content[-1], "text": f"{content[-1]['text']}{mark} "}]}


def _up_to(mark: str, text: str) -> str:
    before, found, behind = text.rpartition(mark)
    if not found:
        raise UserError(
            "continue_final_message: the checkpoint's chat template leaves the last message's text out; it cannot be "
            "gone on with"
        )
    return before if behind.startswith(" ") else before.rstrip()


MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "refusal", "annotations")


def check_template_kwargs(template_kwargs: Mapping[str, Any]) -> None:
    """Raises UserError for a key that has its own argument, or would change what rendering returns."""
    for key in template_kwargs:
        if key in RESERVED_KWARGS:
            raise UserError(f"chat_template_kwargs may not set {key!r}: it has its own argument or no meaning here")


def tool_names(tools: Sequence[Any]) -> list[str]:
    """The names of tools given as JSON schemas. Raises UserError for one that is none."""
    names = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UserError(
                f'tools[{index}] must be a JSON schema object, {{"type": "function", "function": {{"name", ...}}}}; '
                f"got {describe(tool)}"
            )
        names.append(name)
    return names


def join_parts(
    messages: Sequence[Mapping[str, Any]], placeholders: Mapping[str, str], *, number_media: bool
) -> list[dict[str, Any]]:
    """Messages for a template that takes texts only: parts joined, media as `placeholders`, calls' arguments parsed.

    Such templates write the arguments of calls as JSON themselves, so their JSON text would be quoted twice.
    """
    counts = {"image": 0, "video": 0}
    joined = []
    for index, message in enumerate(messages):
        message = dict(message)
        if isinstance(message["content"], list):
            texts = []
            for part in message["content"]:
                kind = part["type"]
                if kind == "text":
                    texts.append(part["text"])
                    continue
                counts[kind] += 1
                label = f"{'Picture' if kind == 'image' else 'Video'} {counts[kind]}: " if number_media else ""
                texts.append(label + placeholders[kind])
            message["content"] = "".join(texts)
        if "tool_calls" in message:
            where = f"messages[{index}].tool_calls"
            message["tool_calls"] = [_with_parsed_arguments(call, where) for call in message["tool_calls"]]
        joined.append(message)
    return joined


def _with_parsed_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: the arguments of {function['name']!r} are not valid JSON: {error}") from error
    return {"type": "function", "function": function}


def _mentions(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None
