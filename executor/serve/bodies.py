"""Request bodies as JSON objects, whatever their content type claims, and what is wrong with them in plain words."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import Scope

from executor.serve.errors import ApiError
from executor.serve.middleware import EXCHANGE, Exchange

ASIDE_BYTES = 256 * 1024  # larger bodies are parsed in a thread beside the event loop

MARKS, MAX_MARKS = (b",", b"[", b"{"), 2_000_000  # each value of a body costs time in which nobody else is answered
SHOWN_CHARACTERS = 60

_PLACE = re.compile(r"line (\d+) column (\d+)$")  # of a parser's complaint, both from 1, columns in bytes
_TAG = re.compile(r"\[|^(str|int|float|bool|dict|list|function|nullable)\b|^[A-Z]")
_ALLOWED = {  # pydantic's error types
    "int_type": "a whole number", "int_from_float": "a whole number", "int_parsing_size": "a whole number",
    "float_type": "a number", "finite_number": "a finite number", "bool_type": "true or false",
    "string_type": "a text", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object", "string_unicode": "a text without halves of characters",
}  # fmt: skip


class JsonRoute(APIRoute):
    """A route whose `body` parameter is read as JSON. Give it to an APIRouter as `route_class`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handle_json(request: Request) -> Response:
            return await handle(await _ReadRequest.of(request) if takes_body else request)

        return handle_json


class _ReadRequest(Request):
    """A request whose body has been read; its bytes are not kept."""

    tree: dict[str, Any]

    @classmethod
    async def of(cls, request: Request) -> "_ReadRequest":
        content = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        scope: Scope = {**request.scope, "headers": [*content, (b"content-type", b"application/json")]}
        read = cls(scope, request.receive)
        read.tree = await read_object(request)
        exchange: Exchange = request.scope[EXCHANGE]
        if exchange.keeps_prompts:
            exchange.asked = read.tree
        return read

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self.tree


async def read_object(request: Request) -> dict[str, Any]:
    """The body's JSON object. Raises ApiError 400."""
    pieces = [piece async for piece in request.stream()]
    if sum(map(len, pieces)) > ASIDE_BYTES:
        return await asyncio.to_thread(_parse_and_drop, pieces)
    return parse_object(pieces)


def _parse_and_drop(pieces: list[bytes]) -> dict[str, Any]:
    """A large body need not be there in pieces, as a whole and as an object at the same time."""
    body = b"".join(pieces)
    pieces.clear()
    return parse_object((body,))


def parse_object(pieces: Sequence[bytes]) -> dict[str, Any]:
    """Raises ApiError 400 for what is no JSON object of finite numbers and whole characters."""
    body = b"".join(pieces)
    if sum(map(body.count, MARKS)) > MAX_MARKS:
        raise ApiError(400, f"the body has too many values; allowed: up to {MAX_MARKS} lists, objects and commas")
    if not body.strip():
        raise ApiError(400, "the body is empty; allowed: a JSON object")
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        what = f"{error}{_found(body, str(error))}"
        raise ApiError(400, f"the body is no valid JSON ({what}); allowed: a JSON object in UTF-8") from error
    if not isinstance(tree, dict):
        raise ApiError(400, f"the body is {in_json(tree)}; allowed: a JSON object")
    place = _endless(tree)
    if place is not None:
        raise ApiError(400, f"{place} is a number too large for a computer; allowed: numbers below 1e308", param=place)
    return tree


def _found(body: bytes, complaint: str) -> str:
    """The character that the parser stopped at, where it is not ASCII: a full-width comma looks like a comma."""
    place = _PLACE.search(complaint)
    if place is None:
        return ""
    line, column = int(place[1]), int(place[2])
    begin = column - 1 + sum(map(len, body.split(b"\n", line - 1)[: line - 1])) + line - 1
    character = body[begin : begin + 4].decode(errors="ignore")[:1]
    return f", found {character!r}" if character and not character.isascii() else ""


def _endless(tree: dict[str, Any]) -> str | None:
    """The field with a number that reads as infinite (1e999), if there is one."""
    for name, value in tree.items():
        pending = [value]
        while pending:
            each = pending.pop()
            if isinstance(each, float):
                if each - each != 0:
                    return name
            elif isinstance(each, dict):
                pending.extend(each.values())
            elif isinstance(each, list):
                pending.extend(each)
    return None


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's errors of a body as one that names the field, what it is, and what is allowed."""
    name = errors[0]["loc"][1:2]
    group = [error for error in errors if error["loc"][1:2] == name]
    deepest = max(len(error["loc"]) for error in group)
    group = [error for error in group if len(error["loc"]) == deepest]
    first = group[0]
    place = _place(first["loc"][1:])
    if first["type"] == "missing":
        return ApiError(400, f"{place or 'the body'} is missing; it must be given", param=place or None)
    allowed = " or ".join(dict.fromkeys(map(_allowed, group)))
    got = in_json(first["input"])
    return ApiError(400, f"{place or 'the body'} is {got}; allowed: {allowed}", param=place or None)


def in_json(value: Any) -> str:
    """The beginning of a value, as the client wrote it."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    elif isinstance(value, list | dict) and len(value) > SHOWN_CHARACTERS:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "nested too deeply to show"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _allowed(error: Mapping[str, Any]) -> str:
    if error["type"] == "too_long":
        return f"at most {error['ctx']['max_length']} entries"
    return _ALLOWED.get(error["type"], error["msg"])


def _place(parts: Sequence[Any]) -> str:
    """("stop", "list[str]", 1) -> "stop[1]": pydantic names the branches of a union too."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _TAG.search(part):
            text += f".{part}" if text else part
    return text
