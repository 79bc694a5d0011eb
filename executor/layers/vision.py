"""What both families' vision encoders share: patch embedding, rotary angles, packed attention.

Legend: P patches (merge-block order: each 2x2 block's four patches stand together), H heads, D head dim, n hidden size.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from executor.device import ops
from executor.layers.linear import Linear, Part
from executor.parallel.groups import Group
from executor.parallel.partition import part

Grid = tuple[int, int, int]  # temporal patches, patch rows, patch columns


def patch_embedding(channels: int, temporal: int, patch: int, hidden_size: int, *, bias: bool) -> Linear:
    """The checkpoint's Conv3d with stride = kernel is one multiplication of flattened patches."""
    file_shape = (hidden_size, channels, temporal, patch, patch)
    return Linear(channels * temporal * patch * patch, hidden_size, bias=bias, file_shape=file_shape)


@lru_cache(maxsize=256)
def patch_positions(grid: Grid, merge: int) -> Tensor:
    """(row, column) of every patch of one picture or video: int64 [P, 2], in merge-block order, on the host."""
    t, h, w = grid
    rows = torch.arange(h)[:, None].expand(h, w)
    columns = torch.arange(w)[None, :].expand(h, w)
    blocks = (h // merge, merge, w // merge, merge)
    pairs = [axis.reshape(blocks).transpose(1, 2).flatten() for axis in (rows, columns)]
    return torch.stack(pairs, dim=-1).repeat(t, 1)


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """2-d rotary angles: `positions [P, 2]` -> `cos, sin [P, D]`: a quarter rows, a quarter columns, and again.

    Where the device computes in wider heads, D is their size, and the padding of both halves does not turn.
    """
    spatial = head_dim // 2
    steps = torch.arange(0, spatial, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (10000.0 ** (steps / spatial))
    angles = (positions.unsqueeze(-1).to(torch.float32) * frequencies).flatten(1)
    angles = F.pad(angles, (0, ops.bound().vision_head_dim(head_dim) // 2 - spatial))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Attention never crosses frames: the number of patches of every frame."""
    return [h * w for t, h, w in grids for _ in range(t)]


def encoding_cost(grid: Grid, hidden_size: int, segment: float) -> float:
    """Work of one picture's layers in multiplications, up to a factor: linears, and attention over `segment` patches.

    A layer's linears hold about 12 n² weights; queries meet keys, and weights meet values, over the segment.
    """
    t, h, w = grid
    return t * h * w * (6 * hidden_size + segment)


def finite(x: Tensor) -> Tensor:
    """fp16 only: what lies beyond its range becomes its largest value; other types hold more than they are given."""
    if x.dtype is not torch.float16:
        return x
    most = torch.finfo(torch.float16).max
    return x.clamp(-most, most)


class VisionAttention(nn.Module):
    """Full attention inside packed segments, `[P, n] -> [P, n]`."""

    def __init__(self, hidden_size: int, num_heads: int, group: Group) -> None:
        super().__init__()
        heads = part(num_heads, group, "vision heads")
        self.head_dim = hidden_size // num_heads
        self.scale = self.head_dim**-0.5
        start, stop = heads.start * self.head_dim, heads.stop * self.head_dim
        parts = tuple(
            Part("qkv", 3 * hidden_size, slice(i * hidden_size + start, i * hidden_size + stop)) for i in range(3)
        )
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=True, shard="out", group=group, parts=parts)
        self.proj = Linear(hidden_size, hidden_size, bias=True, shard="in", group=group)

    def prepare(self) -> None:
        """Widen every head to what the device computes in: zeros after each rotary half. The scale stays."""
        wide = ops.bound().vision_head_dim(self.head_dim)
        if wide == self.head_dim:
            return
        # finalize() calls a module before its children: the linears prepare these widened weights for the device.
        self.qkv.map_dim("out", lambda x: widen(x, self.head_dim, wide))
        self.proj.map_dim("in", lambda x: widen(x, self.head_dim, wide))
        self.head_dim = wide

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        device = ops.bound()
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q, k = device.rope_pair(q, k, cos, sin)
        return self.proj(device.varlen_attention(q, k, v, lengths, self.scale))


def widen(x: Tensor, head_dim: int, wide: int) -> Tensor:
    """Rows of heads `[heads * head_dim, ...]` -> `[heads * wide, ...]`, each head's two halves followed by zeros."""
    halves = x.unflatten(0, (-1, head_dim // 2))
    padding = (0, 0) * (halves.dim() - 2) + (0, (wide - head_dim) // 2)
    return F.pad(halves, padding).flatten(0, 1)
