"""M-RoPE: cosines and sines of a step, merged over (time, height, width) once, for every layer.

Legend: T tokens, D head dim. Angles are computed in fp32 and cast once.
Source: Qwen2-VL (arXiv 2409.12191) for contiguous sections; Qwen3-VL interleaves them.
"""

from dataclasses import dataclass
from functools import lru_cache

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
        axes, frequencies = _tables(self, positions.device)
        chosen = positions.index_select(0, axes)  # [D/2, T]
        angles = chosen.t().to(torch.float32) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=8)
def _tables(rope: MRope, device: torch.device) -> tuple[Tensor, Tensor]:
    """The axis of each frequency, int64 [D/2], and the frequencies, fp32 [D/2]; made once, not every step."""
    steps = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device=device)
    return rope.axis_of_frequency().to(device), 1.0 / (rope.theta ** (steps / rope.head_dim))
