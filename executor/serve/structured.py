"""What a request says about the form of its answer, as one Grammar: response_format, structured_outputs, tools.

Knows the fields' meaning in the protocols of OpenAI and vLLM; whether a schema can be enforced is found where the
grammar is compiled, in the thread that prepares the request.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from executor.errors import UserError
from executor.schedule.request import THINK_BEGIN, THINK_END, Grammar
from executor.serve.asks import ChatPrompt
from executor.serve.bodies import in_json
from executor.serve.errors import ApiError, in_words

ANY_OBJECT = {"type": "object"}
NO_PARAMETERS = {"type": "object", "properties": {}}  # of a function that names none
KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "ebnf"}
HINTS = ("disable_fallback", "backend")  # of structured_outputs: change no answer here, where nothing falls back
FORMATS = "text, json_object or json_schema"
CHOICES = 'none, auto, required or {"type": "function", "function": {"name": ...}}'


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters`: a JSON schema; None takes no arguments, as in OpenAI's API."""

    name: str
    parameters: Any = None
    is_strict: bool = False


def grammar_of(fields: Mapping[str, Any], *, thinks: bool = False) -> Grammar | None:
    """The grammar of a request's answer; None where nothing is said about it.

    `fields`: the request's body. Read are response_format, structured_outputs, guided_json, guided_regex,
    guided_choice, guided_grammar, tools, tool_choice and parallel_tool_calls. `thinks`: the answer begins inside its
    reasoning, which no grammar binds.

    With tool_choice auto a call, once it has begun, is one of the tools with an object as arguments, which a tool with
    `strict` has checked by its schema; required and a named tool always check it. A response_format binds what is not
    a call. Raises ApiError 400 with the field's name.
    """
    form = _form(fields)
    tools, choice = _tools(fields), _choice(fields)
    grammar = form
    if tools and choice != "none":
        grammar = _calls(fields, tools, choice, form)
    if grammar is None or not thinks:
        return grammar
    return replace(grammar, after=THINK_END)


def grammar_under(fields: Mapping[str, Any], place: str, *, thinks: bool = False) -> Grammar | None:
    """`grammar_of` for a protocol that calls response_format `place`; errors do so too."""

    def renamed(text: str | None) -> str | None:
        return text and re.sub(r"response_format(\.json_schema)?", place, text)

    try:
        grammar = grammar_of(fields, thinks=thinks)
    except ApiError as error:
        raise ApiError(error.status, renamed(error.message), param=renamed(error.param), code=error.code) from error
    return grammar and replace(grammar, asked_by=renamed(grammar.asked_by))


def takes_tools(fields: Mapping[str, Any]) -> bool:
    """Whether calls are looked for in the answer: there are tools, and tool_choice is not none."""
    return bool(fields.get("tools")) and fields.get("tool_choice") != "none"


