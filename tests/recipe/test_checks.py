"""What is settled and refused before a rank starts: devices, chips, degrees, `auto` values, memory, model_path."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from executor.checkpoint.folder import find_checkpoint, read_json
from executor.device.table import BACKENDS
from executor.errors import UserError
from executor.recipe import settle as checks
from executor.recipe.file import parse_override
from executor.recipe.memory import GIB, estimate, kv_block_bytes
from executor.recipe.schema import Recipe, build_recipe
from executor.recipe.settle import check_chip, check_recipe, device_finding, prepare, refuse, release_findings, resolve
from models.published import published_config
from models.registry import read_shapes
from tests.models.test_shapes import SHAPES
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen3_vl"


def recipe_of(model: dict | None = None, **sections: dict) -> Recipe:
    tree = {"model_config": {"model_path": str(TINY)} | (model or {})}
    return build_recipe(tree | {f"{name}_config": fields for name, fields in sections.items()})


def shapes_of(name: str):
    return read_shapes(published_config(name), name)


def refuse_unsupported(recipe):
    refuse([*release_findings(recipe), *device_finding(recipe)])


@pytest.mark.parametrize(
    "model, parallel, words",
    [
        ({"device": "npu"}, {}, ["needs torch_npu beside torch", "npu_emulated", "--set model_config.device=cpu"]),
        ({"device": "cuda"}, {}, ["cuda backend is not part of this release"]),
        ({"device": "cuda"}, {"world_size": 2}, ["--set parallel_config.world_size=1"]),
        (
            {"device": "cpu", "quantization": "w8a8sc"},
            {},
            ["w8a8sc weights do not run on cpu", "use the w8a8s weights"],
        ),
    ],
)
def test_what_this_release_cannot_start(model, parallel, words, monkeypatch):
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    with pytest.raises(UserError) as error:
        refuse_unsupported(recipe_of(model, parallel=parallel))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "model, words",
    [
        ({"device": "cpu", "soc": "atlas_800i_a2"}, "set device: npu"),
        ({"device": "npu_emulated"}, "needs a chip: atlas_800i_a2, atlas_800i_a3 or atlas_300i_duo"),
        ({"device": "cpu", "exe_mode": "ge_graph"}, "ge_graph is for device npu or npu_emulated"),
        ({"device": "npu", "soc": "atlas_300i_duo", "dtype": "bfloat16"}, "float16 only, got bfloat16"),
        ({"device": "npu", "soc": "atlas_800i_a3", "dtype": "float32"}, "bfloat16 or float16, got float32"),
        ({"device": "npu", "soc": "atlas_300i_duo", "exe_mode": "ge_graph"}, "decodes eagerly only"),
        ({"device": "npu", "soc": "atlas_800i_a2", "quantization": "w8a8sc"}, "atlas_300i_duo only"),
    ],
)
def test_contradictions_on_a_chip(model, words):
    with pytest.raises(UserError, match=words):
        check_chip(recipe_of(model))


@pytest.mark.parametrize(
    "name, parallel, words",
    [
        (
            "Qwen2.5-VL-7B-Instruct",
            {"world_size": 8},
            ["28 query heads do not divide by 8", "Degrees that work: 1, 2, 4"],
        ),
        ("Qwen2.5-VL-32B-Instruct", {"world_size": 16}, ["40 query heads", "work: 1, 2, 4, 8"]),
        ("Qwen2.5-VL-3B-Instruct", {"world_size": 8}, ["3420", "vision_parallel: data it would work"]),
        ("Qwen3-VL-8B-Instruct", {"world_size": 3}, ["32 query heads do not divide by 3", "work: 1, 2, 4, 8, 16"]),
        ("Qwen3-VL-8B-Instruct", {"world_size": 4, "attn_tp_size": 3}, ["in a world of 4", "1, 2, 4"]),
        ("Qwen3-VL-8B-Instruct", {"world_size": 2, "moe_ep_size": 2}, ["has no experts", "set it to 1"]),
        ("Qwen3-VL-30B-A3B-Instruct", {"world_size": 2, "moe_ep_size": 4}, ["does not divide the world", "work: 1, 2"]),
    ],
)
def test_degrees_that_do_not_divide(name, parallel, words):
    with pytest.raises(UserError) as error:
        check_recipe(recipe_of(parallel=parallel), shapes_of(name))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", SHAPES)
def test_the_degrees_an_error_lists_do_work(name):
    with pytest.raises(UserError) as error:
        check_recipe(recipe_of(parallel={"world_size": 7 * 11}), shapes_of(name))
    listed = str(error.value).split("Degrees that work: ")[1].split(";")[0]
    degrees = [int(degree) for degree in listed.split(",")]
    assert 1 in degrees and 2 in degrees
    for degree in range(1, 65):
        recipe = recipe_of(parallel={"world_size": degree})
        if degree in degrees:
            check_recipe(recipe, shapes_of(name))
        else:
            with pytest.raises(UserError):
                check_recipe(recipe, shapes_of(name))


def test_the_cache_in_gb():
    """As many blocks as fit into it; at least what one request needs."""
    shapes, scheduler = shapes_of("Qwen3-VL-8B-Instruct"), {"kv_cache_gb": 3.0, "max_model_len": 8192}
    recipe = resolve(recipe_of(scheduler=scheduler), shapes)
    memory = estimate(recipe, shapes, 64 * GIB)
    assert memory.num_blocks == int(3 * GIB / kv_block_bytes(recipe, shapes)) > 8192 // 128
    assert 3 * GIB - memory.block_bytes < memory.kv_bytes <= 3 * GIB
    with pytest.raises(UserError, match=r"kv_cache_gb: 0.5 GB are 28 blocks, and one .* takes 64: give at least 1.12"):
        estimate(recipe.replace(scheduler={"kv_cache_gb": 0.5}), shapes, 64 * GIB)
    with pytest.raises(UserError, match=r"does not fit: .* Lower scheduler_config.kv_cache_gb \(3\)"):
        estimate(recipe, shapes, 20 * GIB)


NPU = {"device": "npu", "soc": "atlas_800i_a2"}


@pytest.mark.parametrize(
    "model, parallel, scheduler, words",
    [
        (NPU, {"world_size": 3}, {}, ["attn_tp_size: ", "needs torch_npu"]),
        (NPU | {"quantization": "w8a8"}, {}, {},
         ["quantization: the recipe says w8a8, the checkpoint", "torch_npu"]),
        (NPU | {"model_path": "./absent"}, {}, {}, ["there is no folder ./absent", "needs torch_npu"]),
        (NPU | {"dtype": "float32"}, {"world_size": 3, "moe_ep_size": 3}, {"max_model_len": 10**9},
         ["dtype: attention on NPUs", "made for at most", "attn_tp_size: ", "has no experts", "needs torch_npu"]),
        ({"device": "cpu", "soc": "atlas_300i_duo", "exe_mode": "ge_graph"}, {}, {"kv_cache_gb": 1, "num_blocks": 9},
         ["is an NPU, but device is cpu", "ge_graph is for device npu", "set one of them to null"]),
    ],
)  # fmt: skip
def test_everything_that_can_be_known_is_told_at_once(model, parallel, scheduler, words, monkeypatch):
    """In lines of their own, and what the machine lacks comes last: it hides nothing."""
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    with pytest.raises(UserError) as error:
        prepare(recipe_of(model, parallel=parallel, scheduler=scheduler))
    lines = str(error.value).splitlines()
    assert len(lines) == len(words), error.value
    for word, line in zip(words, lines, strict=True):
        assert word in line


@pytest.mark.parametrize(
    "model, parallel",
    [
        (NPU | {"exe_mode": "ge_graph", "dtype": "float16"}, {"world_size": 8, "attn_tp_size": 4, "moe_ep_size": 2}),
        ({"device": "cpu", "soc": "atlas_300i_duo", "dtype": "float16"}, {}),
        ({"device": "cuda", "exe_mode": "npugraph_ex", "quantization": "w8a8sc"}, {"world_size": 2}),
    ],
)
def test_the_advice_of_a_refusal_is_not_refused(model, parallel, monkeypatch):
    """The overrides behind "Try:" make a recipe that starts here."""
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    recipe = recipe_of(model, parallel=parallel)
    with pytest.raises(UserError) as error:
        prepare(recipe)
    advice = next(line for line in str(error.value).splitlines() if "--set model_config." in line)
    for override in advice.split("  --set ")[1].split(" --set "):
        section, key, value = parse_override(override, Recipe)
        recipe = recipe.replace(**{section.removesuffix("_config"): {key: value}})
    assert prepare(recipe).recipe.model.device == "cpu"


@pytest.mark.parametrize("memory_gb, is_enough", [(64, True), (1e-6, False)])
def test_the_advice_to_take_the_cpu_says_when_its_memory_is_too_small(monkeypatch, memory_gb, is_enough):
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    monkeypatch.setattr(checks, "host_memory_bytes", lambda: int(memory_gb * GIB))
    with pytest.raises(UserError) as error:
        prepare(recipe_of(NPU))
    assert ("too large for this machine's memory" in str(error.value)) != is_enough


def test_nothing_is_downloaded_for_a_recipe_that_cannot_start(monkeypatch):
    monkeypatch.setattr(checks, "has_torch_npu", lambda: False)
    monkeypatch.setattr(checks, "find_checkpoint", lambda path, hub: pytest.fail("looked for on the hub"))
    with pytest.raises(UserError, match="needs torch_npu"):
        prepare(recipe_of(NPU | {"model_path": "Nobody/Has-This-VL"}))


def test_auto_is_settled_by_the_checkpoint():
    shapes = shapes_of("Qwen3-VL-8B-Instruct")
    settled = resolve(recipe_of(parallel={"world_size": 2}), shapes)
    assert (settled.model.dtype, settled.model.quantization) == ("bfloat16", "none")
    assert settled.parallel.attn_tp_size == 2
    assert settled.scheduler.max_model_len == 32768
    assert resolve(settled, shapes) == settled
    on_duo = recipe_of({"device": "npu", "soc": "atlas_300i_duo"})
    assert resolve(on_duo, shapes).model.dtype == "float16"


@pytest.mark.parametrize(
    "scheduler, words",
    [
        ({"max_model_len": 300_000}, "made for at most 262144 tokens"),
        ({"enable_chunked_prefill": False}, r"at least max_model_len \(32768\)"),
    ],
)
def test_lengths_that_cannot_be(scheduler, words):
    with pytest.raises(UserError, match=words):
        resolve(recipe_of(scheduler=scheduler), shapes_of("Qwen3-VL-8B-Instruct"))


def described(folder: Path, said: str, *kinds: str) -> Path:
    """A copy of the tiny checkpoint whose description gives each of its first weights one of `kinds`."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    weights = {f"model.language_model.layers.{place}.mlp.down_proj.weight": kind for place, kind in enumerate(kinds)}
    (folder / "quant_model_description.json").write_text(json.dumps({"model_quant_type": said} | weights))
    return folder


