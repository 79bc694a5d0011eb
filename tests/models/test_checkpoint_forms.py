"""The same weights in every form that checkpoints come in give the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint.weights import Checkpoint, load_weights
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError
from executor.parallel.groups import groups
from executor.schedule.request import SamplingParams
from models.qwen3_vl import runner as family
from tests.engines import engine_over
from tests.reference import random_checkpoint

MESSAGES = [{"role": "user", "content": "What color is the circle?"}]


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_vl_moe")


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("qwen2_5"), "qwen2_5_vl")


def first_logits(folder) -> torch.Tensor:
    engine = engine_over(folder)
    logits = []
    forward = engine.runner.forward
    engine.runner.forward = lambda plan: logits.append(forward(plan)) or logits[-1]
    engine.generate([engine.processor.build(MESSAGES)], SamplingParams(max_new_tokens=1))
    return logits[0]


def rewritten(source, target, change):
    """A copy of the checkpoint whose tensors went through `change(dict) -> dict`."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = change(load_file(source / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def is_stacked(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def swapped(tensors):
    return {name: t.transpose(-1, -2) if is_stacked(name) else t for name, t in tensors.items()}


def unstacked(tensors):
    out = {}
    for name, tensor in tensors.items():
        if not is_stacked(name):
            out[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            if kind == "down_proj":
                out[f"{prefix}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                out[f"{prefix}.{expert}.gate_proj.weight"] = gate.clone()
                out[f"{prefix}.{expert}.up_proj.weight"] = up.clone()
    return out


def legacy(tensors):
    out = {}
    for name, tensor in tensors.items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        out[name] = tensor
    return out


@pytest.mark.parametrize("change", [swapped, unstacked, legacy])
def test_forms_of_experts_and_names(moe, tmp_path, change):
    assert any(is_stacked(name) for name in load_file(moe / "model.safetensors"))
    assert torch.equal(first_logits(rewritten(moe, tmp_path / "other", change)), first_logits(moe))


def test_current_and_legacy_names_of_qwen2_5(qwen2_5, tmp_path):
    names = list(load_file(qwen2_5 / "model.safetensors"))
    current = any(name.startswith("model.language_model.") for name in names)

    def rename(tensors):
        if current:
            return legacy(tensors)
        out = {}
        for name, tensor in tensors.items():
            if name.startswith("visual."):
                name = f"model.{name}"
            elif name.startswith("model."):
                name = name.replace("model.", "model.language_model.", 1)
            out[name] = tensor
        return out

    other = rewritten(qwen2_5, tmp_path / "other", rename)
    assert set(load_file(other / "model.safetensors")).isdisjoint(name for name in names if "lm_head" not in name)
    assert torch.equal(first_logits(other), first_logits(qwen2_5))


def test_flat_config_of_published_qwen2_5(qwen2_5, tmp_path):
    other = rewritten(qwen2_5, tmp_path / "other", dict)
    config = json.loads((other / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["architectures"], flat["model_type"] = config["architectures"], "qwen2_5_vl"
    (other / "config.json").write_text(json.dumps(flat))
    assert torch.equal(first_logits(other), first_logits(qwen2_5))


def test_shards_with_an_index(moe, tmp_path):
    other = rewritten(moe, tmp_path / "other", dict)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for shard in range(3):
        file = f"model-0000{shard + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, other / file)
        index |= dict.fromkeys(part, file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(first_logits(other), first_logits(moe))


@pytest.mark.parametrize("change", [dict, swapped, unstacked])
@pytest.mark.parametrize("world_size, tp, ep", [(2, 2, 1), (2, 2, 2), (4, 2, 2), (6, 2, 6)])
def test_ranks_together_hold_every_expert_in_every_form(moe, tmp_path, change, world_size, tp, ep):
    """And no rank takes what another one holds for a stranger in the checkpoint."""
    checkpoint = Checkpoint(rewritten(moe, tmp_path / "other", change))
    config = json.loads((moe / "config.json").read_text())
    device = CpuOps()
    ops.bind(device)
    experts: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(world_size):
        parallel = groups(world_size, tp, ep, "tp", rank, new_group=lambda ranks, buffer_mb: None)
        with torch.device("cpu"):
            model = family.build_model(config, parallel)
        report = load_weights(list(model.pulls(checkpoint.catalog)), checkpoint)
        assert report.unread == ()
        layer = model.language_model.layers[1].mlp.experts
        assert not torch.isnan(layer.down).any()
        experts[parallel.expert_groups.rank, parallel.expert_columns.rank] = layer.down.clone()
    columns = world_size // ep
    down = torch.cat([torch.cat([experts[g, c] for c in range(columns)], dim=2) for g in range(ep)])
    stacked = load_file(moe / "model.safetensors")
    assert torch.equal(down, stacked["model.language_model.layers.1.mlp.experts.down_proj"])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.layers.1.mlp.gate.weight"])
def test_a_missing_tensor_is_named(moe, tmp_path, name):
    other = rewritten(moe, tmp_path / "other", lambda t: {key: value for key, value in t.items() if key != name})
    with pytest.raises(UserError, match=name):
        engine_over(other)


def test_a_wrong_shape_is_named(moe, tmp_path):
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    other = rewritten(moe, tmp_path / "other", lambda t: t | {name: t[name][:, :-2]})
    with pytest.raises(UserError, match=f"{name}.*found shape.*expected"):
        engine_over(other)