def tools_of(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools that the template shows: all of them, none with tool_choice none. Raises ApiError 400."""
    _tools(fields)
    return tuple(fields.get("tools") or ()) if takes_tools(fields) else ()


def thinks(processor: Any, prompt: ChatPrompt) -> bool:
    """Whether the answer to a conversation begins inside its reasoning.

    So it is where the chat template ends its generation prompt with an open `<think>` (Qwen3-VL-Thinking), which the
    template is asked with the request's chat_template_kwargs, for they may switch it; and where a message that is
    continued has one. Raises ApiError 400 for kwargs that the template cannot take.
    """
    if prompt.continue_final_message:
        return bool(prompt.messages) and _is_open(_text(prompt.messages[-1]))
    if not prompt.add_generation_prompt or THINK_BEGIN not in processor.chat.template:
        return False
    trial = [{"role": "user", "content": "?"}]
    try:
        pieces = processor.chat.render(trial, template_kwargs=dict(prompt.template_kwargs))
    except UserError as error:
        raise in_words(400, str(error)) from error
    return _is_open("".join(piece for piece in pieces if isinstance(piece, str)))


def _is_open(text: str) -> bool:
    return text.rfind(THINK_BEGIN) > text.rfind(THINK_END)


def _text(message: Any) -> str:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


# response_format, structured_outputs and their old names


def _form(fields: Mapping[str, Any]) -> Grammar | None:
    """What the answer must be where it calls no tool."""
    asked = {name: fields.get(name) for name in ("response_format", "structured_outputs")}
    asked |= {f"guided_{name}": fields.get(f"guided_{name}") for name in KINDS}
    found = []
    for name, value in asked.items():
        if value is None:
            continue
        if name == "response_format":
            grammar = _response_format(value)
        elif name == "structured_outputs":
            grammar = _structured_outputs(value)
        else:
            grammar = _grammar(name.removeprefix("guided_"), value, name)
        if grammar is not None:
            found.append(grammar)
    if len(found) > 1:
        places = " and ".join(grammar.asked_by for grammar in found)
        raise _refused(found[1].asked_by, f"{places} are both given; allowed: one form of the answer")
    if fields.get("guided_whitespace_pattern") is not None:
        raise _refused("guided_whitespace_pattern", "guided_whitespace_pattern is not supported; leave it out")
    return found[0] if found else None


def _response_format(value: Any) -> Grammar | None:
    place = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _grammar("json", ANY_OBJECT, place)
    if kind != "json_schema":
        raise _refused(place, f"{place} is {in_json(value)}; allowed: an object whose type is {FORMATS}")
    wrapper = value.get("json_schema", value)
    if not isinstance(wrapper, Mapping) or not isinstance(wrapper.get("schema"), dict | bool):
        raise _refused(
            place, f'{place}.json_schema is {in_json(wrapper)}; allowed: {{"name": ..., "schema": a JSON schema}}'
        )
    return _grammar("json", wrapper["schema"], f"{place}.json_schema")


def _structured_outputs(value: Any) -> Grammar | None:
    place = "structured_outputs"
    if not isinstance(value, Mapping):
        raise _refused(place, f"{place} is {in_json(value)}; allowed: an object with one of {', '.join(KINDS)}")
    # false is a schema too, which nothing fits; of the others it means not asked for
    said = {name: each for name, each in value.items() if each is not None and (each is not False or name == "json")}
    for name in said:
        if name not in (*KINDS, "json_object", *HINTS):
            raise _refused(
                f"{place}.{name}", f"{place}.{name} is not supported; allowed: one of {', '.join(KINDS)}, json_object"
            )
    forms = [name for name in said if name not in HINTS]
    if len(forms) > 1:
        raise _refused(place, f"{place} has {' and '.join(forms)}; allowed: one of them")
    if not forms:
        return None
    if forms == ["json_object"]:
        return _grammar("json", ANY_OBJECT, f"{place}.json_object")
    return _grammar(forms[0], said[forms[0]], f"{place}.{forms[0]}")


def _grammar(name: str, value: Any, place: str) -> Grammar:
    """`name` of KINDS; a schema may be given as JSON text."""
    if name == "json":
        allowed, fits = "a JSON schema", isinstance(value, dict | bool | str)
    elif name == "choice":
        allowed = "a list of texts, none of them empty"
        fits = isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
    else:
        allowed, fits = "a text that is not empty", isinstance(value, str) and bool(value)
    if not fits:
        raise _refused(place, f"{place} is {in_json(value)}; allowed: {allowed}")
    return Grammar(KINDS[name], value if isinstance(value, str) else _dumps(value, place), asked_by=place)


def _dumps(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise _refused(place, f"{place} is nested too deeply") from error


# tools, tool_choice and parallel_tool_calls


def _tools(fields: Mapping[str, Any]) -> list[Tool]:
    """Also of the form that /v1/responses has, without `function` around name and parameters."""
    tools: list[Tool] = []
    for index, value in enumerate(fields.get("tools") or ()):
        place = f"tools[{index}]"
        function = value.get("function", value) if isinstance(value, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name or value.get("type", "function") != "function":
            raise _refused(
                place, f'{place} is {in_json(value)}; allowed: {{"type": "function", "function": {{"name": ...}}}}'
            )
        parameters, is_strict = function.get("parameters"), function.get("strict")
        if parameters is not None and not isinstance(parameters, dict):
            raise _refused(place, f"{place}: parameters are {in_json(parameters)}; allowed: a JSON schema of an object")
        if is_strict is not None and not isinstance(is_strict, bool):
            raise _refused(place, f"{place}: strict is {in_json(is_strict)}; allowed: true or false")
        if name in [tool.name for tool in tools]:
            raise _refused(place, f"{place}: the name '{name}' is given twice; give each tool its own")
        tools.append(Tool(name, parameters, bool(is_strict)))
    return tools


def _choice(fields: Mapping[str, Any]) -> str | Tool:
    """none, auto, required, or the one tool that is named."""
    value, tools = fields.get("tool_choice"), _tools(fields)
    if value is None:
        return "auto"
    if isinstance(value, Mapping) and value.get("type") == "function":
        name = value.get("function", value)
        name = name.get("name") if isinstance(name, Mapping) else None
        named = [tool for tool in tools if tool.name == name]
        if not named:
            given = ", ".join(tool.name for tool in tools) or "nothing, as there are no tools"
            raise _refused("tool_choice", f"tool_choice names {in_json(name)}; allowed: {given}")
        return named[0]
    if value not in ("none", "auto", "required"):
        raise _refused("tool_choice", f"tool_choice is {in_json(value)}; allowed: {CHOICES}")
    if value == "required" and not tools:
        raise _refused("tool_choice", "tool_choice is required, but there are no tools; give tools, or none")
    return value


def _calls(fields: Mapping[str, Any], tools: Sequence[Tool], choice: str | Tool, form: Grammar | None) -> Grammar:
    """The calls that the answer makes or may make, and what it must be where it makes none."""
    if form is not None and form.kind != "json_schema":
        raise _refused(
            form.asked_by, f"{form.asked_by} and tools are both given, and an answer cannot be both; set tool_choice "
            "to none, or ask for JSON",
        )  # fmt: skip
    is_parallel = fields.get("parallel_tool_calls") is not False
    if isinstance(choice, Tool):
        tools, is_parallel = (choice,), False
    is_lazy = choice == "auto" and form is None
    source: dict[str, Any] = {"parallel": is_parallel}
    source["tools"] = [{"name": tool.name, "parameters": _enforced_parameters(tool, choice)} for tool in tools]
    if form is not None and choice == "auto":
        source["else"] = form.source
    return Grammar("calls", _dumps(source, "tools"), is_lazy=is_lazy, asked_by="tools")


def _enforced_parameters(tool: Tool, choice: str | Tool) -> Any:
    """The schema of a call's arguments; None where any object is taken."""
    if choice == "auto" and not tool.is_strict:
        return None
    return NO_PARAMETERS if tool.parameters is None else tool.parameters


def _refused(place: str, message: str) -> ApiError:
    return ApiError(400, message, param=place)
