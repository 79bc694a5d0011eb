"""The prediction's free constants, fitted to published points, and its errors on those and on all others.

published.yaml has the points. Each constant is fitted to one of them, so that the model meets that point exactly:

    node_s      a kernel of a graph (Atlas A2, A3)      the one point whose kernels were counted
    call_s      a kernel that the host launches          300I DUO on one chip: no messages
    efficiency  of the printed rate of large products    TTFT on Atlas 800I A2

Everything else is arithmetic, and every point that no constant was fitted to tests it. Two constants are Atlas A2's and
A3's; call_s is one more, as the 300I DUO decodes without graphs. `two_points` is the fit without it. Computed when
asked, never typed in.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from executor.capacity.chips import Chip, read_chip
from executor.capacity.costs import decode_cost
from executor.capacity.kernels import counts_in_graph
from executor.capacity.products import TypeOf, type_of
from executor.capacity.times import Constants, StepTime, prompts_cost, step_time
from executor.capacity.work import StepCost
from executor.checkpoint.description import FLOAT_TYPE
from executor.recipe.schema import Recipe, build_recipe
from executor.recipe.sizes import ModelShapes
from models.published import published_config
from models.registry import read_shapes

POINTS = Path(__file__).with_name("published.yaml")
FITTED = ("node_s", "call_s", "efficiency")
TWO_POINTS = ("node_s", "efficiency")
Metric = Literal["tpot_ms", "tokens_per_s", "ttft_ms"]
_FIRST = Constants(node_s=0.0, call_s=0.0, efficiency=1.0)
_SMALLEST, _ROUNDS = 1e-4, 60


class Point(BaseModel):
    """One published speed, and what was run. See published.yaml for the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    chip: str
    model: str
    quantization: str
    float_vision: bool = False
    world_size: int
    exe_mode: Literal["eager", "ge_graph"]
    batch: int
    context_tokens: int | None = None  # of decode points
    text_tokens: int | None = None  # of TTFT points, with `pictures`: visual tokens as rows and columns
    pictures: tuple[tuple[int, int], ...] = ()
    kernels_per_layer: int | None
    metric: Metric
    value: float
    fits: Literal["node_s", "call_s", "efficiency"] | None
    source: str
    assumed: str

    @functools.cached_property
    def hardware(self) -> Chip:
        return read_chip(self.chip)

    @functools.cached_property
    def shapes(self) -> ModelShapes:
        return read_shapes(published_config(self.model), self.model)

    @functools.cached_property
    def recipe(self) -> Recipe:
        chip = self.hardware
        dtype = "bfloat16" if "bfloat16" in chip.flops_per_s else "float16"
        model = {
            "model_path": self.model, "device": "npu", "soc": chip.soc, "dtype": dtype, "exe_mode": self.exe_mode,
            "quantization": self.quantization, "kv_cache_dtype": "float",
        }  # fmt: skip
        # Prefill in one step.
        scheduler = {"max_model_len": 32768, "max_num_seqs": self.batch, "max_num_batched_tokens": 32768}
        parallel = {"world_size": self.world_size}
        return build_recipe({"model_config": model, "parallel_config": parallel, "scheduler_config": scheduler})

    def predicted(self, constants: Constants) -> float:
        """What the model says, in the point's unit."""
        seconds = self.time(constants).total_s
        return self.batch / seconds if self.metric == "tokens_per_s" else 1e3 * seconds

    def time(self, constants: Constants) -> StepTime:
        kernel_s = constants.kernel_s(self.exe_mode)
        return step_time(self.cost, self.hardware, self.recipe.model.dtype, constants, kernel_s)

    @functools.cached_property
    def cost(self) -> StepCost:
        """Of what was timed, on one rank."""
        if self.metric == "ttft_ms":
            merge = self.shapes.vision.merge_size
            grids = [(1, rows * merge, columns * merge) for rows, columns in self.pictures]
            return prompts_cost(self.recipe, self.shapes, self.batch, self.text_tokens, grids, self._types())
        cost = decode_cost(self.recipe, self.shapes, self.batch, self.context_tokens, self._types())
        if self.kernels_per_layer is None:
            return cost
        # The program that was measured has other kernels in a layer, and about as many outside of layers.
        layers = self.shapes.num_layers
        more = layers * (self.kernels_per_layer - counts_in_graph(self.recipe, self.shapes).per_layer)
        return replace(cost, kernels=cost.kernels + more)

    def _types(self) -> TypeOf:
        chosen = type_of(self.recipe)
        if not self.float_vision:
            return chosen
        return lambda name: FLOAT_TYPE if name.startswith("model.visual.") else chosen(name)


