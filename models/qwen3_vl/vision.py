"""Qwen3-VL's vision encoder: interpolated position embeddings, full attention per frame, DeepStack taps.

Legend: P patches (merge-block order), M = P / merge² visual tokens, n vision hidden size, m text hidden size.
Source: the Qwen3-VL technical report; names of tensors as in the published checkpoints.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from executor.checkpoint.pull import empty, pull_all, whole
from executor.layers.linear import expect_many_rows
from executor.layers.mlp import PlainMLP
from executor.layers.norm import LayerNorm
from executor.layers.vision import (
    Grid,
    VisionAttention,
    encoding_cost,
    frame_lengths,
    patch_embedding,
    patch_positions,
    rotary,
)
from executor.parallel.groups import Group
from models.qwen3_vl.config import VisionConfig

_EPS = 1e-6


class Vision(nn.Module):
    def __init__(self, config: VisionConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, group) for _ in range(config.depth))
        self.merger = Merger(config, group, norm_after_shuffle=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, group, norm_after_shuffle=True) for _ in config.deepstack_layers
        )
        expect_many_rows(self)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """`patches [P, C*tp*p*p]` of all pictures, packed -> `[M, 1 + taps, m]`: embedding, then DeepStack features."""
        x = self.embed(patches, grids)
        place = self.place(x, grids)
        taps = []
        for layer in range(len(self.blocks)):
            x = self.block(layer, x, place)
            if layer in self.tapped_layers:
                taps.append(self.deepstack_merger_list[len(taps)](x))
        return self.gather(self.merger(x), taps, grids)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The layers behind which DeepStack's mergers stand, in their order."""
        return tuple(self.config.deepstack_layers)

    def embed(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """What the first block takes, `[P, n]`."""
        x = self.patch_embed.proj(patches)
        return x + self.pos_embed(grids).to(x.dtype)

    def place(self, x: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor, list[int]]:
        """What all blocks take beside `x [P, n]`: cosines and sines `[P, D]`, and the lengths of the frames."""
        config = self.config
        positions = torch.cat([patch_positions(grid, config.merge_size) for grid in grids]).to(x.device)
        cos, sin = rotary(positions, config.hidden_size // config.num_heads, x.dtype)
        return cos, sin, frame_lengths(grids)

    def block(self, layer: int, x: Tensor, place: tuple[Tensor, Tensor, list[int]]) -> Tensor:
        return self.blocks[layer](x, *place)

    def gather(self, merged: Tensor, taps: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """The encoder's result `[M, 1 + taps, m]` of what its mergers gave, `[M, m]` each."""
        return torch.stack([merged, *taps], dim=1)

    def cost(self, grid: Grid) -> float:
        """Work of one picture or video beside others, for dealing them to ranks."""
        return encoding_cost(grid, self.config.hidden_size, grid[1] * grid[2])


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = patch_embedding(
            config.in_channels, config.temporal_patch_size, config.patch_size, config.hidden_size, bias=True
        )


class PositionEmbedding(nn.Module):
    """The learned square grid of positions, resampled bilinearly (corners aligned) to each picture's grid."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.positions_side
        self.merge = config.merge_size
        self.weight = empty(config.num_positions, config.hidden_size)

    def pulls(self, catalog, prefix):
        yield whole(f"{prefix}.weight", self.weight)

    def forward(self, grids: Sequence[Grid]) -> Tensor:
        """fp32 `[P, n]`."""
        corners = [_corners(grid, self.side, self.merge) for grid in grids]
        index = torch.cat([index for index, _ in corners]).to(self.weight.device)
        weights = torch.cat([weights for _, weights in corners]).to(self.weight.device)
        return (self.weight[index] * weights.unsqueeze(-1)).sum(1)


@lru_cache(maxsize=256)
def _corners(grid: Grid, side: int, merge: int) -> tuple[Tensor, Tensor]:
    """Of every patch: its four neighbours in the learned grid, int64 [P, 4], and their weights, fp32 [P, 4]."""
    t, h, w = grid
    place = patch_positions((1, h, w), merge)
    low, high, share = [], [], []
    for axis, size in enumerate((h, w)):
        at = torch.linspace(0, side - 1, size)[place[:, axis]]
        low.append(at.to(torch.int64))
        high.append((low[-1] + 1).clamp(max=side - 1))
        share.append(at - low[-1])
    rows, columns = (low[0], high[0]), (low[1], high[1])
    row_weights, column_weights = (1 - share[0], share[0]), (1 - share[1], share[1])
    index = torch.stack([r * side + c for r in rows for c in columns], dim=1)
    weights = torch.stack([r * c for r in row_weights for c in column_weights], dim=1)
    return index.repeat(t, 1), weights.repeat(t, 1)


class Block(nn.Module):
    def __init__(self, config: VisionConfig, group: Group) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, _EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, group)
        self.norm2 = LayerNorm(config.hidden_size, _EPS)
        self.mlp = PlainMLP(config.hidden_size, config.intermediate_size, config.hidden_size, group, tanh=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four patches become one visual token: `[P, n] -> [M, m]`. DeepStack's mergers normalise after the shuffle."""

    def __init__(self, config: VisionConfig, group: Group, *, norm_after_shuffle: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_size**2
        self.norm_after_shuffle = norm_after_shuffle
        self.norm = LayerNorm(self.width if norm_after_shuffle else config.hidden_size, _EPS)
        self.mlp = PlainMLP(self.width, self.width, config.out_hidden_size, group, tanh=False)

    def pulls(self, catalog, prefix):
        yield from self.norm.pulls(catalog, f"{prefix}.norm")
        yield from pull_all(self.mlp, catalog, prefix)  # the checkpoint has fc1 and fc2 beside the norm

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_after_shuffle:
            return self.mlp(self.norm(x.view(-1, self.width)))
        return self.mlp(self.norm(x).view(-1, self.width))
