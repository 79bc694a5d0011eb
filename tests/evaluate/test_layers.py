"""Differences of hidden states: the numbers by hand, and which stage is named."""

import json
import math

import pytest
import torch

from executor.evaluate.layers import (
    ALLOWED,
    QUANTIZED,
    ROUNDING,
    Differences,
    first_above,
    largest_jump,
    table,
)

STAGES = ("patches", "vision block 0", "layer 0", "layer 1", "final norm")


def states(*errors: float):
    """Hidden states [4, 8] of STAGES, each with this relative error, and those without."""
    exact, wrong = {}, {}
    for stage, error in zip(STAGES, errors, strict=True):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
        exact[stage], wrong[stage] = x, x * (1 + error)
    return wrong, exact


def differences(*errors: float, dtype: str = "float32", **options):
    found = Differences(dtype, **options)
    found.add(*states(*errors))
    return found.stages


def test_the_numbers_are_those_of_all_prompts_together():
    ours, theirs = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [2.0, 1.0]])
    found = Differences("float32")
    found.add({"layer 0": ours[:1]}, {"layer 0": theirs[:1]})
    found.add({"layer 0": ours[1:]}, {"layer 0": theirs[1:]})
    (stage,) = found.stages
    assert found.num_prompts == 2
    assert stage.max_abs == 4.0
    assert stage.relative == pytest.approx(math.sqrt((16 + 4) / (9 + 4 + 1)))
    assert stage.cosine == pytest.approx((9 + 1) / (math.sqrt(26) * math.sqrt(14)))


def test_the_first_stage_above_its_tolerance_is_named():
    stages = differences(1e-8, 1e-6, 1e-2, 2e-2, 1e-2)
    assert [stage.is_above for stage in stages] == [False, False, True, True, True]
    assert first_above(stages).stage == "layer 0"
    assert largest_jump(stages).stage in ("layer 0", "layer 1")
    marked = [line for line in table(stages).splitlines() if "accuracy is lost here" in line]
    assert len(marked) == 1 and marked[0].startswith("layer 0 ")


def test_the_tolerance_is_the_types_and_grows_with_depth():
    for dtype, rounding in ROUNDING.items():
        tolerances = [stage.tolerance for stage in differences(*[0.0] * 5, dtype=dtype)]
        assert tolerances[1:] == [ALLOWED * rounding * math.sqrt(depth) for depth in (1, 2, 3, 4)]
    (_, first, *_) = differences(*[0.0] * 5, dtype="bfloat16", is_quantized=True)
    assert first.tolerance == ALLOWED * QUANTIZED


def test_the_largest_jump_is_over_the_stage_before():
    assert largest_jump(differences(0.9, 0.01, 0.02, 0.5, 0.4)).stage == "layer 1"
    assert largest_jump(differences(*[0.0] * 5)) is None


def test_token_ids_must_be_equal():
    found = Differences("bfloat16")
    found.add({"token ids": torch.tensor([[5], [6]])}, {"token ids": torch.tensor([[5], [7]])})
    assert first_above(found.stages).stage == "token ids"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_above_any_tolerance(value):
    wrong, exact = states(0.0, 0.0, 0.0, 0.0, 0.0)
    wrong["layer 1"][2, 3] = value
    found = Differences("bfloat16", is_quantized=True)
    found.add(wrong, exact)
    assert first_above(found.stages).stage == "layer 1"
    json.dumps([stage.tree() for stage in found.stages], allow_nan=False)


def test_a_reference_of_zeros():
    found = Differences("float32")
    found.add({"layer 0": torch.ones(1, 2), "layer 1": torch.zeros(1, 2)}, dict.fromkeys(STAGES, torch.zeros(1, 2)))
    assert [stage.relative for stage in found.stages] == [math.inf, 0.0]


def test_other_shapes_are_shown_as_such():
    wrong, exact = states(0.0, 0.0, 0.0, 0.0, 0.0)
    wrong["layer 0"] = torch.zeros(3, 8)
    found = Differences("float32")
    found.add(wrong, exact)
    stage = first_above(found.stages)
    assert stage.stage == "layer 0" and stage.tree()["shapes"] == [[3, 8], [4, 8]]
    assert "shapes [3, 8] and [4, 8]" in table(found.stages)


def test_what_one_side_has_not_is_left_out():
    wrong, exact = states(0.0, 0.0, 0.0, 0.0, 0.0)
    del exact["patches"]
    found = Differences("float32")
    found.add(wrong, exact)
    assert [stage.stage for stage in found.stages] == list(STAGES[1:])
    assert found.left_out == ["patches"]
