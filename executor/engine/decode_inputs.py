"""The inputs of decode steps, which differ little from one to the next: the same rows, one token further.

What the rows of the step before had is counted on; whatever has changed otherwise is made anew. Block tables of
running requests only grow, so a row has another slot than the next one only where it enters a block.
Legend: R rows, each of one token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor.device.ops import Ops
from executor.schedule.plan import Row
from executor.schedule.request import Request


class DecodeInputs:
    """Called with the rows of a step that have one token each, the last of an answer under way."""

    def __init__(self, device: Ops, block_size: int) -> None:
        self.device = device
        self.block_size = block_size
        self._requests: list[Request] = []
        self._starts_next: list[int] = []  # where these rows are a token further
        self._numbers = np.empty((5, 0), dtype=np.int64)  # three axes of positions, slots, token ids
        self._block_tables: list[list[int]] = []
        self._attention: Any = None
        self._select = torch.empty(0)

    def __call__(
        self, rows: Sequence[Row], token_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Any, Tensor, None]:
        """The arguments of ModelStep. `token_ids` int64 [R]: the rows' tokens, where these are on the device only."""
        requests, starts, kv_lens = [row[0] for row in rows], [row[1] for row in rows], [row[1] + 1 for row in rows]
        size, numbers = self.block_size, self._numbers
        if self._starts_next == starts and self._requests == requests:
            numbers[:4] += 1
            entered = [row for row, start in enumerate(starts) if not start % size]
            self._attention = self.device.advance_attention(self._attention, kv_lens, self._block_tables, size, entered)
        else:
            numbers = self._numbers = np.empty((5, len(rows)), dtype=np.int64)
            numbers[:3] = np.add(starts, [request.prompt.position_delta for request in requests])
            self._requests, self._block_tables = requests, [request.block_ids for request in requests]
            self._select = torch.arange(len(rows), device=self.device.device)
            entered = range(len(rows))
            self._attention = self.device.prepare_attention([1] * len(rows), kv_lens, self._block_tables, size)
        self._starts_next = kv_lens
        for row in entered:
            start = starts[row]
            numbers[3, row] = self._block_tables[row][start // size] * size + start % size
        if token_ids is None:
            numbers[4] = [request.output_token_ids[-1] for request in requests]
            sent = self.device.send(numbers)
            token_ids = sent[4]
        else:
            sent = self.device.send(numbers[:4])
        return token_ids, sent[:3], sent[3].to(self.device.slot_dtype), self._attention, self._select, None

    def forget(self) -> None:
        """Other steps have been between: a preempted request may come back with other blocks."""
        self._requests = []
        self._attention = None