def prepared(folder: Path, **model: str):
    return prepare(recipe_of({"model_path": str(folder), "device": "cpu"} | model))


MIXED = ("W8A8", "W8A8_DYNAMIC", "W8A8_DYNAMIC", "FLOAT")


@pytest.mark.parametrize(
    "said, kinds, label",
    [
        ("W8A8", MIXED, "w8a8"),
        ("FLOAT", MIXED, "w8a8_dynamic"),
        ("W8A8", ("W8A16",), "w8a16"),
        ("W8A8", ("FLOAT",), "none"),
    ],
)
def test_auto_takes_the_label_of_the_folder(tmp_path, said, kinds, label):
    """What the folder calls itself where it has such weights, else the most frequent type; float alone is none."""
    settled = prepared(described(tmp_path / "folder", said, *kinds)).recipe
    assert settled.model.quantization == label
    assert prepare(settled).recipe == settled


@pytest.mark.parametrize("word", ["w8a8", "w8a8_dynamic"])
def test_a_word_may_be_the_label_or_any_type_inside(tmp_path, word):
    assert prepared(described(tmp_path / "folder", "W8A8", *MIXED), quantization=word).recipe.model.quantization == word


@pytest.mark.parametrize("word", ["none", "w8a16"])
def test_a_word_that_the_folder_is_not(tmp_path, word):
    folder = described(tmp_path / "folder", "W8A8", *MIXED)
    with pytest.raises(UserError, match=rf"says {word}, the checkpoint .*folder is w8a8 \(it holds w8a8, w8a8_dynamic"):
        prepared(folder, quantization=word)
    with pytest.raises(
        UserError, match="the recipe says w8a8, the checkpoint .* is none: .*python -m executor.commands.quantize"
    ):
        prepared(TINY, quantization="w8a8")


