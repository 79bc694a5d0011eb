"""How sure a score is: 95 % intervals of a mean of scores, and of the difference of two runs over the same samples.

Both are closed formulas without random numbers, so that the same scores always give the same interval. Samples count
as independent: several questions about one picture are not quite, and their interval is then a little too narrow.

estimate: Wilson's interval (1927), which is exact about runs with all or nothing right. It is that of right and wrong
answers; a score between 0 and 1 varies less, so that its interval is a little too wide.
difference: Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of binomial proportions based
on paired data": two made-up pairs are added, one better and one worse by 1. For scores between 0 and 1 the same sums.
p_value: the exact sign test over the samples that changed; for right and wrong answers that is McNemar's exact test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054  # the normal distribution holds 95 % within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """The mean of scores from 0 to 1, and where the mean of endlessly many such samples lies in 95 of 100 cases."""

    mean: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True)
class Difference:
    """How much better the second of two runs is, over the samples that both have answered."""

    mean: float  # from -1 to 1; above 0: the second is better
    low: float
    high: float
    better: int  # samples that the second run has scored higher
    worse: int
    p_value: float  # how often chance alone would give changes as one-sided as these

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def estimate_of(scores: Sequence[float]) -> Estimate:
    """The score of samples, each from 0 to 1. At least one."""
    assert scores and all(0 <= score <= 1 for score in scores)
    number = len(scores)
    mean = math.fsum(scores) / number
    weight = Z95 * Z95 / number
    centre = (mean + weight / 2) / (1 + weight)
    reach = Z95 / (1 + weight) * math.sqrt(mean * (1 - mean) / number + weight / (4 * number))
    low = 0.0 if mean == 0 else max(centre - reach, 0.0)  # exactly, whatever rounding gives
    high = 1.0 if mean == 1 else min(centre + reach, 1.0)
    return Estimate(mean, low, high, number)


def difference_of(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How the second run differs from the first. Both have the scores of the same samples in the same order."""
    assert len(first) == len(second) > 0
    changes = [b - a for a, b in zip(first, second, strict=True)]
    number = len(changes) + 2
    total = math.fsum(changes)
    centre = total / number
    variance = (math.fsum(change * change for change in changes) + 2) / number - centre * centre
    reach = Z95 * math.sqrt(variance / number)
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return Difference(
        mean=total / len(changes),
        low=max(centre - reach, -1.0),
        high=min(centre + reach, 1.0),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided: how likely changes of which as few or fewer go one way are, if both ways are equally likely."""
    number = better + worse
    if number == 0:
        return 1.0
    tail = math.fsum(math.exp(_log_choose(number, k) - number * math.log(2)) for k in range(min(better, worse) + 1))
    return min(2 * tail, 1.0)


def _log_choose(number: int, taken: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(taken + 1) - math.lgamma(number - taken + 1)
