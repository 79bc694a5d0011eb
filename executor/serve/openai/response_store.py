"""Responses that are kept, so that a conversation can go on from one of them: in memory, bounded, oldest out first.

Invariant: `num_bytes` is the size of what is kept, at most `max_bytes`; a conversation is given whole or not at all.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.serve.errors import ApiError

MAX_RESPONSES = 4096
MAX_BYTES = 256 * 1024 * 1024
NODE_BYTES = 64  # of an object beside its text

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """A response, what was asked for it beyond the one before, and which one that was."""

    response: dict[str, Any]
    input: tuple[Item, ...]
    previous_id: str | None
    num_bytes: int


class ResponseStore:
    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the one used longest ago first
        self._items: dict[str, Item] = {}  # output items by their ids
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, response: dict[str, Any], items: Sequence[Item], previous_id: str | None) -> None:
        num_bytes = size_of(response) + size_of(items)
        if num_bytes > self._max_bytes:
            return  # its id is unknown afterwards, and the error says what to do
        self._kept[response["id"]] = Kept(response, tuple(items), previous_id, num_bytes)
        self._items.update((item["id"], item) for item in response["output"])
        self.num_bytes += num_bytes
        while len(self._kept) > self._max_responses or self.num_bytes > self._max_bytes:
            self.remove(next(iter(self._kept)))

    def get(self, name: str, *, param: str | None = None) -> Kept:
        """Raises ApiError 404."""
        if name not in self._kept:
            bounds = f"at most {self._max_responses} responses and {self._max_bytes} bytes, until the server ends"
            raise ApiError(
                404, f"the response {name[:80]!r} is not kept here: it never was, or newer ones took its place "
                f"({bounds}); hand in the whole conversation as input", param=param,
                code="previous_response_not_found" if param else None,
            )  # fmt: skip
        self._kept.move_to_end(name)
        return self._kept[name]

    def conversation(self, name: str) -> list[Item]:
        """All items up to and with a response's own output. Raises ApiError 404 where a part of it is gone."""
        parts: list[tuple[Item, ...]] = []
        following: str | None = name
        while following is not None:
            kept = self.get(following, param="previous_response_id")
            parts.append((*kept.input, *kept.response["output"]))
            following = kept.previous_id
        return [item for part in reversed(parts) for item in part]

    def resolved(self, items: Sequence[Any]) -> list[Any]:
        """`items` with each item_reference replaced. Raises ApiError 404."""
        return [self._referred(item) if is_reference(item) else item for item in items]

    def _referred(self, item: Item) -> Item:
        found = self._items.get(item["id"]) if isinstance(item.get("id"), str) else None
        if found is None:
            raise ApiError(
                404, f"the item {str(item.get('id'))[:80]!r} is not kept here; hand in the item itself, or ask with "
                "store false, which makes clients do so", param="input",
            )  # fmt: skip
        return found

    def remove(self, name: str) -> None:
        kept = self._kept.pop(name)
        self.num_bytes -= kept.num_bytes
        for item in kept.response["output"]:
            del self._items[item["id"]]

    def check(self) -> None:
        """Asserts the invariants."""
        assert self.num_bytes == sum(kept.num_bytes for kept in self._kept.values()) <= self._max_bytes
        assert len(self._items) == sum(len(kept.response["output"]) for kept in self._kept.values())


def is_reference(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("type") == "item_reference"


def size_of(tree: Any) -> int:
    """Bytes of a JSON tree in memory, roughly: its texts, and a little for each value."""
    num_bytes, pending = 0, [tree]
    while pending:
        value = pending.pop()
        num_bytes += NODE_BYTES
        if isinstance(value, str):
            num_bytes += len(value)
        elif isinstance(value, Mapping):
            pending += value.keys()
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    return num_bytes
