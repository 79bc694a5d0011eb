"""`eval --dump-layers` from a recipe: what agrees, where a broken weight is found, and what is refused."""

import io
import shutil

import pytest
from safetensors.torch import load_file, save_file

from emulator.activate import available
from executor.commands.eval.layers import run_layers
from executor.commands.eval.run import run
from executor.errors import UserError
from executor.evaluate.capture import PROCESSOR
from executor.recipe.schema import Recipe, build_recipe
from tests.reference import FAMILIES, REPO, random_checkpoint

TINY = REPO / "models" / "tiny"


def recipe_of(target: str, family: str = "qwen3_vl", *, reference=None, limit: int = 1, **model) -> Recipe:
    return build_recipe(
        {
            "model_config": {"model_path": str(TINY / family), "device": "cpu", "dtype": "float32"} | model,
            "scheduler_config": {"max_model_len": 1024, "num_blocks": 16},
            "data_config": {"limit": limit},
            "eval_config": {"dump_layers": target, "reference_model": reference and str(reference)},
        }
    )


def broken(folder, family: str, tensor: str):
    """The tiny checkpoint with one tensor changed."""
    shutil.copytree(TINY / family, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[tensor] = weights[tensor] * 1.5
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_agree_with_transformers(family):
    out = io.StringIO()
    document, status = run_layers(recipe_of("transformers", family, limit=6), out)
    assert (status, document["samples"], document["lost_at"]) == (0, 6, None)
    assert document["reference"]["dtype"] == document["model"]["dtype"] == "float32"
    assert all(stage["relative"] <= 1e-4 or stage["stage"] == "patches" for stage in document["stages"])
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[1 : len(document["stages"]) + 1]] == [
        stage["stage"] for stage in document["stages"]
    ]
    assert "all stages agree within the tolerance of the type" in lines
    assert f"the error grows most at: {document['largest_jump']}" in lines


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("model.visual.patch_embed.proj.weight", "vision patch embedding"),
        ("model.visual.pos_embed.weight", "vision embedding"),
        ("model.visual.blocks.2.mlp.linear_fc2.weight", "vision block 2"),
        ("model.visual.deepstack_merger_list.1.linear_fc2.weight", "vision tap 1"),
        ("model.visual.merger.linear_fc2.weight", "vision merger"),
        ("model.language_model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.language_model.norm.weight", "final norm"),
    ],
)
def test_a_changed_weight_is_found_at_its_own_stage(tmp_path, tensor, stage):
    reference = broken(tmp_path / "broken", "qwen3_vl", tensor)
    out = io.StringIO()
    document, status = run_layers(recipe_of("transformers", reference=reference), out)
    assert (status, document["lost_at"], document["largest_jump"]) == (0, stage, stage)
    assert f"accuracy is lost at: {stage}" in out.getvalue()
    (marked,) = [line for line in out.getvalue().splitlines() if "<- accuracy is lost here" in line]
    assert marked.startswith(f"{stage} ")


def test_another_checkpoint_in_a_process_of_its_own(tmp_path):
    reference = broken(tmp_path / "broken", "qwen2_5_vl", "visual.blocks.1.attn.proj.weight")
    document, _ = run_layers(recipe_of("cpu", "qwen2_5_vl", reference=reference), io.StringIO())
    assert document["lost_at"] == "vision block 1"
    assert document["not_compared"] == []
    exact = [stage for stage in document["stages"] if stage["relative"] == 0]
    assert [stage["stage"] for stage in exact] == [
        *("token ids", "positions", "patches", "vision patch embedding", "vision embedding", "vision block 0"),
    ]


def test_an_emulated_chip_agrees_with_the_cpu():
    if reason := available():
        pytest.skip(reason)
    recipe = recipe_of("npu_emulated", dtype="bfloat16", soc=None)
    document, status = run_layers(recipe, io.StringIO())
    assert (status, document["lost_at"], document["not_compared"]) == (0, None, [])
    assert document["reference"]["device"] == "npu_emulated"
    assert document["reference"]["dtype"] == document["model"]["dtype"] == "bfloat16"
    assert {stage["stage"] for stage in document["stages"]} >= {"patches", "vision block 3", "layer 2", "logits"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_type_is_judged_by_the_coarser_of_weights_and_activations(dtype, tmp_path):
    """On a CPU without products of that type the weights alone are rounded."""
    folder = random_checkpoint(tmp_path / "random", "qwen3_vl")
    document, _ = run_layers(recipe_of("transformers", model_path=str(folder), dtype=dtype), io.StringIO())
    assert document["model"]["dtype"] == dtype and document["reference"]["dtype"] == "float32"
    hidden = [stage for stage in document["stages"] if stage["stage"] not in PROCESSOR]
    assert document["lost_at"] is None
    assert all(stage["relative"] > 1e-5 for stage in hidden)  # which float32 would not come to


def test_quantized_weights_beside_the_float_ones():
    recipe = recipe_of("transformers", "qwen3_vl_w8a8", reference=TINY / "qwen3_vl")
    document, _ = run_layers(recipe, io.StringIO())
    assert document["model"]["schemes"] == ["none", "w8a8"] and document["reference"]["schemes"] == ["none"]
    errors = {stage["stage"]: stage["relative"] for stage in document["stages"]}
    assert errors["vision embedding"] < 1e-5 < 1e-3 < errors["vision block 0"]
    assert document["lost_at"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "cpu"}, "cpu is the recipe's own device"),
        ({"target": "transformers", "family": "qwen3_vl_w8a8"}, "transformers does not read the quantized weights"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        run_layers(recipe_of(**changes))


def test_the_command_eval_leads_here():
    recipe = recipe_of("cpu")
    with pytest.raises(UserError, match="cpu is the recipe's own device"):
        run(recipe)


def test_several_ranks_are_refused():
    recipe = recipe_of("transformers").replace(parallel={"world_size": 2})
    with pytest.raises(UserError, match="set parallel_config.world_size=1"):
        run_layers(recipe)


def test_a_reference_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="eval_config.reference_model: there is no folder"):
        run_layers(recipe_of("cpu", reference=tmp_path / "nothing"))


def test_the_other_sides_mistake_is_said(tmp_path):
    with pytest.raises(UserError, match=r"the other side of the comparison \(cpu\): .*config.json"):
        run_layers(recipe_of("cpu", reference=tmp_path))


def damaged(folder, kind: str):
    """The tiny checkpoint, damaged as its other side may be."""
    shutil.copytree(TINY / "qwen3_vl", folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    if kind == "lacks a weight":
        del weights[name]
    if kind == "another shape":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:100_000])
    return folder


@pytest.mark.parametrize("kind", ["lacks a weight", "another shape", "cut"])
def test_a_damaged_other_side_is_refused_and_never_drawn_at_random(tmp_path, kind):
    folder = damaged(tmp_path / "other", kind)
    with pytest.raises(UserError, match="whole float checkpoint"):
        run_layers(recipe_of("transformers", reference=folder), io.StringIO())


def test_random_prompts_are_compared_too():
    recipe = recipe_of("transformers").replace(data={"dataset": "random", "random_tokens": 40})
    document, _ = run_layers(recipe, io.StringIO())
    assert (document["samples"], document["lost_at"]) == (1, None)
