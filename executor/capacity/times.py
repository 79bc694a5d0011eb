"""Predicted times of steps: what a step's cost takes on a chip. Never a measurement.

A step's time is the sum over its parts of the longer of reading and computing, plus kernels, plus messages:

    sum over parts of max(bytes / bandwidth, operations / (rate * efficiency))
    + kernels * (node_s in a graph, call_s eagerly) + sent bytes / link + ring steps * link latency

Three constants are free: they come from executor/capacity/calibrate.py. Bytes pass at the chip's printed bandwidth.
Parts do not hide behind each other. Knows one rank; all ranks of a recipe are as fast as it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from executor.capacity.chips import Chip
from executor.capacity.costs import Grid, Row, prefill_cost, vision_cost
from executor.capacity.kernels import GRAPH_MODES
from executor.capacity.products import TypeOf
from executor.capacity.work import StepCost
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes


@dataclass(frozen=True)
class Constants:
    """What is not printed for a chip. node_s: a kernel of a graph; call_s: an eager kernel, launched by the host;
    efficiency: of the printed rate of products that large products reach."""

    node_s: float
    call_s: float
    efficiency: float

    def kernel_s(self, exe_mode: str) -> float:
        return self.node_s if exe_mode in GRAPH_MODES else self.call_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they are spent on; `parts` of the model, each the longer of reading and computing."""

    parts: Mapping[str, float]
    launching_s: float
    sending_s: float

    @property
    def total_s(self) -> float:
        return sum(self.parts.values()) + self.launching_s + self.sending_s


def step_time(cost: StepCost, chip: Chip, dtype: str, constants: Constants, kernel_s: float) -> StepTime:
    """The time of a step whose floats are of `dtype`, with kernels that take `kernel_s` each beside their work."""
    rate, int8_rate = chip.rate(dtype) * constants.efficiency, chip.flops_per_s.get("int8", 0.0) * constants.efficiency
    parts = {}
    for name, work in cost.parts.items():
        computing = work.flops / rate + (work.int8_flops / int8_rate if work.int8_flops else 0.0)
        parts[name] = max(work.bytes / chip.bandwidth_bytes_per_s, computing)
    sending = cost.collective_bytes / chip.link_bytes_per_s + cost.ring_steps * chip.link_latency_s
    return StepTime(parts, cost.kernels * kernel_s, sending)


@dataclass(frozen=True)
class Times:
    """The steps of a recipe on a chip. `types`: of its linears, where a folder says them; None: the vendor's choice."""

    recipe: Recipe
    shapes: ModelShapes
    chip: Chip
    constants: Constants
    types: TypeOf | None = None

    def prompts(self, count: int, text_tokens: int, grids: Sequence[Grid]) -> StepTime:
        """Of encoding and prefilling `count` equal prompts of one replica: see prompts_cost."""
        return self.of(prompts_cost(self.recipe, self.shapes, count, text_tokens, grids, self.types), "eager")

    def of(self, cost: StepCost, exe_mode: str) -> StepTime:
        return step_time(cost, self.chip, self.recipe.model.dtype, self.constants, self.constants.kernel_s(exe_mode))


PROMPTS_COUNTED = 64


def prompts_cost(
    recipe: Recipe,
    shapes: ModelShapes,
    count: int,
    text_tokens: int,
    grids: Sequence[Grid],
    types: TypeOf | None = None,
) -> StepCost:
    """Encoding and prefilling `count` equal prompts of one replica, in as many steps as the scheduler makes of them.

    grids: of one prompt's pictures, in patches. Of more than PROMPTS_COUNTED prompts, so many are gone through step by
    step, and those after them cost as much again.
    """
    many, rest = divmod(count, PROMPTS_COUNTED)
    if many and count > PROMPTS_COUNTED:
        whole = prompts_cost(recipe, shapes, PROMPTS_COUNTED, text_tokens, grids, types)
        some = [prompts_cost(recipe, shapes, rest, text_tokens, grids, types)] if rest else []
        return sum([_repeated(whole, many), *some], StepCost())
    merge = shapes.vision.merge_size**2
    visual = sum(t * h * w // merge for t, h, w in grids)
    cost = vision_cost(recipe, shapes, [grid for _ in range(count) for grid in grids], types)
    for rows in chunks(count, text_tokens + visual, visual, recipe.scheduler.max_num_batched_tokens):
        cost += prefill_cost(recipe, shapes, rows, types)
    return cost


def _repeated(cost: StepCost, times: int) -> StepCost:
    """The cost of doing something `times` times, of which there may be millions."""
    total = StepCost()
    while times:
        if times % 2:
            total += cost
        cost, times = cost + cost, times // 2
    return total


def chunks(count: int, tokens: int, visual: int, step_tokens: int) -> list[list[Row]]:
    """The prefill steps of `count` prompts of `tokens`, filled in order; pictures' tokens are spread evenly."""
    steps: list[list[Row]] = []
    room = 0
    for _ in range(count):
        done = 0
        while done < tokens:
            if not room:
                steps.append([])
                room = step_tokens
            new = min(room, tokens - done)
            steps[-1].append(Row(new, done, done + new == tokens, round(visual * new / tokens)))
            done, room = done + new, room - new
    return steps
