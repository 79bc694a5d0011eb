"""Folders that hold something else than a model this project reads: adapters, other quantizers; heads of their own."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import head as head_module
from executor.checkpoint.foreign import find_quantization, refuse_adapter
from executor.checkpoint.head import settle_head
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare
from tests.engines import engine_over
from tests.models.test_checkpoint_forms import first_logits
from tests.reference import REPO

TINY = REPO / "models" / "tiny" / "qwen2_5_vl"  # tied
EMBEDDING = "model.embed_tokens.weight"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}

ADAPTERS = (
    "adapters.safetensors",
    "non_lora_state_dict.bin",
    "non_lora_trainables.bin",
    "0000100_adapters.safetensors",
)
ADAPTERS += ("pytorch_lora_weights.safetensors", "lora.safetensors")


def copy_of(folder: Path, source: Path = TINY, **config: object) -> Path:
    """The checkpoint with a changed config.json; weights are linked."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    changed = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def prepared(folder: Path):
    return prepare(build_recipe({"model_config": {"model_path": str(folder), "device": "cpu"}}))


# Adapters


def test_an_adapter_alone_is_named_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as error:
        prepared(tmp_path)
    for words in (
        f"{tmp_path} is a LoRA adapter of Qwen/Qwen2.5-VL-3B-Instruct (adapter_config.json and adapter_model.",
        "not a whole model",
        "from_pretrained('Qwen/Qwen2.5-VL-3B-Instruct')",
        "merge_and_unload()",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "names",
    [("adapter_config.json",), ("adapter_model.safetensors",), ("adapter_model.bin",), *((name,) for name in ADAPTERS)],
)
def test_an_adapter_beside_a_model_is_not_ignored(tmp_path, names):
    folder = copy_of(tmp_path / "model")
    for name in names:
        (folder / name).write_text(json.dumps(ADAPTER))
    with pytest.raises(UserError, match=f"adapter \\({names[0]}\\) beside a model.*\n.*\n.*merge_and_unload.*\n.*move"):
        prepared(folder)


@pytest.mark.parametrize("content", [{}, {"peft_type": 3, "base_model_name_or_path": None}])
def test_an_adapter_that_says_nothing_of_itself(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is an adapter .adapter_config.json., not a whole model"):
        refuse_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", *ADAPTERS])
def test_an_adapter_in_a_folder_of_the_model_is_named(tmp_path, caplog, name):
    folder = copy_of(tmp_path / "model")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / name).write_text("{}")
    (folder / "figures").mkdir()
    prepared(folder)
    (record,) = [record for record in caplog.records if "adapter" in record.message]
    assert record.levelno == logging.WARNING
    assert f"{folder}: the folder in it, checkpoint-100, holds an adapter ({name}), which is not" in record.message


def test_a_model_without_an_adapter_is_none(tmp_path):
    refuse_adapter(copy_of(tmp_path / "model"))


# Other quantizers


@pytest.mark.parametrize(
    "config, words",
    [
        ({"quantization_config": {"quant_method": method}}, f"quantized by {method} .config.json: quantization_config")
        for method in ("fp8", "awq", "gptq", "bitsandbytes", "compressed-tensors", "modelopt", "torchao", "hqq", "eetq")
    ]
    + [
        ({"quantization_config": {"load_in_4bit": True}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"config_groups": {}}}, "quantized by compressed-tensors"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantized by mlx .config.json: quantization"),
        ({"quantize": "w8a8"}, "quantized by msmodelslim, whose quant_model_description.*.json is not in the folder"),
        ({"quantization_config": {"bits": 4}}, "quantized by a quantizer without a name"),
        ({"quantization_config": "fp8"}, "quantized by fp8"),
        (
            {"compression_config": {"quant_method": "sparseml"}},
            "by sparseml .config.json: compression_config",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8 .config.json: text_config: quantiz"),
    ],
)
def test_quantizers_that_config_json_names(tmp_path, config, words):
    with pytest.raises(UserError, match=f"{words}.*which this project does not read; take the float checkpoint"):
        find_quantization(tmp_path, config)


@pytest.mark.parametrize(
    "name, content, quantizer",
    [
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("hf_quant_config.json", {"quantization": {}}, "modelopt"),
        ("quantize_config.json", {"bits": 4, "quant_method": "gptq"}, "gptq"),
        ("quantize_config.json", {"bits": 4}, "gptq"),
        ("quant_config.json", {"w_bit": 4}, "awq"),
    ],
)
def test_quantizers_with_a_file_of_their_own(tmp_path, name, content, quantizer):
    folder = copy_of(tmp_path / "model")
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"the checkpoint is quantized by {quantizer} .{name}., which this"):
        prepared(folder)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_float_weights_are_not_quantized(tmp_path, config):
    assert find_quantization(tmp_path, config) == "none"