@pytest.mark.parametrize("word", ["auto", "w8a8"])
def test_every_type_inside_must_be_one_that_the_device_has(tmp_path, monkeypatch, word):
    """The word alone does not decide: a folder that is called W8A8 may hold what the device lacks."""
    folder = described(tmp_path / "Qwen3-VL-8B-Instruct-W8A8", "W8A8", *MIXED)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], quantization=("none", "w8a8")))
    monkeypatch.setitem(BACKENDS, "npu", replace(BACKENDS["npu"], quantization=("none", "w8a8", "w8a8_dynamic")))
    monkeypatch.setitem(BACKENDS, "npu_emulated", replace(BACKENDS["npu_emulated"], quantization=("none", "w8a8")))
    with pytest.raises(UserError) as error:
        prepared(folder, quantization=word)
    (line,) = str(error.value).splitlines()
    for words in (
        "w8a8_dynamic weights (model.language_model.layers.2.mlp.down_proj.weight of ",
        "do not run on cpu; they run on npu;",
        "--set model_config.model_path=Qwen/Qwen3-VL-8B-Instruct --set model_config.quantization=auto",
    ):
        assert words in line


def test_a_type_that_nobody_reads(tmp_path):
    with pytest.raises(UserError, match=r"layers.0.*weight of .* is FAQUANT, which .* reads w8a8, .*float checkpoint"):
        prepared(described(tmp_path / "folder", "FLOAT", "FAQuant"))


