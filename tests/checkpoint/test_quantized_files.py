"""Quantized folders: the names of their files and tensors in both generations of the tool, and what may lie beside."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executor.checkpoint.description import read_description
from executor.checkpoint.files import DESCRIPTIONS, find_weights
from executor.checkpoint.weights import Checkpoint
from executor.errors import UserError
from tests.engines import engine_over
from tests.msmodelslim.folders import expected
from tests.msmodelslim.variants import DESCRIPTION, variant
from tests.quant.test_msmodelslim import answered

NAME = "qwen3_vl_w8a16"  # no activation is rounded: equal weights give equal logits


@pytest.fixture(scope="module")
def source(msmodelslim):
    return msmodelslim(NAME)


def logits_of(folder):
    engine = engine_over(folder, num_blocks=64)
    return answered(engine, expected(folder)["cases"][0], 1)[0]


@pytest.fixture(scope="module")
def logits(source):
    return logits_of(source)


FORMS = [
    {},
    {"weights": "quant_model_weights.safetensors", "index": "quant_model_weights.safetensors.index.json"},
    {
        "weights": "quant_model_weights-{}.safetensors",
        "num_files": 3,
        "index": "quant_model_weights.safetensors.index.json",
    },
    {"weights": "quant_model_weight_w8a16.safetensors"},
    {"weights": "quant_model_weight_w8a16-{}.safetensors", "num_files": 2},
    {
        "weights": "quant_model_weight_w8a16-{}.safetensors",
        "num_files": 2,
        "index": "quant_model_weight_w8a16.safetensors.index.json",
    },
    {"weights": "quant_model_weight_w8a16.safetensors", "description": "quant_model_description_w8a16.json"},
]


@pytest.mark.parametrize("form", FORMS)
def test_file_names_of_both_generations(source, tmp_path, form, caplog):
    """The same catalog and types; a float model, and files in sub-folders, lie beside and are named as not read."""
    folder = variant(source, tmp_path / "folder", **form)
    wanted, catalog = Checkpoint(source).catalog, Checkpoint(folder).catalog
    assert {name: (x.shape, x.dtype) for name, x in catalog.items()} == {
        name: (x.shape, x.dtype) for name, x in wanted.items()
    }
    assert read_description(folder).types == read_description(source).types
    (folder / "optional").mkdir()
    for beside in ("model.safetensors", "optional/quarot.safetensors"):
        save_file({"lm_head.weight": torch.ones(2)}, folder / beside)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')
    assert Checkpoint(folder).catalog.keys() == wanted.keys()
    assert [file.name for file in Checkpoint(folder).ignored] == ["model.safetensors", "quarot.safetensors"]


def test_what_lies_beside_is_named_once_and_not_read(source, logits, tmp_path, caplog):
    folder = variant(source, tmp_path / "folder")
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model.safetensors")
    assert torch.equal(logits_of(folder), logits)
    (record,) = [record for record in caplog.records if "not read" in record.message]
    assert record.levelname == "WARNING" and "and not read: model.safetensors" in record.message


def test_a_missing_shard_is_named(source, tmp_path):
    folder = variant(source, tmp_path / "folder", weights="quant_model_weight_w8a16-{}.safetensors", num_files=3)
    (folder / "quant_model_weight_w8a16-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing: quant_model_weight_w8a16-00002-of-00003"):
        find_weights(folder)


def test_the_usual_names_are_read_under_a_description(source, tmp_path, logits):
    """Weights that somebody renamed, or quantized in place."""
    folder = variant(source, tmp_path / "folder", weights="model.safetensors")
    assert torch.equal(logits_of(folder), logits)
    assert Checkpoint(folder).ignored == ()


def old_prefixes(tensors, description):
    for table in (tensors, description):
        for name in list(table):
            if name.startswith("model."):
                new = name.removeprefix("model.").replace("language_model.", "model.", 1)
                table[new] = table.pop(name)


@pytest.mark.parametrize("which", ["tensors", "description", "both"])
def test_old_and_new_prefixes(source, tmp_path, logits, which):
    def change(tensors, description):
        old_prefixes(tensors if which != "description" else {}, description if which != "tensors" else {})

    assert torch.equal(logits_of(variant(source, tmp_path / "folder", change)), logits)


def test_float_tensors_in_float32(source, tmp_path, logits):
    def change(tensors, description):
        for name, x in tensors.items():
            if x.is_floating_point():
                tensors[name] = x.float()

    assert torch.equal(logits_of(variant(source, tmp_path / "folder", change)), logits)


# Descriptions


def test_several_descriptions(source, tmp_path):
    """The same twice is one; that differ are refused."""
    folder = variant(source, tmp_path / "folder")
    text = (folder / DESCRIPTION).read_text()
    (folder / "quant_model_description_w8a16.json").write_text(text)
    assert read_description(folder).label == "w8a16"
    (folder / "quant_model_description_w8a16.json").write_text(text.replace('"W8A16"', '"W8A8"'))
    with pytest.raises(
        UserError, match="2 descriptions .* differ: quant_model_description.json, quant.*w8a16.json; keep"
    ):
        read_description(folder)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"model_quant_type": "W8A8"}', "damaged: it names no tensor"),
        ('{"lm_head.weight": 8}', "damaged: the type of 'lm_head.weight' is 8; it must give every tensor a type"),
        ('{"lm_head.weight": {"type": "W8A8"}}', "damaged: the type of 'lm_head.weight' is {'type'"),
    ],
)
def test_a_damaged_description(tmp_path, text, words):
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(UserError, match=words):
        read_description(tmp_path)


def test_globals_are_no_tensors(tmp_path):
    """Of both generations: nested tables, numbers, versions with dots in their values."""
    more = {
        "version": "1.0.0",
        "metadata": {"a.b": 1},
        "group_size": 0,
        "optional": {"quarot": {}},
        "kv_quant_type": "C8",
    }
    (tmp_path / DESCRIPTION).write_text(json.dumps(more | {"lm_head.weight": "FLOAT"}))
    found = read_description(tmp_path)
    assert dict(found.types) == {"lm_head.weight": "FLOAT"} and found.label == "none"
    assert DESCRIPTIONS == "quant_model_description*.json"


@pytest.mark.parametrize(
    "types, words",
    [
        (
            {"model.language_model.layers.0.mlp.up_proj.weight": "W8A8", "model.layers.0.mlp.up_proj.weight": "FLOAT"},
            "layers.0.mlp.up_proj.weight' is W8A8 and 'model.layers.0.mlp.up_proj.weight' is FLOAT",
        ),
        (
            {"visual.merger.mlp.0.weight": "FLOAT", "model.visual.merger.mlp.0.weight": "W8A8"},
            "'visual.merger.mlp.0.weight' is FLOAT and 'model.visual.merger.mlp.0.weight' is W8A8",
        ),
        (
            {"lm_head.weight": "FLOAT", "kv_cache_type": "C8", "kv_quant_type": "FLOAT"},
            "kv_cache_type is C8 and kv_quant_type is FLOAT",
        ),
    ],
)
def test_a_description_that_says_two_things_of_one(tmp_path, types, words):
    (tmp_path / DESCRIPTION).write_text(json.dumps(types))
    with pytest.raises(UserError, match=words):
        read_description(tmp_path)


def test_the_same_twice_is_no_contradiction(tmp_path):
    names = ("model.language_model.norm.weight", "model.norm.weight")
    said = dict.fromkeys(names, "FLOAT") | {"kv_cache_type": "C8", "kv_quant_type": "c8"}
    (tmp_path / DESCRIPTION).write_text(json.dumps(said))
    found = read_description(tmp_path)
    assert dict(found.types) == {names[0]: "FLOAT"} and found.kv_cache == "C8"


# Files that cannot be opened


@pytest.mark.parametrize("index", [None, "quant_model_weights.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["link", "folder"])
def test_weights_that_cannot_be_opened(source, tmp_path, kind, index):
    folder = variant(source, tmp_path / "folder", index=index)
    file = folder / "quant_model_weights.safetensors"
    file.unlink()
    if kind == "link":
        file.symlink_to(tmp_path / "blobs" / "gone")
        words = f"{file}: cannot be read: a link to {tmp_path}/blobs/gone, which is not there: copy the folder with"
    else:
        file.mkdir()
        words = f"{file}: cannot be read: a folder, and a file of weights is expected under this name"
    with pytest.raises(UserError) as raised:
        Checkpoint(folder)
    assert words in str(raised.value)


def test_an_index_that_cannot_be_opened(source, tmp_path):
    folder = variant(source, tmp_path / "folder")
    index = folder / "quant_model_weights.safetensors.index.json"
    index.mkdir()
    with pytest.raises(UserError, match=f"{index}: cannot be read: a folder"):
        Checkpoint(folder)


def test_a_file_without_permission(source, tmp_path, monkeypatch):
    """As the system refuses it to others than root."""
    folder = variant(source, tmp_path / "folder")

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="quant_model_weights.safetensors: cannot be read: no permission: let"):
        Checkpoint(folder)


# Heads


def dynamic(x: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = x.float().abs().amax(1, keepdim=True) / 127
    values = (x.float() / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head(source, tmp_path, logits, tied):
    """The older tool may quantize it (disable_last_linear: False), and config.json may go on calling it tied."""

    def change(tensors, description):
        head = tensors.pop("lm_head.weight", tensors["model.language_model.embed_tokens.weight"])
        for suffix, x in dynamic(head).items():
            tensors[f"lm_head.{suffix}"] = x
            description[f"lm_head.{suffix}"] = "W8A16"

    folder = variant(source, tmp_path / "folder", change, tie_word_embeddings=tied)
    found = logits_of(folder)
    assert 1e-4 < float((found - logits).norm() / logits.norm()) < 0.02


# Linears that gain a bias


def test_only_some_of_the_fused_linears_may_have_gained_a_bias(msmodelslim, tmp_path):
    """Those without have zeros: as if the others' were stored as zeros."""
    folder = msmodelslim("qwen3_vl_w8a8_dynamic")
    gone = [f"model.language_model.layers.{number}.self_attn.k_proj.bias" for number in range(3)]

    def drop(tensors, description):
        for name in gone:
            del tensors[name], description[name]

    def clear(tensors, description):
        for name in gone:
            tensors[name].zero_()

    found = [logits_of(variant(folder, tmp_path / change.__name__, change)) for change in (drop, clear)]
    assert torch.equal(*found)
    assert float((found[0] - logits_of(folder)).abs().max()) > 0.01


def test_scales_that_are_converted_are_logged(msmodelslim, caplog):
    for name, count in (("qwen3_vl_w8a8s", 1), ("qwen3_vl_w8a8", 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            engine_over(msmodelslim(name), num_blocks=64)
        found = [record.message for record in caplog.records if "deq_scale" in record.message]
        assert len(found) == count and all("deq_scale of 39 linears is int64" in line for line in found)


def test_the_loaded_share_of_a_folder_is_at_most_all_of_it(msmodelslim, caplog):
    """A gained bias that some fused parts lack is zeros made beside a weight; one number may stand for all rows."""
    for name in ("qwen3_vl_w8a8", "qwen3_vl_w8a8_dynamic"):
        with caplog.at_level(logging.INFO):
            engine_over(msmodelslim(name), num_blocks=64)
    shares = [re.search(r"\((\d+) %\)", record.message) for record in caplog.records if "weights: " in record.message]
    shares = [int(found[1]) for found in shares if found]
    assert len(shares) == 2 and all(90 <= share <= 100 for share in shares)
