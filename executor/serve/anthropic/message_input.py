"""What a request to /v1/messages hands in, as a chat: its blocks as parts, its tools and formats in chat's form."""

from collections.abc import Mapping, Sequence
from typing import Any

from executor.serve.bodies import in_json
from executor.serve.errors import ApiError
from executor.serve.jsontext import dumps

Block = Mapping[str, Any]

CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # tool_choice here -> in chats


def messages_of(messages: Sequence[Any], system: Any) -> list[dict[str, Any]]:
    """Chat messages. Raises ApiError 400 for a block that is not served."""
    chat: list[dict[str, Any]] = []
    if system:
        chat.append({"role": "system", "content": _texts(system, "system")})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("user", "assistant", "system"):
            raise refusal(where, f"is {in_json(message)}; allowed: an object with the role user or assistant")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise refusal(f"{where}.content", f"is {in_json(content)}; allowed: a text or a list of blocks")
        for number, block in enumerate(blocks):
            if not isinstance(block, Mapping):
                raise refusal(f"{where}.content[{number}]", f"is {in_json(block)}; allowed: an object such as a text")
        if role == "assistant":
            chat.append(_answer(blocks, f"{where}.content"))
        else:
            chat += _question(role, blocks, f"{where}.content")
    return chat


def _question(role: str, blocks: Sequence[Block], where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before what is said beside them."""
    results, parts = [], []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            content = block.get("content", "")
            inner = content if isinstance(content, str) else _parts(content, f"{place}.content")
            results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": inner})
        else:
            parts.append(_part(block, place))
    return [*results, {"role": role, "content": parts}] if parts or not results else results


def _answer(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for index, block in enumerate(blocks):
        place, kind = f"{where}[{index}]", block.get("type")
        if kind == "text":
            message["content"] += _text(block, "text", place)
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + _text(block, "thinking", place)
        elif kind == "tool_use":
            if not isinstance(block.get("input"), Mapping):
                raise refusal(f"{place}.input", f"is {in_json(block.get('input'))}; allowed: an object")
            function = {"name": _text(block, "name", place), "arguments": dumps(block["input"])}
            call = {"id": _text(block, "id", place), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        else:
            raise refusal(place, f"has the type {kind!r}; allowed in an answer: text, thinking, tool_use")
    return message


def _parts(blocks: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise refusal(where, f"is {in_json(blocks)}; allowed: a text or a list of blocks")
    return [_part(block, f"{where}[{index}]") for index, block in enumerate(blocks)]


def _part(block: Block, where: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": _text(block, "text", where)}
    if kind in ("image", "video"):
        return {"type": f"{kind}_url", f"{kind}_url": {"url": _url(block.get("source"), f"{where}.source")}}
    raise refusal(where, f"has the type {kind!r}; allowed: text, image, video, tool_result")


def _url(source: Any, where: str) -> str:
    kind = source.get("type") if isinstance(source, Mapping) else None
    if kind == "base64":
        return f"data:{_text(source, 'media_type', where)};base64,{_text(source, 'data', where)}"
    if kind == "url":
        return _text(source, "url", where)
    raise refusal(where, f"is {in_json(source)}; allowed: a source of type base64 or url")


def _texts(system: Any, where: str) -> str:
    if isinstance(system, str):
        return system
    if not isinstance(system, list):
        raise refusal(where, f"is {in_json(system)}; allowed: a text or a list of text blocks")
    texts = []
    for index, block in enumerate(system):
        if not isinstance(block, Mapping) or block.get("type") != "text":
            raise refusal(f"{where}[{index}]", f"is {in_json(block)}; allowed: a text block")
        texts.append(_text(block, "text", f"{where}[{index}]"))
    return "\n".join(texts)


def tools_of_messages(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Tools in chat's form. Raises ApiError 400 for those that Anthropic itself runs: there are none here."""
    chat_tools = []
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping) or tool.get("type") not in (None, "custom"):
            raise refusal(f"tools[{index}]", f"is {in_json(tool)}; allowed: tools with a name and an input_schema")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {"type": "object"}}
        function.update({key: tool[key] for key in ("description", "strict") if tool.get(key) is not None})
        chat_tools.append({"type": "function", "function": function})
    return chat_tools or None


def tool_choice_of_messages(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """tool_choice and parallel_tool_calls of chats. Raises ApiError 400."""
    if choice is None:
        return {}
    kind = choice.get("type")
    fields: dict[str, Any] = {"parallel_tool_calls": not choice.get("disable_parallel_tool_use")}
    if kind == "tool":
        return {**fields, "tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if kind not in CHOICES:
        raise refusal("tool_choice.type", f"is {kind!r}; allowed: auto, any, tool, none")
    return {**fields, "tool_choice": CHOICES[kind]}


def response_format_of(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`output_config.format` as chat's response_format. Raises ApiError 400 for what else the config says."""
    for name, value in (config or {}).items():
        if value is not None and name != "format":
            raise refusal(f"output_config.{name}", f"is {in_json(value)}, which is not supported; leave it out")
    given = (config or {}).get("format")
    if given is None:
        return None
    if not isinstance(given, Mapping) or given.get("type") != "json_schema":
        raise refusal("output_config.format", f"is {in_json(given)}; allowed: an object of type json_schema")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": given.get("schema"), "strict": True}}


def _text(block: Block, key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise refusal(f"{where}.{key}", f"is {in_json(value)}; allowed: a text")
    return value


def refusal(place: str, words: str) -> ApiError:
    return ApiError(400, f"{place} {words}", param=place)
