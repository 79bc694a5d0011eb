"""The same weights in every form that checkpoints come in give the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint.names import canonical_name
from executor.checkpoint.strangers import check_unread
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


def wrapped(tensors):
    return {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [swapped, unstacked, legacy, wrapped])
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
        pulls = list(model.pulls(checkpoint.catalog))
        check_unread(pulls, checkpoint)
        report = load_weights(pulls, checkpoint)
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


def with_tensor(source, target, name, tensor):
    return rewritten(source, target, lambda tensors: tensors | {name: tensor})


@pytest.mark.parametrize(
    "name",
    [
        "model.lm_head.weight",
        "language_model.model.lm_head.weight",
        "head.lm_head.weight",
        "model.language_model.layers.3.input_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.visual.blocks.9.norm1.weight",
        "visual.merger.norm.bias_2",
        "model.language_model.layers.0.self_attn.q_proj.bias",
        "model.language_model.norm_2.weight",
        "decoder.layers.0.mlp.experts.0.up_proj.weight",
    ],
)
def test_parts_of_the_model_that_nothing_reads_are_refused(moe, tmp_path, name):
    with pytest.raises(
        UserError, match=f"1 tensors, such as '{canonical_name(name)}' are not read.*config.json belongs"
    ):
        engine_over(with_tensor(moe, tmp_path / "other", name, torch.ones(2)))


@pytest.mark.parametrize("key", ["num_hidden_layers", "depth"])
def test_a_config_that_reads_half_of_the_layers_is_refused(moe, tmp_path, key):
    other = rewritten(moe, tmp_path / "other", dict)
    config = json.loads((other / "config.json").read_text())
    section = config["vision_config" if key == "depth" else "text_config"]
    last = section[key] - 1
    section[key] = last
    if key == "depth":
        section["deepstack_visual_indexes"] = section["deepstack_visual_indexes"][:1]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{last}.*are not read, and the model would answer without them.*{key}"):
        engine_over(other)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.cos_cached",
        "visual.rotary_pos_emb.inv_freq",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp_layers.0.norm.weight",
        "v_head.summary.weight",
    ],
)
def test_extras_that_no_answer_depends_on_are_a_warning_at_most(moe, tmp_path, caplog, name):
    checkpoint = Checkpoint(with_tensor(moe, tmp_path / "other", name, torch.ones(2)))
    ops.bind(CpuOps())
    model = family.build_model(json.loads((moe / "config.json").read_text()))
    pulls = list(model.pulls(checkpoint.catalog))
    check_unread(pulls, checkpoint)
    report = load_weights(pulls, checkpoint)
    assert set(report.unread) <= {canonical_name(name)}
    assert ("1 tensors were not used" in caplog.text) == bool(report.unread) == (not name.endswith("inv_freq"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.self_attn.q_proj.scales",
        "model.layers.0.self_attn.q_proj.zeros",
        "model.layers.0.self_attn.q_proj.qzeros",
        "model.layers.0.mlp.experts.gate_up_proj_scale_inv",
        "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.layers.0.self_attn.q_proj.weight_packed",
    ],
)
def test_scales_beside_the_weights_are_a_quantizers(moe, tmp_path, name):
    """Also where the quantized weight took the place of the plain one."""

    def change(tensors):
        return {key: t for key, t in tensors.items() if "layers.0.self_attn.q_proj" not in key} | {name: torch.ones(2)}

    for other in (with_tensor(moe, tmp_path / "a", name, torch.ones(2)), rewritten(moe, tmp_path / "b", change)):
        with pytest.raises(UserError, match="scheme.*take the float checkpoint of the same model"):
            engine_over(other)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_a_narrow_type_are_a_quantizers(moe, tmp_path, dtype):
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    other = rewritten(moe, tmp_path / "other", lambda tensors: tensors | {key: tensors[key].to(dtype)})
    with pytest.raises(UserError, match=f"{key}.* has type .*these are quantized weights.*take the float checkpoint"):
        engine_over(other)
