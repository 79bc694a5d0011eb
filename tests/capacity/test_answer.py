"""Which chip a recipe is planned on, and what its linears are."""

from pathlib import Path

import pytest

from executor.capacity.answer import described_types, settled
from executor.capacity.chips import DEFAULT_CHIPS, read_chip
from executor.checkpoint.description import Description, read_description
from executor.device.table import CHIP_BYTES
from executor.errors import UserError
from executor.recipe.schema import load_recipe
from tests.reference import REPO


def recipe(name: str, **sections):
    return load_recipe(REPO / "config" / f"{name}.yaml").replace(**sections)


@pytest.mark.parametrize("soc", DEFAULT_CHIPS)
def test_without_a_word_it_is_the_chip_of_the_recipes_soc(soc):
    deployment, chip = settled(recipe("qwen3_vl_8b", model={"soc": soc, "dtype": "auto", "exe_mode": "eager"}))
    assert chip == read_chip(DEFAULT_CHIPS[soc]) and deployment.free_bytes == CHIP_BYTES[soc]
    assert deployment.process_bytes == 0


def test_the_named_chip_wins_and_brings_its_memory():
    deployment, chip = settled(recipe("qwen3_vl_8b", plan={"chip": "910b4_32gb"}))
    assert chip.name.startswith("Ascend 910B4, 32 GB") and deployment.free_bytes == 32 << 30


def test_a_recipe_for_the_emulator_is_the_chips():
    emulated = {"device": "npu_emulated", "soc": "atlas_800i_a3", "dtype": "auto"}
    deployment, chip = settled(recipe("quickstart", model=emulated))
    assert chip.soc == "atlas_800i_a3" and deployment.recipe.model.device == "npu"


def test_without_a_chip_it_is_this_machine():
    deployment, chip = settled(recipe("quickstart"))
    assert chip is None and deployment.recipe.model.device == "cpu" and deployment.process_bytes > 0


@pytest.mark.parametrize("device", ["npu", "cuda"])
def test_a_device_without_a_chip_is_asked_for_one(device):
    with pytest.raises(UserError, match="--chip"):
        settled(recipe("quickstart", model={"device": device}))


def test_a_folder_that_is_here_says_its_types_itself():
    description = read_description(REPO / "models" / "tiny" / "qwen3_vl_w8a8")
    types = described_types(description)
    linears = [name.removesuffix(".weight") for name in description.types if name.endswith("_proj.weight")]
    assert {types(name) for name in linears} >= {"W8A8"}
    assert all(types(name) == description.types[f"{name}.weight"] for name in linears)
    assert types("model.language_model.norm") == "FLOAT" and described_types(None) is None


@pytest.mark.parametrize("tensor", [".gate_up_proj", ".0.gate_proj.weight"])
def test_experts_are_named_as_one(tensor):
    experts = "model.language_model.layers.0.mlp.experts"
    types = described_types(Description(Path("x"), {f"{experts}{tensor}": "W8A8_DYNAMIC"}, "W8A8"))
    assert types(experts) == "W8A8_DYNAMIC" and types("model.language_model.layers.0.self_attn.q_proj") == "FLOAT"
