"""Messages between a front door and the leaders of its replicas: JSON and texts, their length in front, never pickle.

Reading a message runs nothing of the sender's. One message holds all that a step has brought.
Knows no engine and no routing.
"""

import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from executor.errors import UserError
from executor.serve.asks import Ask, EngineStats, Event

MAX_BYTES = 1 << 31  # of one message: more than any HTTP body that is let in
LONG_CHARACTERS = 1 << 14
_LENGTH_BYTES = 8

_ask = TypeAdapter(Ask)
_events = TypeAdapter(list[tuple[int, Event]])
_stats = TypeAdapter(EngineStats)

Numbered = tuple[int, Event]
"""An event, and the number of the request that it belongs to."""


def pack(tree: Any, *, has_long: bool = False) -> bytes:
    """A message's bytes. Numbers that JSON has not (a logprob of minus infinity) stay what they are.

    `has_long`: long texts (a picture's megabytes, which JSON would look through letter by letter in an event loop's
    thread) stand behind the JSON as they are: `[tree, paths]`, where `paths` says where each belongs and how many bytes
    it has.
    """
    paths: list[tuple[list[Any], int]] = []
    parts: list[bytes] = []
    if has_long:
        tree = _without_long(tree, [], paths, parts)
    text = json.dumps([tree, paths], separators=(",", ":")).encode()
    size = _LENGTH_BYTES + len(text) + sum(map(len, parts))
    head = (size.to_bytes(_LENGTH_BYTES, "little"), len(text).to_bytes(_LENGTH_BYTES, "little"), text)
    return b"".join((*head, *parts))


def unpack(content: bytes) -> Any:
    """The message whose bytes follow its length."""
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    tree, paths = json.loads(content[_LENGTH_BYTES:end])
    for path, num_bytes in paths:
        place = tree
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = content[end : end + num_bytes].decode("utf-8", "surrogatepass")
        end += num_bytes
    return tree


def _without_long(tree: Any, path: list[Any], paths: list[tuple[list[Any], int]], parts: list[bytes]) -> Any:
    if isinstance(tree, dict):
        return {key: _without_long(value, [*path, key], paths, parts) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_long(value, [*path, index], paths, parts) for index, value in enumerate(tree)]
    if isinstance(tree, str) and len(tree) > LONG_CHARACTERS:
        parts.append(tree.encode("utf-8", "surrogatepass"))
        paths.append((path, len(parts[-1])))
        return None
    return tree


async def read(reader: asyncio.StreamReader, max_bytes: int = MAX_BYTES) -> Any:
    """The next message; None where the connection has ended. Raises ValueError for what is no message."""
    try:
        length = _checked_length(await reader.readexactly(_LENGTH_BYTES), max_bytes)
        return unpack(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError):
        return None


def read_blocking(connection: socket.socket) -> Any:
    """As `read`, in a thread that may wait."""
    head = _received(connection, _LENGTH_BYTES)
    content = head and _received(connection, _checked_length(head, MAX_BYTES))
    return None if content is None else unpack(content)


def _checked_length(head: bytes, max_bytes: int) -> int:
    length = int.from_bytes(head, "little")
    if length > max_bytes:
        raise ValueError(f"a message of {length} bytes; at most {max_bytes} are read")
    return length


def _received(connection: socket.socket, num_bytes: int) -> bytes | None:
    content = bytearray(num_bytes)
    view, at = memoryview(content), 0
    while at < num_bytes:
        try:
            count = connection.recv_into(view[at:])
        except OSError:
            return None
        if not count:
            return None
        at += count
    return bytes(content)


def ask_to_tree(ask: Ask) -> dict[str, Any]:
    return asdict(ask)


def ask_from_tree(tree: Any) -> Ask:
    """Raises UserError for an ask that another process cannot be told, such as text that is no Unicode."""
    try:
        return _ask.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {first['msg']}") from error


def events_to_tree(events: Sequence[Numbered]) -> Any:
    return _events.dump_python(list(events))


def events_from_tree(tree: Any) -> list[Numbered]:
    return _events.validate_python(tree)


def stats_to_tree(stats: EngineStats) -> dict[str, Any]:
    return asdict(stats)


def stats_from_tree(tree: Any) -> EngineStats:
    return _stats.validate_python(tree)
