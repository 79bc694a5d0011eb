"""The draft model of a recipe: what is settled and refused before a weight is read, and its part of the memory."""

import json
import logging
import re
import shutil

import pytest

from executor.capacity.fits import deployment_on
from executor.checkpoint.vocabulary import difference, read_vocabulary
from executor.commands.plan.show import PARTS
from executor.errors import UserError
from executor.recipe.memory import GIB, account, estimate, kv_block_bytes, weights_bytes
from executor.recipe.on_paper import settle_on_paper
from executor.recipe.schema import SpeculativeSection, build_recipe
from executor.recipe.settle import prepare
from executor.recipe.unused import OF_METHODS, _warn
from models.published import published_config
from models.registry import read_shapes
from tests.engines import engine_over
from tests.reference import REPO

TINY = REPO / "models" / "tiny"
TARGET = TINY / "qwen3_vl"


def recipe_of(draft, method="draft", model=None, **sections):
    model = {"model_path": str(TARGET), "device": "cpu"} | (model or {})
    speculative = {"method": method, "model_path": draft and str(draft)}
    tree = {"model_config": model, "speculative_config": speculative}
    return build_recipe(tree | {f"{name}_config": keys for name, keys in sections.items()})


def changed(folder, file, change):
    """A copy of the tiny model in `folder`, with one JSON file changed in place."""
    shutil.copytree(TARGET, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "draft, method, words",
    [
        (None, "draft", "model_path: null, and method is draft; name the folder or hub id"),
        ("./x", "ngram", r"model_path: got \./x, but method is ngram, which reads none; set method: draft, or"),
        ("./x", None, "but method is null"),
        ("./absent", "draft", r"speculative_config\.model_path: there is no folder \./absent.*; give the folder"),
        (TINY / "qwen2_5_vl", "draft", "is a qwen2_5_vl model, and .* a qwen3_vl one.* Qwen/Qwen3-VL-2B-Instruct"),
    ],
)
def test_drafts_that_cannot_be(draft, method, words):
    with pytest.raises(UserError, match=words) as error:
        prepare(recipe_of(draft, method))
    assert str(error.value).startswith("speculative_config.model_path: ")


def test_bounds_that_leave_no_ngram():
    tree = {"model_config": {"model_path": str(TARGET), "device": "cpu"}}
    tree["speculative_config"] = {"method": "ngram", "ngram_min": 5}
    with pytest.raises(UserError, match=r"speculative_config\.ngram_min: got 5, but ngram_max is 4; allowed: 1 to 4"):
        prepare(build_recipe(tree))


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"method": "ngram", "level": 3},
            "level: got 3, which has no effect with method ngram; what reads it: lookahead",
        ),
        ({"method": "lookahead", "ngram_max": 9}, "ngram_max: got 9, which has no effect with method lookahead; what"),
        (
            {"num_speculative_tokens": 3},
            "num_speculative_tokens: got 3, which has no effect without a method; what reads",
        ),
        ({"method": "ngram", "level": 4, "ngram_max": 9, "adaptive": False}, None),
        ({}, None),
    ],
)
def test_keys_that_the_method_does_not_read_are_told(settings, words, caplog):
    tree = {"model_config": {"model_path": str(TARGET), "device": "cpu"}, "speculative_config": settings}
    for settled in (prepare, lambda recipe: settle_on_paper(recipe, "plan")):
        _warn.cache_clear()
        caplog.clear()
        settled(build_recipe(tree))
        settled(build_recipe(tree))
        told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(told) == (words is not None), told
        assert words is None or told[0].startswith(f"speculative_config.{words}")


def test_every_key_has_its_readers():
    assert {*OF_METHODS, "method", "model_path"} == SpeculativeSection.model_fields.keys()


