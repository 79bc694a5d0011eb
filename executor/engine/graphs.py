"""Decode steps as graphs of a device: few shapes, inputs that stay in place, requests padded to the next shape.

A graph's rows have one length. A request with fewer tokens stands at the end of its row, as attention wants it: what
fills the row up in front of them are queries further back in the request, whose results nobody reads and whose keys go
to spare slots behind the cache. So a request's tokens see what they see without padding, and nothing else. Only a
request that is shorter than the row stands at its begin: what fills up the rest writes to the request's next slots in
its first block, which are written again before they count. A row without a request reads spare slots.
Legend: R rows of a graph, L tokens of each, T = R * L, W blocks of the longest request.
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
from executor.schedule.plan import GraphShape, Row
from executor.schedule.request import Request

logger = logging.getLogger(__name__)

_TOKEN, _POSITION, _SLOT, _KV_LEN = range(4)  # the order of ModelStep.decode; of lengths one for each row


def needed_shape(rows: Sequence[Row]) -> GraphShape | None:
    """What a graph of these rows must hold. None: they are no decode step, in which each row is the last token of an
    answer under way, with drafts or without, and is sampled from."""
    for row in rows:
        if row.num_tokens != 1 or not row.max_yield or row.start < len(row.request.prompt.token_ids):
            return None
    return GraphShape(len(rows), max((row.num_inputs for row in rows), default=1))


class DecodeGraphs:
    """Replays a captured decode step for batches of rows that go on token by token, with drafts or without."""

    def __init__(
        self,
        step: ModelStep,
        device: Ops,
        mode: str,
        shapes: Sequence[GraphShape],
        num_blocks: int,
        max_model_len: int,
        folder: GraphFolder,
    ) -> None:
        """`num_blocks`: the scheduler's; the cache has `spare_blocks` more. `folder` keeps what is compiled."""
        self.device = device
        self.folder = folder  # claimed as long as the graphs live
        self.shapes = tuple(sorted(set(shapes), key=lambda shape: (shape.num_tokens, shape.q_len)))
        self.block_size = step.block_size
        most_tokens, most_rows = self.shapes[-1].num_tokens, max(shape.rows for shape in shapes)
        width = -(-max_model_len // step.block_size)
        attention = step.model.language_model.layers[0].self_attn
        self._host = np.zeros((4, most_tokens), dtype=np.int64)
        self._table = np.zeros((most_rows, width), dtype=np.int32)
        self._blocks: list[list[int]] = [[] for _ in range(most_rows)]  # what stands in each row of the table
        first_spare = num_blocks * step.block_size
        self._spare_slots = range(first_spare, first_spare + most_tokens)
        self._spare_block = [num_blocks]
        # What a step would have that is the one before, a token further: the graph, where its rows begin, and whose.
        self._expected: tuple[GraphShape | None, list[int], list[Request]] = None, [], []
        for layer in step.kv:  # read before anything is written there
            layer.k[num_blocks:].zero_(), layer.v[num_blocks:].zero_()
        to = device.device
        self._values = torch.from_numpy(self._host).to(to, copy=True)
        self._block_table = torch.from_numpy(self._table).to(to, copy=True)
        width = attention.num_heads * attention.head_dim
        self._q_outs = [torch.zeros(most_tokens, width, dtype=step.dtype, device=to) for _ in step.kv]
        # Views of the first rows of all of them, made once: they are what a replay is given.
        self._inputs = {shape: self._first_rows(shape) for shape in self.shapes}
        self._graphs = {
            shape: device.capture(step.decode, mode, folder.path / f"batch_{shape.rows}_of_{shape.q_len}")
            for shape in self.shapes
        }

    def _first_rows(self, shape: GraphShape) -> tuple[Any, ...]:
        token_ids, positions, slots = self._values[:_KV_LEN, : shape.num_tokens].unbind(0)
        kv_lens, q_outs = self._values[_KV_LEN, : shape.rows], [q_out[: shape.num_tokens] for q_out in self._q_outs]
        return token_ids, positions, slots, kv_lens, self._block_table[: shape.rows], q_outs

    @torch.inference_mode()
    def capture(self) -> None:
        """Make every graph, smallest first, and say how long it took. RuntimeError with the reason where it fails."""
        for number, shape in enumerate(self.shapes, start=1):
            started = time.monotonic()
            self([], shape)
            self.device.synchronize()
            drafts = f", {shape.q_len} tokens each" if shape.q_len > 1 else ""
            seconds = time.monotonic() - started
            logger.info("graph %d of %d, batch %d%s: %.1f s", number, len(self.shapes), shape.rows, drafts, seconds)

    def fitting(self, needed: GraphShape) -> GraphShape | None:
        """The graph with the fewest tokens that holds so many rows of such a length; None: there is none."""
        fit = (shape for shape in self.shapes if shape.rows >= needed.rows and shape.q_len >= needed.q_len)
        return next(fit, None)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row], shape: GraphShape, token_ids: Tensor | None = None) -> Tensor:
        """Logits of the rows' tokens, fp32 [sum of their num_inputs, V]; without padding between them they are the
        graph's own memory, valid until the next step.

        `shape`: of a graph, which holds the rows. `token_ids` int64 [len(rows)]: the rows' tokens, one each, where
        these are on the device only.
        """
        places = self._fill(rows, shape, token_ids)
        lengths = self._host[_KV_LEN, : shape.rows].tolist()
        logits = self._graphs[shape](*self._inputs[shape], lengths)
        if not places or places[-1] == len(places) - 1:
            return logits[: len(places)]
        return logits.index_select(0, self.device.send(np.array(places)))

    def forget(self) -> None:
        """A request has ended: nothing of it is kept."""
        self._expected = None, [], []

    def _fill(self, rows: Sequence[Row], shape: GraphShape, given: Tensor | None) -> Sequence[int]:
        """The step's numbers into the device's buffers: one copy, and one more where a request got a block.

        Returns where in the graph the rows' tokens stand.
        """
        starts, requests = [row[1] for row in rows], [row[0] for row in rows]
        goes_on = shape.q_len == 1 and (shape, starts, requests) == self._expected
        places = self._advance(requests, starts) if goes_on else self._gather(rows, shape, given is not None)
        self._expected = shape, [start + 1 for start in starts], requests
        host, count = self._host, len(places)
        is_dense = not places or places[-1] == count - 1
        if given is None and goes_on:
            host[_TOKEN, :count] = [request.output_token_ids[-1] for request in requests]
        self.device.send(host, self._values)
        if given is not None and is_dense:
            self._values[_TOKEN, :count].copy_(given)
        elif given is not None:
            self._values[_TOKEN].index_copy_(0, self.device.send(np.array(places)), given)
        return places

    def _advance(self, requests: Sequence[Request], starts: Sequence[int]) -> Sequence[int]:
        """The rows of the replay before, each a token further: only who comes into another block has anything new."""
        host, size, changed = self._host, self.block_size, False
        host[_POSITION : _KV_LEN + 1, : len(starts)] += 1
        for place, start in enumerate(starts):
            if start % size == 0:
                blocks = self._blocks[place] = requests[place].block_ids[: start // size + 1]
                host[_SLOT, place] = blocks[-1] * size
                self._table[place, start // size] = blocks[-1]
                changed = True
        if changed:
            self.device.send(self._table, self._block_table)
        return range(len(starts))

    def _gather(self, rows: Sequence[Row], shape: GraphShape, is_given: bool) -> Sequence[int]:
        """The numbers of a step, from its rows alone."""
        q_len, size = shape.q_len, self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kv_lens: list[int] = []
        places: list[int] = []
        blocks: list[list[int]] = []
        for request, start, _, _, _, draft_ids in rows:
            end = start + 1 + len(draft_ids)
            kv_len = max(end, q_len)
            before, after = start - (kv_len - q_len), kv_len - end
            own = request.block_ids[: -(-kv_len // size)]
            if before:
                token_ids += [0] * before
                positions += [0] * before
                slots += self._spare_slots[len(slots) : len(slots) + before]
            places += range(len(slots), len(slots) + end - start)
            token_ids += [0] if is_given else request.token_ids(start, start + 1)
            token_ids += draft_ids
            first = start + request.prompt.position_delta
            positions += range(first, first + end - start)
            slots += [own[place // size] * size + place % size for place in range(start, kv_len)]
            if after:
                token_ids += [0] * after
                positions += [0] * after
            kv_lens.append(kv_len)
            blocks.append(own)
        count, host = len(slots), self._host
        host[:_KV_LEN, :count] = token_ids, positions, slots
        host[_KV_LEN, : len(rows)] = kv_lens
        host[_TOKEN : _POSITION + 1, count : shape.num_tokens] = 0
        host[_SLOT, count : shape.num_tokens] = self._spare_slots[count : shape.num_tokens]
        host[_KV_LEN, len(rows) : shape.rows] = q_len
        self._set_blocks(blocks, shape.rows)
        return places

    def _set_blocks(self, blocks: Sequence[list[int]], num_rows: int) -> None:
        """The blocks of each row of the table; of those without a request the spare one."""
        changed = False
        for place, wanted in enumerate((*blocks, *[self._spare_block] * (num_rows - len(blocks)))):
            if self._blocks[place] != wanted:
                self._blocks[place] = wanted
                self._table[place, : len(wanted)] = wanted
                changed = True
        if changed:
            self.device.send(self._table, self._block_table)
