"""What a request to /v1/responses hands in, as a chat: its items as messages, its tools and formats in chat's form."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from executor.serve.bodies import in_json
from executor.serve.errors import ApiError

Item = Mapping[str, Any]

TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
ROLES = ("user", "assistant", "system", "developer")


def messages_of(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Chat messages of input items. An assistant's thoughts, words and calls in a row are one message.

    Raises ApiError 400 for an item that is not served.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    called: set[str] = set()
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if not isinstance(item, Mapping):
            raise _refusal(where, f"is {in_json(item)}; allowed: an object such as a message")
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            _add_message(messages, item, where)
        elif kind == "reasoning":
            _add_reasoning(messages, item)
        elif kind == "function_call":
            call_id = _text(item, "call_id", where)
            called.add(call_id)
            function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
            answer = _assistant(messages, lambda message: True)
            answer.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        elif kind == "function_call_output":
            call_id = _text(item, "call_id", where)
            if call_id not in called:
                raise _refusal(f"{where}.call_id", f"is {call_id!r}, which no function_call before it has")
            content = _content(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            raise _refusal(
                where, f"has the type {kind!r}; allowed: message, reasoning, function_call, function_call_output, "
                "item_reference",
            )  # fmt: skip
    return messages


def _add_message(messages: list[dict[str, Any]], item: Item, where: str) -> None:
    role = item.get("role")
    if role not in ROLES:
        raise _refusal(f"{where}.role", f"is {role!r}; allowed: {', '.join(ROLES)}")
    content = _content(item.get("content"), f"{where}.content")
    if role == "assistant":
        _assistant(messages, lambda message: not {"content", "tool_calls"} & message.keys())["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _add_reasoning(messages: list[dict[str, Any]], item: Item) -> None:
    """Of a thought that another server keeps encrypted nothing can be read: it is left out, as its summary is."""
    parts = item.get("content") or ()
    text = "".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    if text:
        _assistant(messages, lambda message: False)["reasoning_content"] = text


def _assistant(messages: list[dict[str, Any]], takes: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """The assistant's message that goes on: the last one if it `takes` more, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or not takes(messages[-1]):
        messages.append({"role": "assistant"})
    return messages[-1]


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(where, f"is {in_json(content)}; allowed: a text or a list of parts")
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise _refusal(where, f"is {in_json(part)}; allowed: an object such as an input_text")
    kind = part.get("type")
    if kind in TEXT_PARTS:
        return {"type": "text", "text": _text(part, "refusal" if kind == "refusal" else "text", where)}
    if kind in ("input_image", "input_video"):
        name = f"{kind.removeprefix('input_')}_url"
        if part.get(name) is None and part.get("file_id") is not None:
            raise _refusal(f"{where}.file_id", f"cannot be read: no files are kept here; give {name}, a data: URL")
        detail = {"detail": part["detail"]} if kind == "input_image" and part.get("detail") is not None else {}
        return {"type": name, name: {"url": _text(part, name, where), **detail}}
    raise _refusal(where, f"has the type {kind!r}; allowed: input_text, output_text, input_image, input_video")


def tools_of_response(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Tools in chat's form. Raises ApiError 400 for those that OpenAI itself runs: there are none here."""
    chat_tools = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise _refusal(f"tools[{index}]", f"is {in_json(tool)}; allowed: tools of type function", param="tools")
        function = {key: value for key, value in tool.items() if key != "type" and value is not None}
        chat_tools.append({"type": "function", "function": function})
    return chat_tools or None


def tool_choice_of_response(choice: Any) -> Any:
    """tool_choice in chat's form; what is wrong with it is found there."""
    if isinstance(choice, Mapping) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def response_format_of(text: Mapping[str, Any] | None) -> Any:
    """`text.format` as chat's response_format."""
    given = (text or {}).get("format")
    if isinstance(given, Mapping) and given.get("type") == "json_schema":
        schema = {key: value for key, value in given.items() if key != "type" and value is not None}
        return {"type": "json_schema", "json_schema": schema}
    return given


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise _refusal(f"{where}.{key}", f"is {in_json(value)}; allowed: a text")
    return value


def _refusal(place: str, words: str, *, param: str = "input") -> ApiError:
    return ApiError(400, f"{place} {words}", param=place if place.startswith("input[") else param)
