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
    tpot_ms: the model's decode step with all users; tpot_host_ms: with the host's work that a step waits for, and with
    the prefills of requests that follow each other. tokens_per_s: of answers, of all replicas, in that steady state.
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
    A replica with more users than max_num_seqs answers so many at a time.
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
    step = decode_cost(recipe, shapes, batch, context, types) if decode_step is None else decode_step(batch, context)
    decode = times.of(step, recipe.model.exe_mode)
    prefill = times.prompts(1, text, grids)
    host_s = batch * HOST_ROW_S
    # While a request is answered each of the others of its replica is prefilled once, too.
    step_s = decode.total_s + host_s
    answer_s = workload.output_tokens * step_s + batch * prefill.total_s
    waiting_s = decode.total_s if batch > 1 else 0.0
    return Prediction(
        ttft_ms=1e3 * (prefill.total_s + waiting_s),
        ttft_all_ms=1e3 * times.prompts(batch, text, grids).total_s,
        tpot_ms=1e3 * decode.total_s,
        tpot_host_ms=1e3 * answer_s / workload.output_tokens,
        tokens_per_s=min(workload.users, batch * replicas) * workload.output_tokens / answer_s,
        batch=batch,
        replicas=replicas,
        prompt_tokens=workload.prompt_tokens,
        step=step,
        decode=decode,
        prefill=prefill,
        calibration_error=calibration.error,
    )
