"""M-RoPE: cosines and sines of a step, merged over (time, height, width) once, for every layer.

Legend: T tokens, D head dim. Angles are computed in fp32 and cast once.
Source: Qwen2-VL (arXiv 2409.12191) for contiguous sections; Qwen3-VL interleaves them.
"""

import torch
from torch import Tensor, nn

from executor.device import ops


class MRope(nn.Module):
    """`sections`: how many of the D/2 frequencies follow time, height and width."""

    def __init__(self, head_dim: int, theta: float, sections: tuple[int, int, int], *, interleaved: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.sections = sections
        self.interleaved = interleaved
        self.axes: Tensor | None = None  # int64 [D], and its frequencies fp32 [D]: both halves of D the same
        self.frequencies: Tensor | None = None

    def axis_of_frequency(self) -> Tensor:
        """int64 [D/2]: 0, 1 or 2 for each frequency.

        Contiguous: t...t h...h w...w. Interleaved: t h w t h w ... until the sections of h and w are used up, then t.
        """
        half = self.head_dim // 2
        if not self.interleaved:
            return torch.repeat_interleave(torch.arange(3), torch.tensor(self.sections))
        axes = torch.zeros(half, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : self.sections[axis] * 3 : 3] = axis
        return axes

    def prepare(self) -> None:
        """Put the tables on the bound device, once."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / (self.theta ** (steps / self.head_dim))
        device = ops.bound().device
        self.axes = self.axis_of_frequency().repeat(2).to(device)
        self.frequencies = frequencies.repeat(2).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` int64 `[3, T]`, or `[T]` where the three axes are equal -> `cos, sin [T, D]`."""
        chosen = positions.unsqueeze(-1) if positions.dim() == 1 else positions.index_select(0, self.axes).t()
        angles = chosen.to(torch.float32) * self.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)