def test_a_draft_folder_that_is_not_whole(tmp_path):
    """Known before the model's weights are read, and said of the draft."""
    draft = shutil.copytree(TARGET, tmp_path / "draft")
    (draft / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^speculative_config\.model_path: .*/draft: no \*\.safetensors; the folder"):
        prepare(recipe_of(draft))
    (draft / "config.json").unlink()
    with pytest.raises(UserError, match=r"^speculative_config\.model_path: .*/draft has no config\.json"):
        prepare(recipe_of(draft))


def _patch_size(config):
    config["vision_config"]["patch_size"] = 14


def _positions(config):
    config["text_config"]["max_position_embeddings"] = 512


def _swap(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _one_more(tokenizer):
    tokenizer["added_tokens"].append({"id": 505, "content": "<|more|>", "special": True})


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", _patch_size, "cuts pictures otherwise than .*: patch_size 14 instead of 16"),
        ("config.json", _positions, "max_model_len: got 2048; .* was made for at most 512 tokens"),
        ("tokenizer.json", _swap, "tokenizer of .* is another one: 2 tokens have other numbers, .*: 300 and 301; "),
        ("tokenizer.json", _one_more, r"1 tokens have other numbers, '<\|more\|>' for one: none and 505"),
    ],
)
def test_drafts_that_differ_too_much(tmp_path, file, change, words):
    draft = changed(tmp_path / "draft", file, change)
    recipe = recipe_of(draft)
    with pytest.raises(UserError, match=words) as error:
        prepare(recipe)
    assert str(draft) in str(error.value)
    with pytest.raises(UserError, match=words):
        settle_on_paper(recipe, "plan")


def test_a_vocabulary_may_lie_in_either_form(tmp_path):
    draft = shutil.copytree(TARGET, tmp_path / "draft")
    (draft / "tokenizer.json").unlink()
    assert difference(read_vocabulary(TARGET), read_vocabulary(draft)) is None
    assert len(read_vocabulary(draft)) > 500
    assert prepare(recipe_of(draft)).draft.folder == draft
    (draft / "vocab.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer: neither tokenizer.json nor vocab.json"):
        prepare(recipe_of(draft))


@pytest.mark.parametrize(
    "draft, quantization, settled",
    [
        ("qwen3_vl", "auto", "none"),
        ("qwen3_vl", "wint8", "wint8"),
        ("qwen3_vl_w8a8", "auto", "w8a8"),
        ("qwen3_vl_w8a8", "wint8", "w8a8"),
    ],
)
def test_what_the_draft_models_weights_are(draft, quantization, settled):
    """What its own folder says; float ones are made int8 where the model's are."""
    prepared = prepare(recipe_of(TINY / draft, model={"quantization": quantization, "dtype": "float32"}))
    alone = prepared.draft.recipe
    assert alone.model.quantization == settled and alone.model.dtype == "float32"
    assert alone.parallel.world_size == alone.attn_tp_size == 1 and alone.speculative.method is None
    assert (prepared.draft.stored is not None) == draft.endswith("w8a8")


def test_weights_that_the_device_does_not_have(tmp_path):
    """Said of the draft model, not of the recipe's own."""
    draft = shutil.copytree(TINY / "qwen3_vl_w8a8", tmp_path / "Qwen3-VL-2B-Instruct-w8a8sc")
    file = draft / "quant_model_description.json"
    file.write_text(file.read_text().replace('"W8A8"', '"W8A8SC"'))
    with pytest.raises(UserError) as error:
        prepare(recipe_of(draft))
    message = str(error.value)
    assert message.startswith("speculative_config.model_path: ") and "w8a8sc" in message and "cpu" in message
    assert not re.search("(?<!speculative_config.)model_config", message)


def on_chip(draft="Qwen/Qwen3-VL-2B-Instruct", world_size=1, **sections):
    speculative = {"method": "draft", "model_path": draft} if draft else {}
    tree = {
        "model_config": {"model_path": "Qwen/Qwen3-VL-32B-Instruct", "device": "npu", "soc": "atlas_800i_a2"},
        "parallel_config": {"world_size": world_size},
        "speculative_config": speculative,
        **{f"{name}_config": keys for name, keys in sections.items()},
    }
    return settle_on_paper(build_recipe(tree), "plan")


