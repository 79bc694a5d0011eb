"""Int8 keys and values on a CPU: quantized when they are written, scaled outside of attention when they are read.

A scale belongs to a channel, and attention is linear in every channel of a value and of a query: so the scales of keys
are multiplied onto the queries and those of values onto the result, once a step, and no pass over the cached tokens
is needed for either. The offset of a key shifts all scores of a query alike, which softmax does not see: it is left
out. Those of values are subtracted, whole numbers of at most 255 that every float type holds exactly.
Legend: T tokens, H query heads, K key/value heads, D head dim, L cached tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from executor.device.ops import KVScales


@dataclass(eq=False)
class RowBuffer:
    """Memory that the rows of all layers are copied to, one after the other. Not for several threads.

    A tensor of its own for each copy is new pages each time, which take longer than the attention over it.
    """

    memory: Tensor = field(default_factory=lambda: torch.empty(0))

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Contiguous, of any content; valid until the next call."""
        size = math.prod(shape)
        if self.memory.numel() < size or self.memory.dtype != dtype:
            self.memory = torch.empty(size, dtype=dtype)
        return self.memory[:size].view(shape)

    def filled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x [rows, K, L, D]`, int8, in `dtype`; valid until the next call."""
        return self.take(x.transpose(1, 2).shape, dtype).transpose(1, 2).copy_(x)


@dataclass(frozen=True, eq=False)
class Int8Cache:
    """One layer's scales for a model that computes in `dtype`."""

    given: KVScales
    dtype: torch.dtype
    v_offset: Tensor | None  # [K, 1, D] in dtype; None where all are zero
    buffers: tuple[RowBuffer, RowBuffer]  # of keys and values

    @staticmethod
    def of(scales: KVScales, dtype: torch.dtype, buffers: tuple[RowBuffer, RowBuffer]) -> "Int8Cache":
        offset = scales.v_offset.to(dtype).unsqueeze(1)
        return Int8Cache(scales, dtype, offset if bool(scales.v_offset.any()) else None, buffers)

    def quantized(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, K, D]` each, as int8."""
        given = self.given
        return quantize(k, given.k_scale, given.k_offset), quantize(v, given.v_scale, given.v_offset)

    def scaled_queries(self, q: Tensor) -> Tensor:
        """`[T, H, D]`: times the scales of the keys they meet."""
        num_kv_heads = len(self.given.k_scale)
        grouped = q.unflatten(1, (num_kv_heads, -1)).float() * self.given.k_scale.unsqueeze(1)
        return grouped.flatten(1, 2).to(self.dtype)

    def widened(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows, K, L, D]` as whole numbers in the type that attention computes in.

        Valid until the next call.
        """
        k, v = (buffer.filled(x, self.dtype) for buffer, x in zip(self.buffers, (k, v), strict=True))
        return k, v if self.v_offset is None else v.sub_(self.v_offset)

    def scaled_values(self, out: Tensor) -> Tensor:
        """`[T, H * D]`, the mean of whole numbers: times the scales of the values."""
        num_kv_heads, dim = self.given.v_scale.shape
        grouped = out.unflatten(1, (num_kv_heads, -1, dim)).float() * self.given.v_scale.unsqueeze(1)
        return grouped.flatten(1).to(self.dtype)


def quantize(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """`clamp(round(x / scale + offset), -128, 127)` as int8, in float32."""
    return (x.float() / scale).add_(offset).round_().clamp_(-128, 127).to(torch.int8)
