"""M-RoPE: cosines and sines of a step, merged over (time, height, width) once, for every layer.

Legend: T tokens, D head dim. Angles are computed in fp32 and cast once.
Source: Qwen2-VL (arXiv 2409.12191) for contiguous sections; Qwen3-VL interleaves them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MRope:
    """`sections`: how many of the D/2 frequencies follow time, height and width."""

    head_dim: int
    theta: float
    sections: tuple[int, int, int]
    interleaved: bool

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

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions [3, T]` int64 -> `cos, sin [T, D]`, both halves of D the same angles."""
        device = positions.device
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (self.theta ** (steps / self.head_dim))
        chosen = positions.index_select(0, self.axis_of_frequency().to(device))  # [D/2, T]
        angles = chosen.t().to(torch.float32) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