@dataclass(frozen=True)
class Checked:
    """A point and what the fitted model says of it. `error`: predicted / published - 1, of times (a rate's inverse)."""

    point: Point
    predicted: float
    error: float
    is_fitted: bool


@dataclass(frozen=True)
class Calibration:
    """The constants, and every point with its error."""

    constants: Constants
    points: tuple[Checked, ...]

    @property
    def held_out(self) -> tuple[Checked, ...]:
        return tuple(checked for checked in self.points if not checked.is_fitted)

    @property
    def error(self) -> dict[str, float | None]:
        """The largest error on points that nothing was fitted to, of decode steps and of TTFT; None: there is none."""
        kinds: Mapping[str, bool] = {"decode": False, "ttft": True}
        found = {}
        for kind, is_ttft in kinds.items():
            errors = [abs(each.error) for each in self.held_out if (each.point.metric == "ttft_ms") == is_ttft]
            found[kind] = max(errors, default=None)
        return found


def read_points() -> tuple[Point, ...]:
    """The published points."""
    return tuple(Point.model_validate(entry) for entry in yaml.safe_load(POINTS.read_text(encoding="utf-8")))


def fit(points: tuple[Point, ...], fitted: tuple[str, ...] = FITTED) -> Calibration:
    """Each constant from the point that names it, one after the other until none moves; then every point's error.

    A constant changes only its own kind of time, which grows with it (falls with efficiency): bisection finds it.
    fitted: without call_s it is node_s, and two points are all that anything is fitted to.
    """
    constants = _FIRST
    sources = {name: [point for point in points if point.fits == name] for name in fitted}
    for name, found in sources.items():
        assert len(found) == 1, f"{name} is fitted to {len(found)} points, it takes one"
    for _ in range(4):  # the launches of a prefill are part of what efficiency is fitted to
        for name, (point,) in sources.items():
            constants = _met(point, name, constants)
            if "call_s" not in fitted:
                constants = replace(constants, call_s=constants.node_s)
    checked = (Checked(p, p.predicted(constants), _error(p, constants), p.fits in fitted) for p in points)
    return Calibration(constants, tuple(checked))


def _error(point: Point, constants: Constants) -> float:
    predicted = point.predicted(constants)
    return (point.value / predicted if point.metric == "tokens_per_s" else predicted / point.value) - 1


def _met(point: Point, name: str, constants: Constants) -> Constants:
    """The constants with `name` such that the point is met: its error falls with efficiency, and rises with others."""
    low, high = (_SMALLEST, 1.0) if name == "efficiency" else (0.0, 1e-3)
    sign = -1 if name == "efficiency" else 1
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if sign * _error(point, replace(constants, **{name: middle})) < 0:
            low = middle
        else:
            high = middle
    return replace(constants, **{name: (low + high) / 2})


@functools.cache
def calibrated() -> Calibration:
    """The calibration by all published points, computed once in a process."""
    return fit(read_points())


@functools.cache
def two_points() -> Calibration:
    """The same with two fitted points only: the 300I DUO has no constant of its own, a call there takes node_s."""
    return fit(read_points(), TWO_POINTS)
