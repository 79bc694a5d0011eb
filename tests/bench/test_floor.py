"""The floor of a run is the sum of its steps' floors."""

import pytest
import torch

from executor.bench import floor, probe
from executor.bench.floor import Gauge, Speeds, StepLog
from executor.capacity.costs import Row, decode_cost, prefill_cost, vision_cost
from executor.recipe.schema import load_recipe
from executor.recipe.settle import prepare
from executor.schedule.plan import Plan
from executor.schedule.plan import Row as PlanRow
from executor.schedule.request import MediaItem
from tests.reference import REPO

SPEEDS = Speeds("measured", 1e9, 1e11, 2e11)


@pytest.fixture(scope="module")
def prepared():
    return prepare(load_recipe(REPO / "config" / "quickstart.yaml"))


def decode(*starts):
    return Plan(tuple(PlanRow(None, start, 1, 1) for start in starts))


def test_steps_add_up(prepared):
    recipe, shapes = prepared.recipe, prepared.shapes
    picture = MediaItem("image", b"a", None, (1, 8, 8), 16)
    log = StepLog()
    log(Plan((PlanRow(None, 9, 1, 1), PlanRow(None, 0, 20, 1), PlanRow(None, 0, 30, 0)), encode=(picture,)), [1, 1, 0])
    for plan in (decode(10, 20), decode(11, 21), decode(12), Plan(())):
        log(plan, [1] * len(plan.rows))
    floors = log.floors(recipe, shapes, SPEEDS)
    prompts = prefill_cost(recipe, shapes, [Row(1, 9), Row(20), Row(30, samples=False)])
    expected = SPEEDS.floor_s(prompts) + SPEEDS.floor_s(vision_cost(recipe, shapes, [(1, 8, 8)]))
    assert floors.prompts_s == pytest.approx(expected)
    steps = [decode_cost(recipe, shapes, 2, 16), decode_cost(recipe, shapes, 2, 17), decode_cost(recipe, shapes, 1, 13)]
    assert floors.decode_s == pytest.approx(sum(map(SPEEDS.floor_s, steps)))
    assert (floors.num_decodes, log.most_rows) == (3, 3)
    told = floors.of_point(SPEEDS, is_one_batch=True)
    assert told.tpot_s == pytest.approx(floors.decode_s / 3) and told.ttft_s == floors.prompts_s
    assert floors.of_point(SPEEDS, is_one_batch=False).ttft_s is None


def test_a_step_with_drafts_gives_the_tokens_that_are_kept(prepared):
    """Its floor is of computing them, shared by those of a row; a row that is computed in vain has none."""
    recipe, shapes = prepared.recipe, prepared.shapes
    log = StepLog()
    log(decode(10, 20), [4, 1])
    log(decode(14, 21), [1, 0])
    assert log.tokens_per_row == 6 / 3
    steps = [decode_cost(recipe, shapes, 2, 16, drafts=1.5), decode_cost(recipe, shapes, 2, 18.5)]
    floors = log.floors(recipe, shapes, SPEEDS)
    assert floors.decode_s == pytest.approx(sum(map(SPEEDS.floor_s, steps)))
    assert floors.of_point(SPEEDS, is_one_batch=True).tpot_s == pytest.approx(floors.decode_s / 2 / 2)


def test_a_decode_step_takes_the_longer_of_reading_and_computing(prepared):
    """At one row the weights' bytes decide, at very slow products these."""
    log = StepLog()
    log(decode(10), [1])
    reading = log.floors(prepared.recipe, prepared.shapes, SPEEDS).decode_s
    cost = decode_cost(prepared.recipe, prepared.shapes, 1, 11)
    assert reading == pytest.approx((cost.weight_bytes + cost.kv_bytes) / 1e9)
    slow = Speeds("measured", 1e9, 1e6, 1e6)
    assert log.floors(prepared.recipe, prepared.shapes, slow).decode_s == pytest.approx(cost.flops / 1e6)


def test_speeds_are_published_ones_of_chips_and_none_of_emulated_ones(prepared):
    model = {"soc": "atlas_800i_a3", "dtype": "bfloat16"}
    chip = Gauge(prepared.recipe.replace(model={**model, "device": "npu"}), None)
    chip.look()
    assert chip.speeds.origin == "published" and chip.speeds.bytes_per_s == 1.6e12
    emulated = Gauge(prepared.recipe.replace(model={**model, "device": "npu_emulated"}), None)
    emulated.look()
    assert emulated.speeds is None


def test_the_best_of_a_few_looks_at_a_cpu_counts(prepared, monkeypatch):
    """What slows one look down slows no other."""
    looks = iter([probe.Rates(2.0, 10.0, 9.0), probe.Rates(1.0, 20.0, 8.0), probe.Rates(3.0, 5.0, 7.0)])
    monkeypatch.setattr(probe, "measure", lambda dtype: next(looks))
    monkeypatch.setattr(floor, "MOST_LOOKS", 3)
    gauge = Gauge(prepared.recipe, torch.float32)
    assert gauge.speeds is None
    for _ in range(5):
        gauge.look()
    assert gauge.speeds == Speeds("measured", 3.0, 20.0, 9.0)


def test_a_probe_reads_and_multiplies(monkeypatch):
    for name, value in (("READ_BYTES", 2**22), ("ROWS", 16), ("SIZE", 256), ("TRY_S", 0.0)):
        monkeypatch.setattr(probe, name, value)
    rates = probe.measure(torch.float32)
    assert all(1e6 < rate < 1e18 for rate in (rates.bytes_per_s, rates.flops_per_s, rates.int8_flops_per_s))
