"""Measured against the floor: the least time in which the steps that a run made can be computed at all.

Each step has to read its weights and its part of the cache, and to compute its products: the longer of the two is its
floor (executor/capacity/work.py, StepCost.floor_s), vision passes for themselves. The sum over a run's steps is
compared with its duration, so that the host's work, waiting and a schedule that leaves the device idle all show. Of
several ranks one rank's part; of several replicas the first one's. Types of quantized linears are the vendor's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from executor.bench import probe
from executor.bench.results import Floor
from executor.capacity.chips import chip_of_soc
from executor.capacity.costs import Grid, Row, decode_cost, prefill_cost, vision_cost
from executor.capacity.work import StepCost
from executor.device.table import BACKENDS
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes
from executor.schedule.plan import Plan

MOST_LOOKS = 4


@dataclass(frozen=True)
class Speeds:
    """Of one rank's chip. `origin`: measured or published."""

    origin: str
    bytes_per_s: float
    flops_per_s: float
    int8_flops_per_s: float

    def best(self, other: "Speeds") -> "Speeds":
        """Each speed of the two that is higher."""
        return Speeds(
            self.origin,
            max(self.bytes_per_s, other.bytes_per_s),
            max(self.flops_per_s, other.flops_per_s),
            max(self.int8_flops_per_s, other.int8_flops_per_s),
        )

    def floor_s(self, cost: StepCost) -> float:
        return cost.floor_s(self.bytes_per_s, self.flops_per_s, self.int8_flops_per_s)


class Gauge:
    """The speeds of the chip that a settled recipe computes on, in `dtype`: published ones of an NPU, measured ones of
    this CPU; None of an emulated chip, whose times say nothing."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        model = recipe.model
        self.speeds: Speeds | None = None
        self._dtype = dtype
        self._num_looks = MOST_LOOKS if model.device == "cpu" else 0
        if model.device == "cpu" or BACKENDS[model.device].is_emulated:
            return
        chip = chip_of_soc(model.soc)
        self.speeds = Speeds("published", chip.bandwidth_bytes_per_s, chip.rate(model.dtype), chip.rate("int8"))

    def look(self) -> None:
        """Between two runs: measure a CPU, a few times in all. Whatever else runs on it slows single looks down."""
        if not self._num_looks:
            return
        self._num_looks -= 1
        rates = probe.measure(self._dtype)
        found = Speeds("measured", rates.bytes_per_s, rates.flops_per_s, rates.int8_flops_per_s)
        self.speeds = found if self.speeds is None else self.speeds.best(found)


class StepLog:
    """What the steps of one run compute; is called with the plan of each, and of each row how many tokens it gave.

    Where drafts are verified a row gives several: the floor is of computing those that were right, with the one that
    the step gives anyway.
    """

    def __init__(self) -> None:
        # (rows, tokens of context of all, drafts that were right) -> steps
        self._decodes: dict[tuple[int, int, int], int] = {}
        self._num_yielding = self._num_kept = 0  # of the same steps: rows that gave tokens, and tokens
        self._prefills: list[tuple[Row, ...]] = []
        self._encoded: list[tuple[Grid, ...]] = []
        self.most_rows = 0

    @property
    def tokens_per_row(self) -> float:
        """Of a decode step, on average; 1 without drafts."""
        return self._num_kept / self._num_yielding if self._num_yielding else 1.0

    def __call__(self, plan: Plan, num_kept: Sequence[int]) -> None:
        if plan.encode:
            self._encoded.append(tuple(item.grid_thw for item in plan.encode))
        if not plan.rows:
            return
        self.most_rows = max(self.most_rows, len(plan.rows))
        if plan.rows[-1].num_tokens == 1:  # the longer rows come last
            num_yielding = sum(count > 0 for count in num_kept)
            num_right = sum(num_kept) - num_yielding
            self._num_yielding += num_yielding
            self._num_kept += sum(num_kept)
            key = len(plan.rows), sum(row.start for row in plan.rows) + len(plan.rows), num_right
            self._decodes[key] = self._decodes.get(key, 0) + 1
        else:
            self._prefills.append(tuple(Row(row.num_tokens, row.start, row.max_yield > 0) for row in plan.rows))

    def floors(self, recipe: Recipe, shapes: ModelShapes, speeds: Speeds) -> "Floors":
        """Of all steps; `recipe` is settled."""
        decode_s, num_decodes = 0.0, 0
        for (rows, context, right), steps in self._decodes.items():
            cost = decode_cost(recipe, shapes, rows, context / rows, drafts=right / rows)
            decode_s += steps * speeds.floor_s(cost)
            num_decodes += steps
        prefill_s = sum(speeds.floor_s(prefill_cost(recipe, shapes, rows)) for rows in self._prefills)
        vision_s = sum(speeds.floor_s(vision_cost(recipe, shapes, grids)) for grids in self._encoded)
        return Floors(prefill_s + vision_s, decode_s, num_decodes, self.tokens_per_row)


@dataclass(frozen=True)
class Floors:
    """`prompts_s`: of the steps with prompts and of the encoder's passes. `decode_s`: of all other steps, in which a
    row gave `tokens_per_row`."""

    prompts_s: float
    decode_s: float
    num_decodes: int
    tokens_per_row: float

    @property
    def total_s(self) -> float:
        return self.prompts_s + self.decode_s

    def of_point(self, speeds: Speeds, *, is_one_batch: bool) -> Floor:
        """`is_one_batch`: all requests of the run are prompts first and answers then, so that the steps with prompts
        are what the last first token waits for."""
        return Floor(
            speeds.origin,
            speeds.bytes_per_s,
            speeds.flops_per_s,
            ttft_s=self.prompts_s if is_one_batch else None,
            tpot_s=self.decode_s / self.num_decodes / self.tokens_per_row if self.num_decodes else None,
        )
