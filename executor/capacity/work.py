"""What a step costs, in units that any chip has: operations, bytes, kernels, messages. Of one rank; no times.

`Work` is what one part of a step asks of a rank, `StepCost` is the whole step. Both add up, so that a prompt is the sum
of its chunks and of its pictures' passes. Knows no model and no chip.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Work:
    """Of one part of a step on one rank.

    flops: of products whose operands are floats, additions and multiplications counted; int8_flops: of products whose
    operands are both integers. weight_bytes: weights, scales and biases read. kv_bytes: of the cache, read and written.
    activation_bytes: what kernels read and write beside these.
    """

    flops: float = 0.0
    int8_flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in _WORK))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in _WORK))

    @property
    def bytes(self) -> float:
        """Everything that passes between memory and the chip's cores."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


_WORK = tuple(each.name for each in fields(Work))


@dataclass(frozen=True)
class StepCost:
    """Of a whole step on one rank: its parts by name, and what is counted in pieces.

    kernels: of the device, collectives among them. collective_bytes: what a rank sends in all collectives, by rings:
    2 (p - 1) / p of a tensor that p ranks sum, (p - 1) of its own where they gather.
    """

    parts: Mapping[str, Work] = field(default_factory=dict)
    kernels: int = 0
    collectives: int = 0
    collective_bytes: float = 0.0

    def __add__(self, other: "StepCost") -> "StepCost":
        names = dict.fromkeys((*self.parts, *other.parts))
        nothing = Work()
        return StepCost(
            {name: self.parts.get(name, nothing) + other.parts.get(name, nothing) for name in names},
            self.kernels + other.kernels,
            self.collectives + other.collectives,
            self.collective_bytes + other.collective_bytes,
        )

    @property
    def work(self) -> Work:
        """All parts together."""
        return sum(self.parts.values(), Work())

    @property
    def flops(self) -> float:
        return self.work.flops

    @property
    def int8_flops(self) -> float:
        return self.work.int8_flops

    @property
    def weight_bytes(self) -> float:
        return self.work.weight_bytes

    @property
    def kv_bytes(self) -> float:
        return self.work.kv_bytes

    @property
    def activation_bytes(self) -> float:
        return self.work.activation_bytes

    @property
    def bytes(self) -> float:
        return self.work.bytes

    def floor_s(self, bandwidth_bytes_per_s: float, flops_per_s: float, int8_flops_per_s: float) -> float:
        """No program is faster: weights and cache must be read and written, products computed, both at the same time.

        Activations are left out of the bytes: they may stay on the chip. Collectives may hide behind the rest.
        """
        work = self.work
        computing = work.flops / flops_per_s + work.int8_flops / int8_flops_per_s
        return max((work.weight_bytes + work.kv_bytes) / bandwidth_bytes_per_s, computing)
