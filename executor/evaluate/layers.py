"""Two runs' hidden states beside each other: where, from which stage on, they differ by more than rounding.

Errors are of all prompts together. relative is the length of the difference by that of the reference, ||a-b|| / ||b||.
A stage is judged by its relative error. What rounding brings about grows with the square root of how many stages have
rounded before, which was so on all tiny models; ALLOWED times as much is let through. A stage that is wrong is above it
by far, and so are all behind it.
Knows no model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor.evaluate.capture import PATCHES, PROCESSOR, Hidden

ROUNDING = {"float32": 5e-6, "float16": 5e-4, "bfloat16": 2e-3}
"""The relative error of one stage by rounding alone, by the type of weights or activations."""
QUANTIZED = 1e-2
"""The same with int8 products on either side: also two exact ones round in different places."""
ALLOWED = 8
RESIZED = 2e-2
"""Of patches where the other side resizes with another library: a grey level or two at edges."""


@dataclass(frozen=True)
class StageDifference:
    """`relative` and `cosine` are None where the two sides have different shapes, which `shapes` then names."""

    stage: str
    max_abs: float | None
    relative: float | None
    cosine: float | None
    tolerance: float
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def is_above(self) -> bool:
        return self.relative is None or not self.relative <= self.tolerance  # NaN counts as above

    def tree(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        values = {name: getattr(self, name) for name in ("max_abs", "relative", "cosine")}
        values = {
            name: value if value is None or math.isfinite(value) else str(value) for name, value in values.items()
        }
        return {"stage": self.stage, **values, "tolerance": self.tolerance, "above_tolerance": self.is_above} | (
            {"shapes": [list(shape) for shape in self.shapes]} if self.shapes else {}
        )


class Differences:
    """Adds up prompts.

    `dtype`: the coarser side's. `is_quantized`: a side has quantized weights.
    """

    def __init__(self, dtype: str, *, is_quantized: bool = False) -> None:
        self._rounding = max(ROUNDING[dtype], QUANTIZED if is_quantized else 0.0)
        self._sums: dict[str, _Sums] = {}
        self._left_out: dict[str, None] = {}
        self.num_prompts = 0

    def add(self, ours: Hidden, theirs: Hidden) -> None:
        """One prompt; stages in the order of `ours`. A stage that only one side has is left out."""
        self.num_prompts += 1
        for stage, x in ours.items():
            if stage in theirs:
                self._sums.setdefault(stage, _Sums()).add(x, theirs[stage])
            else:
                self._left_out[stage] = None

    @property
    def stages(self) -> list[StageDifference]:
        found, depth = [], 0
        for stage, sums in self._sums.items():
            depth += stage not in PROCESSOR
            found.append(sums.difference(stage, self._tolerance(stage, depth)))
        return found

    @property
    def left_out(self) -> list[str]:
        """Stages that were not compared for some prompt."""
        return list(self._left_out)

    def _tolerance(self, stage: str, depth: int) -> float:
        """depth: how many stages have rounded, this one among them."""
        if stage in PROCESSOR:
            return RESIZED if stage == PATCHES else 0.0
        return ALLOWED * self._rounding * math.sqrt(depth)


class _Sums:
    def __init__(self) -> None:
        self._max_abs = self._difference = self._ours = self._theirs = self._product = 0.0
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape:
            self._shapes = self._shapes or (tuple(ours.shape), tuple(theirs.shape))
            return
        a, b = ours.double(), theirs.double()
        difference = a - b
        # Not max(): a NaN must stay.
        self._max_abs = float(torch.maximum(torch.tensor(self._max_abs).double(), difference.abs().max()))
        self._difference += float(difference.square().sum())
        self._ours += float(a.square().sum())
        self._theirs += float(b.square().sum())
        self._product += float((a * b).sum())

    def difference(self, stage: str, tolerance: float) -> StageDifference:
        if self._shapes:
            return StageDifference(stage, None, None, None, tolerance, self._shapes)
        # Where the reference is nothing but zeros, all that is not zero is infinitely wrong.
        relative = math.sqrt(self._difference / self._theirs) if self._theirs else math.inf if self._difference else 0.0
        lengths = math.sqrt(self._ours) * math.sqrt(self._theirs)
        cosine = self._product / lengths if lengths else float(self._ours == self._theirs)
        return StageDifference(stage, self._max_abs, relative, cosine, tolerance)


def first_above(stages: Sequence[StageDifference]) -> StageDifference | None:
    """The stage from which on accuracy is lost."""
    return next((stage for stage in stages if stage.is_above), None)


def largest_jump(stages: Sequence[StageDifference]) -> StageDifference | None:
    """The stage at which the relative error grows most over the stage before, the processor's left out."""
    before, found, most = 0.0, None, 0.0
    for stage in stages:
        if stage.stage in PROCESSOR or stage.relative is None:
            continue
        if stage.relative - before > most:
            found, most = stage, stage.relative - before
        before = stage.relative
    return found


def table(stages: Sequence[StageDifference]) -> str:
    """A line for every stage, for people."""
    width = max(len(stage.stage) for stage in stages)
    first = first_above(stages)
    lines = [f"{'stage':<{width}}  {'max abs':>9}  {'relative':>9}  {'cosine':>9}"]
    for stage in stages:
        if stage.shapes:
            numbers = f"shapes {list(stage.shapes[0])} and {list(stage.shapes[1])}"
        else:
            numbers = f"{stage.max_abs:>9.2e}  {stage.relative:>9.2e}  {stage.cosine:>9.6f}"
        mark = f"  <- accuracy is lost here (more than {stage.tolerance:.0e})" if stage is first else ""
        lines.append(f"{stage.stage:<{width}}  {numbers}{mark}")
    return "\n".join(lines)