def test_estimate_buys_blocks_with_what_is_left():
    shapes = shapes_of("Qwen3-VL-8B-Instruct")
    recipe = resolve(recipe_of(), shapes)
    roomy, tight = (estimate(recipe, shapes, gib * GIB, picture_tokens=16384) for gib in (200, 30))
    assert roomy.num_blocks == 16 * 32768 // 128
    assert 32768 // 128 <= tight.num_blocks < roomy.num_blocks
    # With each block come the pictures whose tokens it holds: 32 x 32 pixels of three bytes for a token.
    assert tight.total_bytes <= tight.budget_bytes < tight.total_bytes + tight.block_bytes + 128 * 3 * 32 * 32
    # 36 layers of 8 KV heads of 128, keys and values, two bytes
    assert kv_block_bytes(recipe, shapes) == 128 * 36 * 8 * 128 * 2 * 2


@pytest.mark.parametrize(
    "free_gib, scheduler, words",
    [
        (10, {}, "The weights alone are too many"),
        (21, {}, "Lower scheduler_config.max_model_len"),
        (30, {"num_blocks": 100_000}, r"Lower scheduler_config.num_blocks \(100000\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_figures(free_gib, scheduler, words):
    shapes = shapes_of("Qwen3-VL-8B-Instruct")
    with pytest.raises(UserError, match=words) as error:
        estimate(resolve(recipe_of(scheduler=scheduler), shapes), shapes, free_gib * GIB)
    assert "Qwen3-VL-8B-Instruct does not fit: memory per rank, estimated: weights 16.3" in str(error.value)


def test_prepare_settles_a_real_folder(monkeypatch):
    monkeypatch.setattr(checks, "host_memory_bytes", lambda: 4 * GIB)
    prepared = prepare(recipe_of())
    assert prepared.folder == TINY
    assert (prepared.recipe.model.device, prepared.recipe.model.dtype) == ("cpu", "bfloat16")
    assert prepared.memory.total_bytes < 4 * GIB
    assert prepare(prepared.recipe).recipe == prepared.recipe
    with pytest.raises(UserError, match="does not fit: memory per rank"):
        prepare(recipe_of(), local_ranks=64)


def test_paths_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; it must be the folder"):
        find_checkpoint(str(tmp_path / "file"), "huggingface")
    with pytest.raises(UserError, match=r"there is no folder ./models/tiny/qwen3_v .did you mean 'qwen3_vl'"):
        find_checkpoint("./models/tiny/qwen3_v", "huggingface")
    with pytest.raises(UserError, match="has no config.json"):
        prepare(recipe_of({"model_path": str(tmp_path)}))
    with pytest.raises(UserError) as error:
        find_checkpoint("Qwen/Qwen3-VL-No-Such-Size", "huggingface")
    assert "hf download Qwen/Qwen3-VL-No-Such-Size --local-dir weights/Qwen3-VL-No-Such-Size" in str(error.value)
    assert "--set model_config.model_path=weights/Qwen3-VL-No-Such-Size" in str(error.value)


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_broken_json_of_a_checkpoint(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_json(tmp_path, "config.json")
    assert read_json(tmp_path, "absent.json", required=False) == {}


def test_config_json_in_all_its_published_forms():
    """Flat and nested text sizes, both names of the experts, absent defaults: as the models read them."""
    config = published_config("Qwen3-VL-30B-A3B-Instruct")
    wanted = read_shapes(config, "x")
    text = dict(config["text_config"])
    text["num_local_experts"] = text.pop("num_experts")
    vision = {key: value for key, value in config["vision_config"].items() if key != "temporal_patch_size"}
    assert read_shapes(config | {"text_config": text, "vision_config": vision}, "x") == wanted

    flat = published_config("Qwen2.5-VL-7B-Instruct")
    assert "text_config" not in flat
    keys = set(SHAPES["Qwen2.5-VL-7B-Instruct"]["text"]) & set(flat)
    nested = {key: value for key, value in flat.items() if key not in keys}
    nested["text_config"] = {key: flat[key] for key in keys}
    assert read_shapes(nested, "x") == read_shapes(flat, "x")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "names architecture LlamaForCausalLM; this release runs Qwen2_5"),
        ({"architectures": None}, "names no architecture, and its model_type is None; write"),
        ({"hidden_size": None}, "config.json: hidden_size is None, wanted a whole number, at least 1"),
        ({"vision_config": {}}, "vision_config is {}, wanted the sizes"),
    ],
)
def test_config_json_of_something_else(change, words):
    with pytest.raises(UserError, match=words):
        read_shapes(published_config("Qwen2.5-VL-7B-Instruct") | change, "x")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_the_tiny_checkpoints_count_right(family):
    folder = REPO / "models" / "tiny" / family
    from executor.checkpoint.weights import Checkpoint

    shapes = read_shapes(json.loads((folder / "config.json").read_text()), family)
    catalog = Checkpoint(folder).catalog
    total = 0
    for name, info in catalog.items():
        if not (name == "lm_head.weight" and shapes.tied_embeddings):
            count = 1
            for size in info.shape:
                count *= size
            total += count
    assert shapes.parameters == total
