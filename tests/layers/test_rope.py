"""Which axis each rotary frequency follows, against the definitions in the two papers."""

import torch

from executor.checkpoint.rope import Rope
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.layers.rope import MRope


def test_contiguous_sections():
    axes = MRope(128, Rope(1e6, (16, 24, 24)), interleaved=False).axis_of_frequency().tolist()
    assert axes == [0] * 16 + [1] * 24 + [2] * 24


def test_interleaved_sections():
    axes = MRope(128, Rope(5e6, (24, 20, 20)), interleaved=True).axis_of_frequency().tolist()
    assert axes == [0, 1, 2] * 20 + [0] * 4
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]


def test_equal_axes_are_plain_rope():
    """A text token's three positions are equal: sections must not matter."""
    positions = torch.arange(50).expand(3, 50)
    plain = torch.outer(torch.arange(50.0), 1e4 ** (-torch.arange(0, 128, 2) / 128))
    ops.bind(CpuOps())
    for interleaved, sections in ((False, (16, 24, 24)), (True, (24, 20, 20))):
        rope = MRope(128, Rope(1e4, sections), interleaved=interleaved)
        rope.prepare()
        cos, sin = rope(positions, torch.float32)
        torch.testing.assert_close(cos, torch.cat((plain, plain), -1).cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin, torch.cat((plain, plain), -1).sin(), atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(rope(positions[0], torch.float32), (cos, sin), strict=True))
