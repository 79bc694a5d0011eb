"""One step of the model as a function of tensors: what runs eagerly, and what a device makes a graph of.

Legend: T tokens of the step, R rows, P visual tokens, n hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from executor.device import ops
from executor.device.ops import KVLayer, KVScales
from executor.engine.forward import DeepStack, ForwardMeta


@dataclass(frozen=True)
class Visual:
    """The visual tokens of a step: where they stand, int64 [P], and what they are, [P, 1 + taps, n]."""

    index: Tensor
    features: Tensor


def cache_scales(model: nn.Module) -> list[KVScales]:
    """Of every layer's int8 cache; none where the cache is float."""
    found = (layer.self_attn.cache_scales for layer in model.language_model.layers)
    return [scales for scales in found if scales is not None]


class ModelStep(nn.Module):
    """A model over its cache. `decode` is `forward` for rows of one length, all in tensors of fixed shape."""

    def __init__(self, model: nn.Module, kv: list[KVLayer], block_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.kv = kv
        self.block_size = block_size
        self.dtype = dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        attention: Any,
        select: Tensor | None = None,
        visual: Visual | None = None,
        padded_tokens: int | None = None,
    ) -> Tensor:
        """`token_ids [T]`, `positions [3, T]` or `[T]`, `slots [T]` -> fp32 logits of `select [R]`, or of all.

        `padded_tokens`: see ForwardMeta.
        """
        return self.model(*self._opened(token_ids, positions, slots, attention, select, visual, padded_tokens))

    def hidden(self, *inputs: Any) -> Tensor:
        """Of the arguments of `forward` what the head multiplies: `[R, n]`."""
        return self.model.language_model(*self._opened(*inputs))

    def _opened(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        attention: Any,
        select: Tensor | None,
        visual: Visual | None,
        padded_tokens: int | None,
    ) -> tuple[Tensor, ForwardMeta]:
        """Embeddings `[T, n]`, pictures' among them, and what goes with them."""
        embeddings = self.model.embed(token_ids)
        deepstack = None
        if visual is not None:
            embeddings.index_copy_(0, visual.index, visual.features[:, 0])  # the lookup's own tensor
            if self.model.num_taps:
                deepstack = DeepStack(visual.index, visual.features[:, 1:])
        cos, sin = self.model.rope(positions, self.dtype)
        return embeddings, ForwardMeta(cos, sin, slots, attention, self.kv, select, deepstack, padded_tokens)

    def decode(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_lens: Tensor | Sequence[int],
        block_table: Tensor,
        q_outs: Sequence[Tensor],
    ) -> Tensor:
        """The last T / R tokens of each of R rows: `token_ids`, `positions`, `slots` `[T]`, `kv_lens` `[R]`,
        `block_table` int32 `[R, blocks]` -> fp32 logits `[T, V]`.

        `q_outs`: for each layer `[T, H * D]`, scratch that stays in place; one for all would be copied between layers.
        """
        q_len = len(token_ids) // len(block_table)
        attention = ops.bound().static_attention(q_len, kv_lens, block_table, self.block_size)
        kv = [KVLayer(layer.k, layer.v, q_out, layer.scales) for layer, q_out in zip(self.kv, q_outs, strict=True)]
        cos, sin = self.model.rope(positions, self.dtype)
        return self.model(self.model.embed(token_ids), ForwardMeta(cos, sin, slots, attention, kv, None))
