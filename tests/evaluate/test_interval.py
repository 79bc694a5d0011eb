"""Intervals by hand, from published examples, and by how often they hold what they promise."""

import math
import random
from itertools import product

import pytest

from executor.evaluate.interval import Z95, difference_of, estimate_of, sign_test


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [  # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_score_has_wilsons_interval(right, number, low, high):
    found = estimate_of([1.0] * right + [0.0] * (number - right))
    assert (found.mean, found.num_samples) == (pytest.approx(right / number), number)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_all_right_and_all_wrong_are_mirrored_and_no_certainty():
    right, wrong = estimate_of([1.0] * 7), estimate_of([0.0] * 7)
    assert (right.high, wrong.low) == (1.0, 0.0)
    assert right.low == pytest.approx(1 - wrong.high) and 0.5 < right.low < 1


def test_scores_between_0_and_1_have_the_interval_of_their_mean():
    assert estimate_of([0.25, 0.75] * 50) == estimate_of([0.0, 1.0] * 50)


def test_a_difference_is_that_of_two_added_pairs():
    """Bonett and Price (2012) by hand: n = 30, 8 better, 2 worse."""
    first, second = [0.0] * 8 + [1.0] * 2 + [1.0] * 20, [1.0] * 8 + [0.0] * 2 + [1.0] * 20
    found = difference_of(first, second)
    better, worse = (8 + 1) / 32, (2 + 1) / 32
    reach = Z95 * math.sqrt((better + worse - (better - worse) ** 2) / 32)
    assert (found.mean, found.better, found.worse) == (pytest.approx(0.2), 8, 2)
    assert (found.low, found.high) == (pytest.approx(better - worse - reach), pytest.approx(better - worse + reach))
    mirrored = difference_of(second, first)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_equal_runs_differ_by_nothing_and_not_for_certain():
    found = difference_of([1.0, 0.0, 0.3], [1.0, 0.0, 0.3])
    assert (found.mean, found.better, found.worse, found.p_value, found.is_real) == (0.0, 0, 0, 1.0, False)
    assert found.low == -found.high < 0


def test_a_difference_is_real_where_its_interval_leaves_out_nothing():
    assert difference_of([0.0] * 40, [1.0] * 40).is_real
    assert difference_of([1.0] * 40, [0.0] * 40).is_real
    assert not difference_of([0.0] * 1 + [1.0] * 39, [1.0] * 40).is_real


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (3, 3), (1, 8), (9, 2)])
def test_the_sign_test_counts_all_ways(better, worse):
    """Against every one of the 2^n ways in which samples could have changed."""
    number, few = better + worse, min(better, worse)
    ways = [sum(signs) for signs in product((0, 1), repeat=number)]
    extreme = sum(min(ups, number - ups) <= few for ups in ways)
    assert sign_test(better, worse) == pytest.approx(min(extreme / len(ways), 1.0))


def test_the_sign_test_of_thousands():
    assert sign_test(50_000, 50_000) == pytest.approx(1.0)
    assert 0 <= sign_test(60_000, 40_000) < 1e-12


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """200 samples, the truth known: of 1,000 runs 95 % within 3 points."""
    draw, held, held_difference = random.Random(5), 0, 0
    for _ in range(1000):
        first = [float(draw.random() < 0.85) for _ in range(200)]
        second = [1.0 - score if draw.random() < 0.05 else score for score in first]  # right ones are lost more often
        found = estimate_of(first)
        held += found.low <= 0.85 <= found.high
        difference = difference_of(first, second)
        held_difference += difference.low <= -0.05 * (0.85 - 0.15) <= difference.high
    assert 0.92 <= held / 1000 <= 0.98 and 0.92 <= held_difference / 1000 <= 0.99
