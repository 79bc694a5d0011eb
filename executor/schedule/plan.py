"""What one step computes: made by the scheduler, executed by the runner.

Knows nothing of policy, tensors or text.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from executor.schedule.request import MediaItem, Request


class Row(NamedTuple):
    """Compute tokens [start, start + num_tokens) of a request, and yield up to `max_yield` new ones behind them.

    0 where the request goes on behind the row; else at least one token is yielded, the one that the last token's logits
    give. The others are drafts that the same step finds right: the request has slots for the first `max_yield - 1` new
    tokens.
    `scored`: the tokens of the request, of this row, whose logits judge the prompt token behind each.
    `draft_ids`: tokens that are proposed to come next, at most `max_yield - 1`; the runner fills them in, the step
    computes them behind the others, and they are kept as far as the model chooses the same.
    """

    request: Request
    start: int
    num_tokens: int
    max_yield: int
    scored: range = range(0)
    draft_ids: tuple[int, ...] = ()

    @property
    def num_inputs(self) -> int:
        """Tokens that the step computes of the row: the request's own and drafts."""
        return self.num_tokens + len(self.draft_ids)


class BlockToLoad(NamedTuple):
    """A block that a store has at hand, and where it goes."""

    block_id: int
    digest: bytes


class BlockToKeep(NamedTuple):
    """A full block for a store: `place` blocks of the same beginning stand before it, the last of them `parent`."""

    block_id: int
    digest: bytes
    parent: bytes  # b"" of the first
    place: int


class GraphShape(NamedTuple):
    """What a decode graph computes: `rows` requests, of each its last `q_len` tokens: 1, or more where drafts among
    them are verified."""

    rows: int
    q_len: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.q_len


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. The runner hands `keep` to the store, takes `load` from it, drops the embeddings of `release`, encodes
    `encode`, and computes `rows`.

    The replica's leader fills in `padded_tokens` and `graph`. Replicas that share experts agree on them: how many
    tokens each of them brings, its own filled up, and which graph they all replay.
    `continues`: the plan was made while the step before was under way. Each row has one token, which the row at this
    place of the step before yields; the host does not know it yet.
    """

    rows: tuple[Row, ...]
    encode: tuple[MediaItem, ...] = ()
    release: tuple[bytes, ...] = ()
    padded_tokens: int | None = None
    graph: GraphShape | None = None
    is_decode: bool = False  # known to be of rows that have one token each, the last of an answer under way
    load: tuple[BlockToLoad, ...] = ()
    keep: tuple[BlockToKeep, ...] = ()
    continues: tuple[int, ...] | None = None

    def without(self, numbers: Collection[int]) -> "Plan":
        """The plan but for the rows of these numbers."""
        return replace(self, rows=tuple(row for number, row in enumerate(self.rows) if number not in numbers))
