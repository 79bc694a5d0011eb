"""Predicted TTFT, TPOT and tokens a second of a recipe under a workload. Never a measurement.

Steps are timed by executor/capacity/times.py with constants that executor/capacity/calibrate.py fits to speeds that
others have published. Requests are equal and follow each other: a replica always has its share of the users, and for
each answer of `output_tokens` it prefills one prompt.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from executor.capacity.calibrate import Calibration, calibrated
from executor.capacity.chips import Chip
from executor.capacity.costs import decode_cost
from executor.capacity.products import TypeOf
from executor.capacity.times import StepTime, Times
from executor.capacity.work import StepCost
from executor.recipe.graph_sizes import graph_shapes, most_inputs
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

DecodeStep = Callable[[int, float], StepCost]
"""The cost on one rank of a decode step of so many rows of one replica, each of so many tokens."""
HOST_ROW_S = 0.72e-3 / 32
"""What a row of a decode step costs on the host while the step waits: docs/serving.md, Measured. There 32 rows took
0.72 ms on two x86 cores with the tiny model; it is taken as growing with the rows. No host of a chip was asked."""


class Asked(Protocol):
    """What is asked of a deployment: `users` requests at once, each of `text_tokens` of text, `pictures` pictures of
    `grid` visual tokens (rows, columns), `prompt_tokens` with all of these, and `output_tokens` of answer."""

    users: int
    text_tokens: int
    pictures: int
    grid: tuple[int, int]
    output_tokens: int

    @property
    def prompt_tokens(self) -> int: ...


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a recipe under a workload; no time here was measured.

    ttft_ms: of a request that comes while the others decode. ttft_all_ms: of the last of all users that come at once.
    tpot_ms: the model's decode step with all users, for each token that it yields; tpot_host_ms: with the host's work
    that a step waits for, and with the prefills of requests that follow each other. tokens_per_s: of answers, of all
    replicas, in that steady state. drafts: verified for a request in a step; step_tokens: tokens that it yields then.
    step: what the decode step costs one rank, which `decode` are the times of.
    """

    ttft_ms: float
    ttft_all_ms: float
    tpot_ms: float
    tpot_host_ms: float
    tokens_per_s: float
    batch: int  # requests of the busiest replica
    replicas: int
    prompt_tokens: int
    drafts: int
    step_tokens: float
    step: StepCost
    decode: StepTime
    prefill: StepTime
    calibration_error: Mapping[str, float | None]  # see Calibration.error

    @cached_property
    def parts_ms(self) -> dict[str, float]:
        """Of a decode step."""
        parts = {name: 1e3 * seconds for name, seconds in self.decode.parts.items()}
        return parts | {"launching": 1e3 * self.decode.launching_s, "sending": 1e3 * self.decode.sending_s}


def predict(
    recipe: Recipe,
    shapes: ModelShapes,
    chip: Chip,
    workload: Asked,
    calibration: Calibration | None = None,
    types: TypeOf | None = None,
    decode_step: DecodeStep | None = None,
) -> Prediction:
    """The speed of a settled recipe (no auto, no null) on `chip`. `types`: see Times.

    decode_step: where a graph was converted (executor/capacity/converted.py); None: by arithmetic and the count table.
    A replica with more users than max_num_seqs answers so many at a time. With plan_config.acceptance_probability every
    step verifies all drafts that speculative_config allows, of every request, and yields those before the first wrong
    one and a token more. Looking drafts up is taken to cost nothing.
    """
    calibration = calibration or calibrated()
    times = Times(recipe, shapes, chip, calibration.constants, types)
    replicas = recipe.parallel.world_size // recipe.attn_tp_size
    batch = min(-(-workload.users // replicas), recipe.scheduler.max_num_seqs)
    merge = shapes.vision.merge_size
    grids = [(1, workload.grid[0] * merge, workload.grid[1] * merge)] * workload.pictures
    visual = workload.pictures * workload.grid[0] * workload.grid[1]
    text = workload.prompt_tokens - visual
    context = workload.prompt_tokens + workload.output_tokens / 2
    probability = recipe.plan.acceptance_probability
    drafts = 0 if probability is None else most_inputs(recipe) - 1
    step_tokens = sum((probability or 0.0) ** count for count in range(drafts + 1))  # 0.0 ** 0 is 1
    if decode_step is None:
        recipe = _run_as(recipe, batch, drafts)
        step = decode_cost(recipe, shapes, batch, context, types, drafts)
    else:
        step = decode_step(batch, context)
    decode = times.of(step, recipe.model.exe_mode)
    prefill = times.prompts(1, text, grids)
    host_s = batch * step_tokens * HOST_ROW_S
    # While a request is answered each of the others of its replica is prefilled once, too.
    token_s = (decode.total_s + host_s) / step_tokens
    answer_s = workload.output_tokens * token_s + batch * prefill.total_s
    waiting_s = decode.total_s if batch > 1 else 0.0
    return Prediction(
        ttft_ms=1e3 * (prefill.total_s + waiting_s),
        ttft_all_ms=1e3 * times.prompts(batch, text, grids).total_s,
        tpot_ms=1e3 * decode.total_s / step_tokens,
        tpot_host_ms=1e3 * answer_s / workload.output_tokens,
        tokens_per_s=min(workload.users, batch * replicas) * workload.output_tokens / answer_s,
        batch=batch,
        replicas=replicas,
        prompt_tokens=workload.prompt_tokens,
        drafts=drafts,
        step_tokens=step_tokens,
        step=step,
        decode=decode,
        prefill=prefill,
        calibration_error=calibration.error,
    )


def _run_as(recipe: Recipe, batch: int, drafts: int) -> Recipe:
    """The recipe in the exe_mode that its decode steps have: eager where no graph holds the drafts of all rows."""
    if not drafts or any(shape.rows >= batch and shape.q_len > drafts for shape in graph_shapes(recipe)):
        return recipe
    return recipe.replace(model={"exe_mode": "eager"})
