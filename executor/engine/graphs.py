"""Decode steps as graphs of a device: few batch sizes, inputs that stay in place, rows padded to the next size.

A padding row writes its key to a spare slot behind the cache and attends to one token: it can disturb nothing.
Legend: R rows of a captured size, W blocks of the longest request.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor.device.ops import Ops
from executor.engine.graph_folder import GraphFolder
from executor.engine.step import ModelStep
from executor.schedule.plan import Row

logger = logging.getLogger(__name__)

_TOKEN, _POSITION, _SLOT, _KV_LEN = range(4)  # the order of ModelStep.decode


class DecodeGraphs:
    """Replays a captured decode step for every batch of rows that have one new token each."""

    def __init__(
        self,
        step: ModelStep,
        device: Ops,
        mode: str,
        sizes: Sequence[int],
        num_blocks: int,
        max_model_len: int,
        folder: GraphFolder,
    ) -> None:
        """`num_blocks`: the scheduler's; the cache has `spare_blocks` more. `folder` keeps what is compiled."""
        self.device = device
        self.folder = folder  # claimed as long as the graphs live
        self.sizes = tuple(sorted(set(sizes)))
        self.block_size = step.block_size
        most, width = self.sizes[-1], -(-max_model_len // step.block_size)
        attention = step.model.language_model.layers[0].self_attn
        spare = num_blocks + np.arange(most) // step.block_size
        self._host = np.zeros((4, most), dtype=np.int64)
        self._table = np.zeros((most, width), dtype=np.int32)
        self._blocks: list[list[int]] = [[] for _ in range(most)]  # what stands in each row of the table
        self._spare_slots = num_blocks * step.block_size + np.arange(most)
        self._spare_blocks = [[int(block)] for block in spare]
        to = device.device
        self._values = torch.from_numpy(self._host).to(to, copy=True)
        self._block_table = torch.from_numpy(self._table).to(to, copy=True)
        shape = most, attention.num_heads * attention.head_dim
        self._q_outs = [torch.zeros(shape, dtype=step.dtype, device=to) for _ in step.kv]
        # Views of the first rows of all of them, made once: they are what a replay is given.
        self._inputs = {size: self._first_rows(size) for size in self.sizes}
        self._graphs = {size: device.capture(step.decode, mode, folder.path / f"batch_{size}") for size in self.sizes}

    def _first_rows(self, size: int) -> tuple[Any, ...]:
        values = self._values[:, :size].unbind(0)
        return *values, self._block_table[:size], [q_out[:size] for q_out in self._q_outs]

    @torch.inference_mode()
    def capture(self) -> None:
        """Make every graph, smallest first, and say how long it took. RuntimeError with the reason where it fails."""
        for number, size in enumerate(self.sizes, start=1):
            started = time.monotonic()
            self._run([], size)
            self.device.synchronize()
            seconds = time.monotonic() - started
            logger.info("decode graph %d of %d, batch %d: %.1f s", number, len(self.sizes), size, seconds)

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether these rows are a decode step that was captured: one generated token each, every one sampled from."""
        return len(rows) <= self.sizes[-1] and all(
            row.num_inputs == 1 and row.max_yield and row.start >= len(row.request.prompt.token_ids) for row in rows
        )

    def __call__(
        self, rows: Sequence[Row], padded_tokens: int | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of the rows, fp32 [len(rows), V]; they are the graph's own memory, valid until the next step.

        `padded_tokens`: the most rows that any replica has in this step, so that all replay a graph of one size.
        `token_ids` int64 [len(rows)]: the rows' tokens, where these are on the device only.
        """
        count = max(len(rows), padded_tokens or 0)
        size = next(size for size in self.sizes if size >= count)
        return self._run(rows, size, token_ids)[: len(rows)]

    def _run(self, rows: Sequence[Row], size: int, token_ids: Tensor | None = None) -> Tensor:
        self._fill(rows, size, token_ids)
        return self._graphs[size](*self._inputs[size], self._host[_KV_LEN, :size].tolist())

    def _fill(self, rows: Sequence[Row], size: int, token_ids: Tensor | None) -> None:
        """The step's numbers into the device's buffers: one copy, and one more where a request got a block."""
        host, count = self._host, len(rows)
        starts = np.fromiter((row.start for row in rows), np.int64, count)
        if token_ids is None:
            host[_TOKEN, :count] = [row.request.token_ids(row.start, row.start + 1)[0] for row in rows]
        host[_POSITION, :count] = starts + np.fromiter(
            (row.request.prompt.position_delta for row in rows), np.int64, count
        )
        host[_KV_LEN, :count] = starts + 1
        blocks = [row.request.block_ids[: row.start // self.block_size + 1] for row in rows]
        last = np.fromiter((each[-1] for each in blocks), np.int64, count)
        host[_SLOT, :count] = last * self.block_size + starts % self.block_size
        host[_TOKEN : _POSITION + 1, count:size] = 0
        host[_KV_LEN, count:size] = 1
        host[_SLOT, count:size] = self._spare_slots[count:size]
        self.device.send(host, self._values)
        if token_ids is not None:
            self._values[_TOKEN, :count].copy_(token_ids)
        changed = False
        for place, wanted in enumerate((*blocks, *self._spare_blocks[count:size])):
            if self._blocks[place] != wanted:
                self._blocks[place] = wanted
                self._table[place, : len(wanted)] = wanted
                changed = True
        if changed:
            self.device.send(self._table, self._block_table)
