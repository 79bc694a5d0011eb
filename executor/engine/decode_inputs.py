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
        self._numbers = np.empty((5, 0), dtype=np.int64)  # token ids, three axes of positions, slots
        self._host = torch.from_numpy(self._numbers)
        self._views = self._split(self._host)
        self._q_lens: list[int] = []
        self._select = torch.empty(0)

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Any, Tensor, None]:
        """The arguments of ModelStep."""
        requests, starts, kv_lens = [row[0] for row in rows], [row[1] for row in rows], [row[1] + 1 for row in rows]
        size, to = self.block_size, self.device.device
        if self._starts_next == starts and self._requests == requests:
            numbers = self._numbers
            numbers[1:] += 1
            entered = [row for row, start in enumerate(starts) if not start % size]
        else:
            numbers = self._numbers = np.empty((5, len(rows)), dtype=np.int64)
            self._host = torch.from_numpy(numbers)
            self._views = self._split(self._host)
            deltas = [request.prompt.position_delta for request in requests]
            numbers[1:4] = np.add(starts, deltas)
            self._requests, self._q_lens = requests, [1] * len(rows)
            self._select = torch.arange(len(rows), device=to)
            entered = range(len(rows))
        self._starts_next = kv_lens
        numbers[0] = [request.output_token_ids[-1] for request in requests]
        for row in entered:
            start = starts[row]
            numbers[4, row] = requests[row].block_ids[start // size] * size + start % size
        attention = self.device.prepare_attention(
            self._q_lens, kv_lens, [request.block_ids for request in requests], size
        )
        # On the host itself nothing is sent: a step has ended before the next one's numbers.
        is_here = to.type == "cpu" and self.device.slot_dtype is self._host.dtype
        token_ids, positions, slots = self._views if is_here else self._split(self._host.to(to))
        return token_ids, positions, slots, attention, self._select, None

    def _split(self, sent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [R], positions [3, R] and slots [R] of `sent` [5, R]."""
        return sent[0], sent[1:4], sent[4].to(self.device.slot_dtype)

    def forget(self) -> None:
        """Other steps have been between: a preempted request may come back with other blocks."""
        self._requests = []
