"""What a replica's leader sends its followers before each step, as bytes: JSON, and new prompts' numbers behind it.

Plain data: reading a message runs nothing of the sender's, whoever that is.
Knows no groups and no devices. Pixels travel by themselves.
Legend: T prompt tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executor.schedule.plan import GraphShape
from executor.schedule.request import MediaItem, Prompt, Span

_LENGTH_BYTES = 8  # of the JSON, in front of it


@dataclass(frozen=True, slots=True)
class RowMessage:
    """A row, and what followers do not know yet of its request: `block_ids` are those from place `num_kept` on."""

    number: int  # of the request
    start: int
    num_tokens: int
    max_yield: int
    scored: range
    draft_ids: tuple[int, ...]
    token_ids: list[int]  # of the answer
    num_kept: int
    block_ids: list[int]
    prompt: Prompt | None = None  # at the first row


@dataclass(frozen=True, slots=True)
class StepMessage:
    """A plan: its rows, the numbers of requests to forget, and media with the shape of their pixels and their owner.

    `continues`: the rows' tokens come over the replica's device group.
    """

    rows: list[RowMessage]
    ended: list[int]
    encode: list[tuple[MediaItem, tuple[int, ...], int]]
    release: tuple[bytes, ...]
    padded_tokens: int | None
    graph: GraphShape | None
    is_decode: bool
    continues: bool


def to_bytes(message: StepMessage | None) -> bytes:
    """None is the end: no message follows."""
    if message is None:
        return _joined(None, [])
    arrays: list[np.ndarray] = []
    rows = []
    for row in message.rows:
        prompt = None
        if row.prompt is not None:
            arrays += [np.asarray(row.prompt.token_ids, dtype=np.int64), row.prompt.positions.astype(np.int64).ravel()]
            prompt = _described(row.prompt)
        scored = [row.scored.start, row.scored.stop]
        numbers = (row.number, row.start, row.num_tokens, row.max_yield, scored, row.draft_ids, row.num_kept)
        rows.append([*numbers, row.token_ids, row.block_ids, prompt])
    tree = {
        "rows": rows,
        "ended": message.ended,
        "encode": [[_media_to_json(item), shape, owner] for item, shape, owner in message.encode],
        "release": [digest.hex() for digest in message.release],
        "padded_tokens": message.padded_tokens,
        "graph": message.graph,
        "is_decode": message.is_decode,
        "continues": message.continues,
    }
    return _joined(tree, arrays)


def from_bytes(content: bytes) -> StepMessage | None:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    tree = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
    if tree is None:
        return None
    numbers = np.frombuffer(content, dtype="<i8", offset=_LENGTH_BYTES + length + -length % 8)
    rows, at = [], 0
    for number, start, num_tokens, max_yield, scored, drafts, num_kept, token_ids, block_ids, described in tree["rows"]:
        prompt = None
        if described is not None:
            end = at + 4 * described["num_tokens"]
            prompt, at = _prompt(described, numbers[at:end]), end
        rows.append(
            RowMessage(
                number,
                start,
                num_tokens,
                max_yield,
                range(*scored),
                tuple(drafts),
                token_ids,
                num_kept,
                block_ids,
                prompt,
            )  # fmt: skip
        )
    encode = [(_media_from_json(item), tuple(shape), owner) for item, shape, owner in tree["encode"]]
    release = tuple(bytes.fromhex(digest) for digest in tree["release"])
    graph = GraphShape(*tree["graph"]) if tree["graph"] else None
    flags = tree["is_decode"], tree["continues"]
    return StepMessage(rows, tree["ended"], encode, release, tree["padded_tokens"], graph, *flags)


def _joined(tree: Any, arrays: Sequence[np.ndarray]) -> bytes:
    text = json.dumps(tree, separators=(",", ":")).encode()
    padding = bytes(-len(text) % 8)
    return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, padding, *(x.tobytes() for x in arrays)))


def _described(prompt: Prompt) -> dict[str, Any]:
    """All of a prompt but its token ids and positions; neither its text nor pixels are sent."""
    return {
        "num_tokens": len(prompt.token_ids),
        "position_delta": prompt.position_delta,
        "media": [_media_to_json(item) for item in prompt.media],
        "spans": [[span.start, span.num_tokens, span.media_index, span.offset] for span in prompt.spans],
    }


def _prompt(described: dict[str, Any], numbers: np.ndarray) -> Prompt:
    num_tokens = described["num_tokens"]
    return Prompt(
        token_ids=numbers[:num_tokens].tolist(),
        positions=numbers[num_tokens:].reshape(3, num_tokens),
        position_delta=described["position_delta"],
        media=tuple(_media_from_json(item) for item in described["media"]),
        spans=tuple(Span(*span) for span in described["spans"]),
    )


def _media_to_json(item: MediaItem) -> list[Any]:
    return [item.kind, item.digest.hex(), item.grid_thw, item.num_tokens]


def _media_from_json(values: list[Any]) -> MediaItem:
    kind, digest, grid_thw, num_tokens = values
    return MediaItem(kind, bytes.fromhex(digest), None, tuple(grid_thw), num_tokens)
