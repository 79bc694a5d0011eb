"""Messages between a front door and the leaders of its replicas: JSON with its length in front, never pickle.

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
_LENGTH_BYTES = 8

_ask = TypeAdapter(Ask)
_events = TypeAdapter(list[tuple[int, Event]])
_stats = TypeAdapter(EngineStats)

Numbered = tuple[int, Event]
"""An event, and the number of the request that it belongs to."""


def pack(tree: Any) -> bytes:
    """A message's bytes. Numbers that JSON has not (a logprob of minus infinity) stay what they are."""
    text = json.dumps(tree, separators=(",", ":")).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


async def read(reader: asyncio.StreamReader, max_bytes: int = MAX_BYTES) -> Any:
    """The next message; None where the connection has ended. Raises ValueError for what is no message."""
    try:
        length = _checked_length(await reader.readexactly(_LENGTH_BYTES), max_bytes)
        return json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, OSError):
        return None


def read_blocking(connection: socket.socket) -> Any:
    """As `read`, in a thread that may wait."""
    head = _received(connection, _LENGTH_BYTES)
    content = head and _received(connection, _checked_length(head, MAX_BYTES))
    return None if content is None else json.loads(content)


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