def test_the_draft_model_counts_in_the_memory_of_a_rank():
    """Whole on its rank, however many share the model; a block is one of either cache."""
    paper, without = on_chip(world_size=4), on_chip(draft=None, world_size=4)
    shapes = read_shapes(published_config("Qwen3-VL-2B-Instruct"), "draft")
    alone = paper.draft.recipe
    found, plain = (
        account(each.recipe, each.shapes, 64 * GIB, picture_tokens=2048, draft=each.draft) for each in (paper, without)
    )
    assert found.draft_weights_bytes == weights_bytes(alone, shapes) == pytest.approx(2 * shapes.parameters, rel=0.01)
    block = kv_block_bytes(alone, shapes)
    assert block == 128 * 2 * 28 * 8 * 128 * 2 and found.block_bytes - plain.block_bytes == block
    assert found.draft_kv_bytes == found.num_blocks * block
    assert found.weights_bytes == plain.weights_bytes and found.draft_step_bytes > 0
    assert sum(found.by_part().values()) == found.total_bytes
    assert found.by_part().keys() == PARTS.keys()
    assert "draft model 3.9" in str(found) and "draft" not in str(plain)
    named = on_chip(world_size=4, scheduler={"kv_cache_gb": 8.0})
    cache = account(named.recipe, named.shapes, 64 * GIB, draft=named.draft)
    assert 8 * GIB - cache.block_bytes < cache.kv_bytes + cache.draft_kv_bytes <= 8 * GIB


def test_fewer_blocks_are_left_beside_a_draft_model():
    paper, without = on_chip(world_size=2), on_chip(draft=None, world_size=2)
    found, plain = (
        estimate(each.recipe, each.shapes, 60 * GIB, picture_tokens=2048, draft=each.draft) for each in (paper, without)
    )
    assert found.num_blocks < plain.num_blocks
    assert found.total_bytes <= found.budget_bytes
    with pytest.raises(UserError, match=r"draft model .* Lower .*take a smaller speculative_config\.model_path"):
        estimate(paper.recipe, paper.shapes, int(47 * GIB), picture_tokens=2048, draft=paper.draft)
    deployment = deployment_on(paper, 64 * GIB)
    assert (
        deployment.account(max_num_seqs=4).draft_step_bytes == deployment.account(max_num_seqs=8).draft_step_bytes > 0
    )


def test_a_file_is_no_draft_model(tmp_path):
    """Nor a model: `plan` says so, as what runs it does, instead of looking for one of that name."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    is_file = f"model_path: {file} is a file; it must be the folder of a checkpoint"
    for settled in (prepare, lambda recipe: settle_on_paper(recipe, "plan")):
        with pytest.raises(UserError, match=f"^speculative_config.{is_file}$"):
            settled(recipe_of(file))
        with pytest.raises(UserError, match=f"^model_config.{is_file}$"):
            settled(recipe_of(None, method=None, model={"model_path": str(file)}))


def test_a_draft_model_that_is_not_here_has_a_published_name():
    with pytest.raises(UserError, match="speculative_config.model_path: Qwen/Qwen3-VL-1B is not on this machine, and"):
        on_chip("Qwen/Qwen3-VL-1B")
    with pytest.raises(UserError, match="is a qwen2_5_vl model, and .* a qwen3_vl one"):
        on_chip("Qwen/Qwen2.5-VL-3B-Instruct")
    with pytest.raises(UserError, match="method is draft; name the folder or hub id"):
        on_chip(draft=None, speculative={"method": "draft"})


def test_the_estimate_is_what_is_allocated():
    """Weights and both caches of an engine, tensor by tensor."""
    sizes = {"max_model_len": 512, "num_blocks": 40, "block_size": 16, "max_num_seqs": 8}
    speculative = {"method": "draft", "model_path": str(TINY / "qwen3_vl")}
    tree = {
        "model_config": {"model_path": str(TINY / "qwen3_vl_moe"), "device": "cpu", "dtype": "float32"},
        "scheduler_config": sizes,
        "speculative_config": speculative,
    }
    memory = prepare(build_recipe(tree)).memory
    with engine_over(TINY / "qwen3_vl_moe", speculative=speculative, **sizes) as engine:
        runner = engine.runner.speculator.proposer.runner
        for each, kv_bytes in ((engine.runner, memory.kv_bytes), (runner, memory.draft_kv_bytes)):
            assert kv_bytes == sum(x.numel() * x.element_size() for layer in each.kv for x in (layer.k, layer.v))
        assert (
            memory.draft_weights_bytes
            == 4 * read_shapes(json.loads((TINY / "qwen3_vl" / "config.json").read_text()), "draft").parameters
        )
