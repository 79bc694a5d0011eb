"""The recipe that is named is the cheapest: no cheaper one that divides holds the demand."""

import shlex

import pytest

from executor.capacity.chips import read_chip
from executor.capacity.choices import precisions, recipe_on, weights_path
from executor.capacity.demand import Demand
from executor.capacity.search import Candidate, asked_again, changes, overrides, search
from executor.errors import UserError
from executor.recipe.schema import build_recipe, load_recipe
from tests.reference import REPO


def recipe(name: str = "qwen3_vl_8b", **sections):
    return load_recipe(REPO / "config" / f"{name}.yaml").replace(**sections)


def test_candidates_come_cheapest_first_and_all_before_the_chosen_one_fail():
    result = search(recipe(), Demand(users=32, text_tokens=8192, tpot_ms=40.0))
    costs = [verdict.candidate.cost for verdict in result.failed]
    assert costs == sorted(costs) and result.chosen.candidate.cost >= costs[-1]
    assert not result.chosen.faults and all(verdict.faults for verdict in result.failed)
    tried = {verdict.candidate.dies for verdict in result.failed}
    assert tried >= set(range(1, result.chosen.candidate.dies))


def test_the_order_of_cost():
    slow, fast, small = read_chip("310p3"), read_chip("a3_die"), read_chip("310p3_24gb")
    ordered = [
        Candidate("310p3_24gb", small, "none", 1, 1),
        Candidate("310p3", slow, "none", 1, 1),
        Candidate("310p3", slow, "w8a8", 1, 1),
        Candidate("a3_die", fast, "none", 1, 1),
        Candidate("310p3_24gb", small, "none", 1, 2),
        Candidate("310p3_24gb", small, "none", 2, 2),
    ]
    assert [each.cost for each in ordered] == sorted(each.cost for each in ordered)


def test_a_wider_bound_is_never_dearer():
    tight, wide = (search(recipe(), Demand(users=16, tpot_ms=bound)).chosen.candidate for bound in (12.0, 60.0))
    assert wide.cost < tight.cost


def test_no_replica_is_without_users():
    result = search(recipe(), Demand(users=2, tpot_ms=0.001))
    assert result.chosen is None
    assert max(verdict.candidate.dies // verdict.candidate.replica_ranks for verdict in result.failed) == 2


def test_a_request_beyond_the_models_own_bound_is_answered_at_once():
    result = search(recipe(), Demand(text_tokens=400_000))
    assert result.chosen is None and len(result.failed) == 1 and "was made for" in result.failed[0].faults[0]


@pytest.mark.parametrize(
    "chip, path, words",
    [
        ("910b4", "Qwen/Qwen3-VL-8B-Instruct", ("none", "w8a8", "w8a8_dynamic")),
        ("310p3", "Qwen/Qwen3-VL-8B-Instruct", ("none", "w8a8", "w8a8_dynamic", "w8a8sc")),
        ("310p3", "Qwen/Qwen3-VL-30B-A3B-Instruct", ("none", "w8a8", "w8a8_dynamic")),
        ("310p3", "models/tiny/qwen3_vl", ("auto",)),
    ],
)
def test_a_chip_takes_what_it_has_products_for(chip, path, words):
    assert precisions(read_chip(chip), path) == words


@pytest.mark.parametrize(
    "path, own, word, wanted",
    [
        ("/data/Qwen3-VL-8B-Instruct", "auto", "none", "/data/Qwen3-VL-8B-Instruct"),
        ("/data/Qwen3-VL-8B-Instruct", "auto", "w8a8", "weights/Qwen3-VL-8B-Instruct-w8a8"),
        ("Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-QuaRot", "w8a8", "w8a8", "Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-QuaRot"),
        ("Eco-Tech/Qwen3-VL-8B-Instruct-w8a8-QuaRot", "w8a8", "none", "Qwen/Qwen3-VL-8B-Instruct"),
        ("./weights/Qwen3-VL-8B-Instruct-w8a8sc-tp2", "w8a8sc", "w8a8sc", "weights/Qwen3-VL-8B-Instruct-w8a8sc-tp4"),
        ("models/tiny/qwen3_vl", "auto", "auto", "models/tiny/qwen3_vl"),
    ],
)
def test_where_weights_lie(path, own, word, wanted):
    model = build_recipe({"model_config": {"model_path": path, "quantization": own}}).model
    assert weights_path(model, word, ranks=4) == wanted


def test_a_recipe_on_a_chip_keeps_what_the_chip_does_not_decide():
    base = recipe(scheduler={"max_num_batched_tokens": 4096, "num_blocks": 100}, data={"max_pixels": 1024 * 1024})
    moved = recipe_on(base, read_chip("310p3"), "w8a8", max_model_len=2048)
    assert moved.model.exe_mode == "eager" and moved.model.soc == "atlas_300i_duo" and moved.model.dtype == "auto"
    assert moved.scheduler.max_num_batched_tokens == 4096 and moved.scheduler.num_blocks is None
    assert moved.scheduler.max_model_len == 2048 and moved.data == base.data


def test_changes_are_what_has_to_be_typed():
    before = recipe("quickstart")
    assert changes(before, before) == {} and overrides({}) == ""
    after = before.replace(plan={"picture_size": (640, 480), "chip": "a b"}, scheduler={"num_blocks": 3})
    changed = changes(before, after)
    assert changed == {
        "scheduler_config.num_blocks": 3,
        "plan_config.chip": "a b",
        "plan_config.picture_size": [640, 480],
    }
    _, *words = shlex.split(overrides(changed))
    assert load_recipe(REPO / "config" / "quickstart.yaml", words) == after


def test_the_named_recipe_asks_the_same_again():
    demand = Demand(users=24, pictures=2, picture_size=(1280, 720), text_tokens=500, tpot_ms=60.0)
    result = search(recipe(), demand)
    again = asked_again(result.chosen, result.workload, demand.picture_size)
    assert (again.plan.users, again.plan.pictures, again.plan.picture_size) == (24, 2, (1280, 720))
    assert again.plan.demand is None and again.plan.chip == result.chosen.candidate.chip_name


def test_the_recipes_chip_and_the_named_type_bind_the_search():
    assert search(recipe(plan={"chip": "910b4"}), Demand(users=1)).chosen.candidate.chip_name == "910b4"
    with pytest.raises(UserError, match="leave out one of them"):
        search(recipe(plan={"chip": "910b4"}), Demand(users=1, soc="atlas_800i_a3"))
    with pytest.raises(UserError, match="takes bfloat16 weights"):
        search(recipe(), Demand(users=1, quantization="none", float_type="bfloat16", chip="310p3"))
