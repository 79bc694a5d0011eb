"""M-RoPE: cosines and sines of a step, merged over (time, height, width) once, for every layer.

Legend: T tokens, D head dim. Angles are computed in fp32 and cast once.
Source: Qwen2-VL (arXiv 2409.12191) for contiguous sections; Qwen3-VL interleaves them. YaRN (arXiv 2309.00071) and
linear stretching as transformers' modeling_rope_utils computes them, to the bit.
"""

import math

import torch
from torch import Tensor, nn

from executor.checkpoint.rope import LinearScaling, Rope, YarnScaling
from executor.device import ops


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, fp32 [D/2], fastest first."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32)
    periods = rope.theta ** (steps / head_dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return (1.0 / periods) / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = 1 - _ramp(rope.theta, scaling, head_dim)
        return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return 1.0 / periods


def _ramp(theta: float, yarn: YarnScaling, head_dim: int) -> Tensor:
    """fp32 [D/2]: 0 where a frequency is kept, 1 where it is divided by the factor."""

    def turns_at(turns: float) -> float:
        """The dim (a real number) whose frequency turns so many times within the original length."""
        return head_dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_at(yarn.beta_fast), turns_at(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)


class MRope(nn.Module):
    """`rope.sections`: how many of the D/2 frequencies follow time, height and width."""

    def __init__(self, head_dim: int, rope: Rope, *, interleaved: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope = rope
        self.sections = rope.sections
        self.interleaved = interleaved
        self.magnitude = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
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
        device = ops.bound().device
        self.axes = self.axis_of_frequency().repeat(2).to(device)
        self.frequencies = frequencies(self.rope, self.head_dim).repeat(2).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` int64 `[3, T]`, or `[T]` where the three axes are equal -> `cos, sin [T, D]`."""
        chosen = positions.unsqueeze(-1) if positions.dim() == 1 else positions.index_select(0, self.axes).t()
        angles = chosen.to(torch.float32) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:  # a kernel less where there is nothing to do
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return cos.to(dtype), sin.to(dtype)
