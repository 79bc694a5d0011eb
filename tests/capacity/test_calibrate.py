"""The fit on published points: few constants, met where they are fitted, and their true errors everywhere else."""

import re

import pytest

from executor.capacity.calibrate import FITTED, Calibration, calibrated, fit, read_points
from tests.reference import REPO

MOST_DECODE, MOST_TTFT = 0.10, 0.20


def test_every_constant_is_fitted_to_one_point_and_the_others_test_it():
    points = read_points()
    assert sorted(point.fits for point in points if point.fits) == sorted(FITTED)
    found = calibrated()
    fitted = [each for each in found.points if each.is_fitted]
    assert len(fitted) == 3 and len(found.held_out) == len(points) - 3 == 5
    for each in fitted:
        assert each.error == pytest.approx(0, abs=1e-6)
        assert each.predicted == pytest.approx(each.point.value, rel=1e-6)


def test_errors_on_points_that_nothing_was_fitted_to():
    """The figures that a plan is asked to reach; both kinds have points on two kinds of chip."""
    found = calibrated()
    assert found.error["decode"] == max(abs(x.error) for x in found.held_out if x.point.metric != "ttft_ms")
    assert found.error["decode"] <= MOST_DECODE
    assert found.error["ttft"] <= MOST_TTFT
    assert {each.point.hardware.soc for each in found.held_out} == {"atlas_800i_a3", "atlas_300i_duo"}


def test_two_points_alone_give_nearly_the_same():
    """Without a constant of its own for the 300I DUO its steps come out too short."""
    two, three = fit(read_points(), ("node_s", "efficiency")), calibrated()
    assert sum(each.is_fitted for each in two.points) == 2
    assert two.constants.call_s == two.constants.node_s
    assert two.constants.node_s == pytest.approx(three.constants.node_s)
    assert MOST_DECODE < two.error["decode"] < 0.15 and two.error["ttft"] <= MOST_TTFT


def test_constants_are_of_a_size_that_such_things_have():
    constants = calibrated().constants
    assert 3e-6 < constants.node_s < constants.call_s < 50e-6
    assert 0.1 < constants.efficiency < 0.9


def test_an_error_is_of_times_for_rates_as_well():
    found = calibrated()
    rate = next(each for each in found.held_out if each.point.metric == "tokens_per_s")
    assert rate.error == pytest.approx(rate.point.value / rate.predicted - 1)
    assert (rate.predicted > rate.point.value) == (rate.error < 0), "more tokens a second are shorter steps"


def test_a_point_of_another_value_moves_its_constant_alone():
    points = read_points()
    moved = tuple(point.model_copy(update={"value": 12.0}) if point.fits == "node_s" else point for point in points)
    before, after = calibrated().constants, fit(moved).constants
    assert after.node_s > before.node_s
    assert (after.call_s, after.efficiency) == (before.call_s, before.efficiency)


def test_without_points_to_test_on_there_is_no_error():
    found = calibrated()
    assert Calibration(found.constants, ()).error == {"decode": None, "ttft": None}


def test_every_point_says_where_it_is_from_and_what_it_assumes():
    for point in read_points():
        assert point.source and point.assumed
        assert (point.context_tokens is None) == (point.metric == "ttft_ms") == bool(point.pictures)


def test_the_page_has_the_errors_of_this_fit():
    """docs/plan.md: every point, and the errors in its text."""
    page = (REPO / "docs" / "plan.md").read_text()
    rows = re.findall(r"^\| ((?:A2|A3|300I DUO), .*?) \| ([\d.]+) .*? \| ([\d.]+) .*? \| (.*?) \|$", page, re.MULTILINE)
    found = calibrated()
    assert [row[0] for row in rows] == [each.point.name for each in found.points]
    for (_, published, predicted, error), each in zip(rows, found.points, strict=True):
        assert float(published) == each.point.value
        assert float(predicted) == pytest.approx(each.predicted, rel=1e-3)
        assert error == ("fitted" if each.is_fitted else f"{100 * each.error:+.1f} %")
    two = fit(read_points(), ("node_s", "efficiency"))
    for errors in (found.error, two.error):
        for error in errors.values():
            assert f"{100 * error:.1f} %" in page
