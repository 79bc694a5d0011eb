"""A model at its true size on meta tensors: what its steps call, what their graphs hold. Costs no memory.

Works on a model that was built on the meta device and finalised on the bound NPU backend, whose device is meta too.
Knows no recipe and no family beyond the attributes that every family's model has.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emulator import graph
from emulator.graph import Graph
from emulator.record import Recorder
from executor.device.npu.graph import configure
from executor.device.npu.ops import NpuOps
from executor.engine.step import ModelStep, Visual, cache_scales
from executor.layers.vision import Grid


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Traces:
    """Traces a model: `batch` rows of a decode step, `blocks` of the longest request, `block_size` tokens each."""

    model: nn.Module
    device: NpuOps
    dtype: torch.dtype
    batch: int
    blocks: int
    block_size: int

    @property
    def num_layers(self) -> int:
        return len(self.model.language_model.layers)

    def decode_graph(self, layers: int | None = None, *, q_len: int = 1) -> Graph:
        """The decode step of the first `layers` (None: all) as the GE graph that the backend has made. `q_len`: tokens
        of each row, 1 without drafts."""
        with self._only(layers) as step:
            return graph.convert(step.decode, *self._decode_arguments(step, q_len), configure=configure)

    def decode_calls(self, layers: int | None = None, *, tensors: bool, q_len: int = 1) -> Recorder:
        """The calls of an eager decode step; `tensors`: with lengths as tensors, as in a graph."""
        with self._only(layers) as step:
            if tensors:
                return _recorded(step.decode, self._decode_arguments(step, q_len))
            lengths = [q_len] * self.batch, [self.blocks * self.block_size] * self.batch
            return _recorded(step, self._arguments(*lengths, num_sampled=q_len * self.batch))

    def prefill_calls(self, tokens: int, longest: int, visual_tokens: int) -> Recorder:
        """The calls of a prefill step of `tokens`, in requests of at most `longest`, some of them visual."""
        lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)]
        with self._only(None) as step:
            return _recorded(step, self._arguments(lengths, lengths, min(visual_tokens, tokens)))

    def vision_calls(self, grid: Grid) -> Recorder:
        """The calls of encoding one picture of this grid of patches."""
        vision = self.model.visual.config
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = _meta(grid[0] * grid[1] * grid[2], size, dtype=self.dtype)
        return _recorded(self.model.encode, (patches, [grid]))

    def vision_block_graph(self, patches: int) -> Graph:
        """One vision block over a picture of `patches` as a GE graph, for its count; vision itself runs eagerly."""
        block, width = self.model.visual.blocks[0], self.model.visual.config.hidden_size
        turn = _meta(patches, block.attn.head_dim, dtype=self.dtype)
        return graph.convert(block, _meta(patches, width, dtype=self.dtype), turn, turn, [patches], configure=configure)

    @contextlib.contextmanager
    def _only(self, layers: int | None) -> Iterator[ModelStep]:
        """The step of a model that for now has only its first layers."""
        text = self.model.language_model
        every = text.layers
        text.layers = every[:layers]
        attention = every[0].self_attn
        try:
            kv = self.device.kv_cache(
                len(text.layers), self.batch * self.blocks, self.block_size, attention.num_kv_heads,
                attention.head_dim, self.dtype, normed=attention.q_norm is not None, scales=cache_scales(self.model),
            )  # fmt: skip
            yield ModelStep(self.model, kv, self.block_size, self.dtype)
        finally:
            text.layers = every

    def _decode_arguments(self, step: ModelStep, q_len: int) -> tuple[Any, ...]:
        attention, tokens = step.model.language_model.layers[0].self_attn, q_len * self.batch
        width = attention.num_heads * attention.head_dim
        q_outs = [_meta(tokens, width, dtype=self.dtype) for _ in step.kv]
        table = _meta(self.batch, self.blocks, dtype=torch.int32)
        return *(_meta(tokens) for _ in range(3)), _meta(self.batch), table, q_outs

    def _arguments(
        self, q_lens: list[int], kv_lens: list[int], visual_tokens: int = 0, num_sampled: int | None = None
    ) -> tuple[Any, ...]:
        """What ModelStep takes for rows of these lengths; `num_sampled`: tokens whose logits are wanted, None: one of
        each row."""
        tokens = sum(q_lens)
        visual = None
        if visual_tokens:
            width = 1 + self.model.num_taps
            features = _meta(visual_tokens, width, self.model.config.text.hidden_size, dtype=self.dtype)
            visual = Visual(_meta(visual_tokens), features)
        tables = [range(-(-length // self.block_size)) for length in kv_lens]
        attention = self.device.prepare_attention(q_lens, kv_lens, tables, self.block_size)
        slots = _meta(tokens, dtype=self.device.slot_dtype)
        return _meta(tokens), _meta(3, tokens), slots, attention, _meta(num_sampled or len(q_lens)), visual


def _recorded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Recorder:
    with Recorder(check="collect") as recorded, torch.inference_mode():
        function(*arguments)
    return recorded