def test_msmodelslim_describes_itself_whatever_else_is_said(tmp_path):
    described = {"model_quant_type": "W8A8_DYNAMIC", "lm_head.weight": "W8A8_DYNAMIC"}
    (tmp_path / "quant_model_description.json").write_text(json.dumps(described))
    assert find_quantization(tmp_path, {"quantization_config": {"quant_method": "fp8"}}) == "w8a8_dynamic"


# A head in the weights of a model that says it is tied


def with_head(folder: Path, head: torch.Tensor | None, **config: object) -> Path:
    copy_of(folder, **config)
    tensors = load_file(TINY / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors if head is None else tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    return load_file(TINY / "model.safetensors")[EMBEDDING]


def test_a_head_that_differs_is_taken(tmp_path, embedding, caplog, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 64 << 10)
    head = embedding.clone()
    head[-1, -1] += 1  # in the last chunk
    folder = with_head(tmp_path / "own", head)
    with caplog.at_level(logging.WARNING):
        settled = prepared(folder)
    assert settled.config["tie_word_embeddings"] is False and not settled.shapes.tied_embeddings
    (record,) = [record for record in caplog.records if "lm_head" in record.message]
    assert "lm_head.weight of the weights differs from the embedding and is taken" in record.message
    # The memory estimate knows of it, too.
    assert settled.memory.weights_bytes - prepared(TINY).memory.weights_bytes == embedding.nbytes


def test_the_answers_are_those_of_the_head(tmp_path, embedding):
    head = embedding.flip(0).contiguous()
    own = first_logits(with_head(tmp_path / "own", head))
    assert torch.equal(own, first_logits(with_head(tmp_path / "untied", head, tie_word_embeddings=False)))
    assert not torch.equal(own, first_logits(TINY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_equal_head_is_fine(tmp_path, embedding, caplog, dtype):
    folder = with_head(tmp_path / "equal", embedding.to(dtype))
    with caplog.at_level(logging.WARNING):
        settled = prepared(folder)
    assert settled.shapes.tied_embeddings and "lm_head" not in caplog.text
    assert settled.memory.weights_bytes == prepared(TINY).memory.weights_bytes


def test_an_outer_false_without_a_head_is_refused_with_what_to_do(tmp_path):
    """The outer word counts: transformers writes true into the text_config of untied mixtures of experts."""
    folder = copy_of(tmp_path / "incomplete", tie_word_embeddings=False)
    assert json.loads((folder / "config.json").read_text())["text_config"]["tie_word_embeddings"] is True
    with pytest.raises(UserError, match="'lm_head.weight' is missing.*tie_word_embeddings: true in config.json"):
        engine_over(folder)


def test_an_outer_false_with_a_head_is_untied(tmp_path, embedding, caplog):
    folder = with_head(tmp_path / "untied", embedding.clone(), tie_word_embeddings=False)
    with caplog.at_level(logging.WARNING):
        assert not prepared(folder).shapes.tied_embeddings
    assert "lm_head" not in caplog.text


def test_weights_of_an_untied_model_are_not_looked_at(tmp_path):
    config = {"tie_word_embeddings": False}
    assert settle_head(tmp_path / "nowhere", config, tied=False) is config


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_damaged_weights_are_left_to_the_loader(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x10\0\0\0\0\0\0\0[")
    config = {"tie_word_embeddings": True}
    assert settle_head(tmp_path, config, tied=True) is config
