"""Two runs over the same samples, side by side: both scores, their difference, and the samples that changed.

Rows are paired by the sample's id. Runs over other data sets, by other metrics or with other references cannot be
compared and are refused; other questions (another prompt) can, with a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from executor.errors import UserError
from executor.evaluate.interval import Difference, Estimate, difference_of, estimate_of
from executor.evaluate.runs import Run, ScoredRow, by_label

RIGHT_FROM = 0.5
"""The score from which a sample is called right. Only words: means and intervals take scores as they are."""


@dataclass(frozen=True)
class Pair:
    """One sample in both runs."""

    first: ScoredRow
    second: ScoredRow

    @property
    def labels(self) -> Mapping[str, str]:
        return self.first.labels

    @property
    def change(self) -> float:
        """Above 0: the second run is better."""
        return self.second.score - self.first.score

    @property
    def verdict(self) -> str:
        """better or worse (of the second run), else right or wrong (of both)."""
        if self.change:
            return "better" if self.change > 0 else "worse"
        return "right" if self.first.score >= RIGHT_FROM else "wrong"


@dataclass(frozen=True)
class Contrast:
    """Scores of a set of samples in both runs."""

    first: Estimate
    second: Estimate
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """`pairs` in the order of the first run."""

    first: Run
    second: Run
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    whole: Contrast
    breakdown: dict[str, dict[str, Contrast]]  # by label and value

    def of(self, verdict: str) -> list[Pair]:
        """The pairs of one verdict."""
        return [pair for pair in self.pairs if pair.verdict == verdict]


def compare(first: Run, second: Run) -> Comparison:
    """Pair the samples of two runs. UserError where they are not of the same data set, metric and samples."""
    for key in ("dataset", "metric"):
        values = getattr(first, key), getattr(second, key)
        if values[0] != values[1]:
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: their {key} is {values[0]} and {values[1]}; give "
                "two runs of the same"
            )
    others = {row.id: row for row in second.rows}
    pairs = tuple(Pair(row, others[row.id]) for row in first.rows if row.id in others)
    if not pairs:
        raise UserError(
            f"{first.path} and {second.path} have no sample in common: the first begins with {first.rows[0].id}, the "
            f"second with {second.rows[0].id}"
        )
    _refuse_other_samples(pairs, first, second)
    return Comparison(
        first,
        second,
        pairs,
        tuple(_warnings(pairs, first, second)),
        _contrast(pairs),
        {
            label: {value: _contrast(some) for value, some in values.items()}
            for label, values in by_label(pairs, lambda pair: pair.labels).items()
        },
    )


def _contrast(pairs: Sequence[Pair]) -> Contrast:
    first, second = [pair.first.score for pair in pairs], [pair.second.score for pair in pairs]
    return Contrast(estimate_of(first), estimate_of(second), difference_of(first, second))


def _refuse_other_samples(pairs: Sequence[Pair], first: Run, second: Run) -> None:
    for key in ("references", "media"):
        other = [pair.first.id for pair in pairs if getattr(pair.first, key) != getattr(pair.second, key)]
        if other:
            raise UserError(
                f"{first.path} and {second.path} cannot be compared: {len(other)} samples have other {key} in the one "
                f"than in the other, the first of them {other[0]}; give two runs over the same data"
            )


def _warnings(pairs: Sequence[Pair], first: Run, second: Run) -> list[str]:
    """What a reader must know of the pairs."""
    found = []
    for run in (first, second):
        num_others = len(run.rows) - len(pairs)
        if num_others:
            found.append(f"{_samples(num_others)} of {run.path} left out: not in the other run")
    other = [pair.first.id for pair in pairs if pair.first.question != pair.second.question]
    if other:
        found.append(
            f"{_samples(len(other))} asked in other words in the two runs, such as {other[0]}: the difference is "
            "that of the prompts, too"
        )
    for run, rows in ((first, [pair.first for pair in pairs]), (second, [pair.second for pair in pairs])):
        failed = [row.id for row in rows if row.error is not None]
        if failed:
            found.append(f"{_samples(len(failed))} of {run.path} not answered, counted as 0, such as {failed[0]}")
    return found


def _samples(number: int) -> str:
    return f"{number} sample{'s' if number > 1 else ''}"
