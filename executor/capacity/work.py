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

    kernels: of the device, collectives among them. Collectives go by rings: `collective_bytes` is what a rank sends in
    all of them, 2 (p - 1) / p of a tensor that p ranks sum and (p - 1) times its own where they gather; `ring_steps`
    is how often it waits for its neighbour, 2 (p - 1) and p - 1.
    """

    parts: Mapping[str, Work] = field(default_factory=dict)
    kernels: int = 0
    collectives: int = 0
    collective_bytes: float = 0.0
    ring_steps: int = 0

    def __add__(self, other: "StepCost") -> "StepCost":
        names = dict.fromkeys((*self.parts, *other.parts))
        nothing = Work()
        return StepCost(
            {name: self.parts.get(name, nothing) + other.parts.get(name, nothing) for name in names},
            self.kernels + other.kernels,
            self.collectives + other.collectives,
            self.collective_bytes + other.collective_bytes,
            self.ring_steps + other.ring_steps,
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


@dataclass(frozen=True)
class Messages:
    """Collectives of a step: how many, what a rank sends in them, and the steps of their rings."""

    count: int = 0
    bytes: float = 0.0
    ring_steps: int = 0

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(self.count + other.count, self.bytes + other.bytes, self.ring_steps + other.ring_steps)

    def __mul__(self, times: int) -> "Messages":
        return Messages(self.count * times, self.bytes * times, self.ring_steps * times)

    def cost(self, parts: Mapping[str, Work], kernels: int) -> StepCost:
        """The step of these parts and messages."""
        return StepCost(parts, kernels, self.count, self.bytes, self.ring_steps)


def summed(num_bytes: float, ranks: int) -> Messages:
    """All of `ranks` have the sum of a tensor; none where there is one."""
    return Messages(1, 2.0 * (ranks - 1) / ranks * num_bytes, 2 * (ranks - 1)) if ranks > 1 else Messages()


def gathered(num_bytes: float, ranks: int) -> Messages:
    """All of `ranks` have every rank's tensor, each of `num_bytes`."""
    return Messages(1, float((ranks - 1) * num_bytes), ranks - 1) if ranks > 1 else Messages()
