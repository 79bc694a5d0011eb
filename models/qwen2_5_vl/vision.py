"""Qwen2.5-VL's vision encoder: attention inside windows, and over whole frames in a few layers.

Legend: P patches (merge-block order, then window order inside the encoder), M = P / merge² visual tokens,
n vision hidden size, m text hidden size.
Source: the Qwen2.5-VL technical report (arXiv 2502.13923); names of tensors as in the published checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from executor.device import ops
from executor.layers.linear import Linear, expect_many_rows
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.layers.vision import (
    Grid,
    VisionAttention,
    encoding_cost,
    finite,
    frame_lengths,
    patch_embedding,
    patch_positions,
    rotary,
)
from executor.parallel.groups import Group
from models.qwen2_5_vl.config import VisionConfig

_EPS = 1e-6


@dataclass(frozen=True)
class Place:
    """What the blocks take beside the patches: cosines and sines `[P, D]`, and the lengths of what attends together."""

    cos: Tensor
    sin: Tensor
    frames: list[int]
    windows: list[int]


class Vision(nn.Module):
    def __init__(self, config: VisionConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, group) for _ in range(config.depth))
        self.merger = Merger(config, group)
        expect_many_rows(self)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """`patches [P, C*tp*p*p]` of all pictures, packed -> `[M, 1, m]`."""
        x = self.embed(patches, grids)
        place = self.place(x, grids)
        for layer in range(len(self.blocks)):
            x = self.block(layer, x, place)
        return self.gather(self.merger(x), (), grids)

    tapped_layers = ()  # DeepStack belongs to Qwen3-VL

    def embed(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """What the first block takes, `[P, n]`, in window order."""
        return self._in_windows(self.patch_embed.proj(patches), grids)

    def place(self, x: Tensor, grids: Sequence[Grid]) -> Place:
        """What all blocks take beside `x [P, n]`."""
        config = self.config
        positions = torch.cat([patch_positions(grid, config.merge_size) for grid in grids]).to(x.device)
        cos, sin = rotary(self._in_windows(positions, grids), config.hidden_size // config.num_heads, x.dtype)
        return Place(cos, sin, frame_lengths(grids), self._windows(grids)[1])

    def block(self, layer: int, x: Tensor, place: Place) -> Tensor:
        is_full = layer in self.config.full_attention_layers
        return self.blocks[layer](x, place.cos, place.sin, place.frames if is_full else place.windows)

    def gather(self, merged: Tensor, taps: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """The encoder's result `[M, 1, m]`: what the merger gave, `[M, m]`, in the pictures' own order."""
        order = self._windows(grids)[0].to(merged.device)
        return torch.empty_like(merged).index_copy_(0, order, merged).unsqueeze(1)

    def _windows(self, grids: Sequence[Grid]) -> tuple[Tensor, list[int]]:
        config = self.config
        return window_order(tuple(grids), config.window_size // config.patch_size, config.merge_size)

    def _in_windows(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Rows of patches `[P, ...]` from merge-block order to window order."""
        order = self._windows(grids)[0].to(x.device)
        return x.unflatten(0, (-1, self.config.merge_size**2)).index_select(0, order).flatten(0, 1)

    def cost(self, grid: Grid) -> float:
        """Work of one picture or video beside others, for dealing them to ranks."""
        config = self.config
        whole = len(config.full_attention_layers) / config.depth
        window = (config.window_size // config.patch_size) ** 2
        return encoding_cost(grid, config.hidden_size, whole * grid[1] * grid[2] + (1 - whole) * window)


@lru_cache(maxsize=256)
def window_order(grids: tuple[Grid, ...], window_patches: int, merge: int) -> tuple[Tensor, list[int]]:
    """Visual tokens in window order, int64 [M], and the number of patches of each window, on the host.

    Windows tile each frame from its top left corner; those at the right and bottom edges are smaller.
    """
    side = window_patches // merge
    order, lengths, first = [], [], 0
    for t, h, w in grids:
        index = torch.arange(first, first + t * (h // merge) * (w // merge)).view(t, h // merge, w // merge)
        first += index.numel()
        for frame in index:
            for rows in frame.split(side, dim=0):
                for window in rows.split(side, dim=1):
                    order.append(window.flatten())
                    lengths.append(window.numel() * merge**2)
    return torch.cat(order), lengths


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = patch_embedding(
            config.in_channels, config.temporal_patch_size, config.patch_size, config.hidden_size, bias=False
        )


class Block(nn.Module):
    def __init__(self, config: VisionConfig, group: Group) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, _EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, group)
        self.norm2 = RMSNorm(config.hidden_size, _EPS)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, group, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return finite(x + self.mlp(self.norm2(x)))  # 3B's last block leaves fp16's range


class Merger(nn.Module):
    """Four patches become one visual token: `[P, n] -> [M, m]`."""

    def __init__(self, config: VisionConfig, group: Group) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, _EPS)
        # The checkpoint numbers the two layers of its sequence 0 and 2; 1 is the activation.
        self.mlp = nn.ModuleDict(
            {
                "0": Linear(self.width, self.width, bias=True, shard="out", group=group),
                "2": Linear(self.width, config.out_hidden_size, bias=True, shard="in", group=group),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = ops.bound().gelu(self.mlp["0"](self.ln_q(x).view(-1, self.width)), tanh=False)
        return self.mlp["2"](hidden)
