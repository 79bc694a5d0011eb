"""Every recipe in config/: parses, agrees with its chip, divides, fits, and builds on meta at its true degrees."""

from pathlib import Path

import pytest
import torch
import yaml

from executor.checkpoint.load import build_on_meta
from executor.device.table import CHIP_BYTES
from executor.errors import UserError
from executor.parallel.groups import groups
from executor.recipe import settle as checks
from executor.recipe.memory import estimate, weights_bytes
from executor.recipe.schema import Recipe, build_recipe, load_recipe
from executor.recipe.settle import check_chip, check_recipe, resolve
from models.published import published_config
from models.registry import family_runner, read_shapes
from tests.models.test_shapes import SHAPES
from tests.recipe.test_checks import refuse_unsupported
from tests.reference import REPO

RECIPES = sorted(path.name for path in (REPO / "config").glob("*.yaml"))
QUICK = [name for name in RECIPES if name.startswith("quickstart")]
REAL = [name for name in RECIPES if name not in QUICK]
NINE = (
    "qwen2_5_vl_3b",
    "qwen2_5_vl_7b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen3_vl_2b",
    "qwen3_vl_4b",
    "qwen3_vl_8b",
    "qwen3_vl_32b",
    "qwen3_vl_30b_a3b",
)


def model_of(name: str) -> str:
    """The published name of the model whose recipe file this is."""
    path = load_recipe(REPO / "config" / name).model.model_path
    return next(model for model in SHAPES if model in path)


def settled(recipe: Recipe, model: str) -> Recipe:
    named = recipe.model.quantization
    shapes = read_shapes(published_config(model), model)
    return resolve(recipe, shapes, quantization="none" if named == "auto" else named)


def meta_bytes(model: str, tp: int, vision_tp: int) -> int:
    config = published_config(model)
    parallel = groups(tp, tp, 1, "tp" if vision_tp == tp else "data", rank=0, new_group=lambda ranks, buffer_mb: None)
    module = build_on_meta(lambda: family_runner(config).build_model(config, parallel), torch.bfloat16)
    return 2 * sum(parameter.numel() for parameter in module.parameters())


def test_one_recipe_for_each_of_the_nine_models():
    assert {f"{name}.yaml" for name in NINE} <= set(RECIPES)


def test_the_72b_recipe_is_the_one_of_sixteen_dies():
    recipe = load_recipe("config/qwen2_5_vl_72b.yaml")
    assert (recipe.parallel.world_size, recipe.attn_tp_size) == (16, 8)
    assert (recipe.model.soc, recipe.model.dtype, recipe.model.exe_mode) == ("atlas_800i_a3", "bfloat16", "ge_graph")


@pytest.mark.parametrize("name", RECIPES)
def test_its_own_command_stands_in_it(name):
    text = (REPO / "config" / name).read_text()
    assert f"bash infer.sh config/{name}" in text
    assert list(yaml.safe_load(text))[0] == "model_config"


@pytest.mark.parametrize("name", REAL)
def test_chip_degrees_and_memory_agree(name):
    recipe, model = load_recipe(REPO / "config" / name), model_of(name)
    check_chip(recipe)
    recipe = settled(recipe, model)
    shapes = read_shapes(published_config(model), model)
    check_recipe(recipe, shapes)
    memory = estimate(recipe, shapes, CHIP_BYTES[recipe.model.soc])
    assert memory.total_bytes <= memory.budget_bytes


@pytest.mark.parametrize("name", REAL)
def test_builds_on_meta_at_its_degrees(name):
    recipe, model = load_recipe(REPO / "config" / name), model_of(name)
    recipe = settled(recipe, model).replace(model={"quantization": "none", "dtype": "bfloat16", "soc": None})
    tp = recipe.attn_tp_size
    built = meta_bytes(model, tp, tp if recipe.parallel.vision_parallel == "tp" else 1)
    assert weights_bytes(recipe, read_shapes(published_config(model), model)) == built


@pytest.mark.parametrize("vision_parallel", ["tp", "data"])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("model", SHAPES)
def test_weights_of_a_rank_are_what_the_model_holds(model, degree, vision_parallel):
    tree = {
        "model_config": {"model_path": model, "dtype": "bfloat16", "quantization": "none"},
        "parallel_config": {"world_size": degree, "vision_parallel": vision_parallel},
    }
    recipe, shapes = build_recipe(tree), read_shapes(published_config(model), model)
    try:
        check_recipe(recipe, shapes)
    except UserError:
        with pytest.raises(UserError, match="cannot be split"):
            meta_bytes(model, degree, degree if vision_parallel == "tp" else 1)
        return
    built = meta_bytes(model, degree, degree if vision_parallel == "tp" else 1)
    assert weights_bytes(recipe, shapes) == built


@pytest.mark.parametrize("name", QUICK)
def test_quick_starts_are_for_this_release(name):
    recipe = load_recipe(Path("config") / name)
    check_chip(recipe)
    refuse_unsupported(recipe)
    assert recipe.generation.temperature == 0


@pytest.mark.parametrize("name", REAL)
def test_recipes_for_npus_say_what_runs_here(name, monkeypatch):
    recipe = load_recipe(REPO / "config" / name)
    if recipe.model.device != "npu":
        pytest.skip("its backend is here")
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    with pytest.raises(UserError, match="needs torch_npu beside torch") as error:
        refuse_unsupported(recipe)
    # What it says to try is a recipe of this release, but for quantized weights.
    advice = str(error.value).split("Try:")[1].split("--set ")[1:]
    changed = load_recipe(REPO / "config" / name, [override.strip() for override in advice])
    check_chip(changed)
    if changed.model.quantization == "auto":
        refuse_unsupported(changed)
