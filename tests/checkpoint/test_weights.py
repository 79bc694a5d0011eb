"""Checkpoints are read slice by slice, bit for bit, and every defect of a folder is named."""

import json
import logging
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from executor.checkpoint.headers import Checkpoint, read_header
from executor.checkpoint.names import canonical_name
from executor.checkpoint.weights import Pull, check_complete, load_weights, poison, unwritten
from executor.errors import UserError


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "model.language_model.embed_tokens.weight": random(12, 8),
        "model.language_model.layers.0.mlp.experts.gate_up_proj": random(3, 8, 10),
        "model.language_model.norm.weight": random(8, dtype=torch.float32),
        "model.visual.patch_embed.proj.weight": random(6, 4, dtype=torch.float16),
        "lm_head.weight": random(12, 8),
    }


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2, index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def pull_all(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[Pull]:
    return [
        Pull(name, tuple(tensor.shape), (), torch.full(tensor.shape, float("nan"), dtype=dtype or tensor.dtype))
        for name, tensor in tensors.items()
    ]


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError, match=".*".join(re.escape(part) for part in parts)):
        Checkpoint(folder)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_everything_arrives_bit_for_bit(tmp_path, index, shards):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors, shards, index))
    assert checkpoint.catalog.keys() == tensors.keys()
    assert all(checkpoint.catalog[name].shape == tensor.shape for name, tensor in tensors.items())
    assert all(checkpoint.catalog[name].dtype is tensor.dtype for name, tensor in tensors.items())
    pulls = pull_all(tensors)
    report = load_weights(pulls, checkpoint)
    assert all(torch.equal(pull.into, tensors[pull.name]) for pull in pulls)
    assert report.unread == () and report.share == 1.0
    assert report.bytes_read == sum(tensor.nbytes for tensor in tensors.values()) == checkpoint.total_bytes


def test_single_file_wins_over_other_safetensors(tmp_path):
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    save_file({"lora.weight": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    assert list(Checkpoint(tmp_path).catalog) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("original", "canonical"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("something.else", "something.else"),
        ("module.visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("module.module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.model.norm.weight", "model.language_model.norm.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("_forward_module.model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        (
            "model.language_model._orig_mod.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight",
            "model.language_model.layers.3.mlp.up_proj.weight",
        ),
        ("model.visual.module.weight", "model.visual.module.weight"),
    ],
)
def test_canonical_names(original, canonical):
    assert canonical_name(original) == canonical


def test_legacy_names_load(tmp_path):
    tensors = {"visual.merger.weight": torch.randn(3, 2), "model.norm.weight": torch.randn(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    pulls = [
        Pull("model.visual.merger.weight", (3, 2), (), torch.zeros(3, 2)),
        Pull("model.language_model.norm.weight", (4,), (), torch.zeros(4)),
    ]
    load_weights(pulls, Checkpoint(tmp_path))
    assert torch.equal(pulls[0].into, tensors["visual.merger.weight"])
    assert torch.equal(pulls[1].into, tensors["model.norm.weight"])


def test_slices_into_views_of_a_fused_parameter_with_cast(tmp_path):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    fused = torch.full((2, 8, 6), float("nan"))
    pulls = [
        Pull(name, (3, 8, 10), (slice(1, 3), slice(None), slice(2, 4)), fused[:, :, :2]),
        Pull(name, (3, 8, 10), (slice(1, None), slice(0, 8), slice(-4, 10)), fused[:, :, 2:]),
    ]
    report = load_weights(pulls, checkpoint)
    whole = tensors[name].float()
    assert torch.equal(fused, torch.cat([whole[1:, :, 2:4], whole[1:, :, 6:]], dim=-1))
    assert report.bytes_read == fused.numel() * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transposed_pulls_index_in_the_models_orientation(tmp_path, dtype):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    into = torch.zeros(3, 4, 8, dtype=dtype)
    load_weights([Pull(name, (3, 10, 8), (slice(None), slice(3, 7)), into, transpose=True)], checkpoint)
    assert torch.equal(into, tensors[name].transpose(-1, -2)[:, 3:7].to(dtype))


def test_all_ranks_together_read_the_checkpoint_once(tmp_path):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    name = "model.language_model.embed_tokens.weight"
    parts = [torch.zeros(3, 8, dtype=torch.bfloat16) for _ in range(4)]
    reports = [
        load_weights([Pull(name, (12, 8), (slice(3 * rank, 3 * rank + 3),), part)], checkpoint)
        for rank, part in enumerate(parts)
    ]
    assert torch.equal(torch.cat(parts), tensors[name])
    assert [report.bytes_read for report in reports] == [tensors[name].nbytes // 4] * 4


def test_tied_tensor_is_pulled_twice(tmp_path):
    tensors = make_tensors()
    name = "model.language_model.embed_tokens.weight"
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    pulls = [Pull(name, (12, 8), (), torch.zeros(12, 8)) for _ in range(2)]
    load_weights(pulls, checkpoint)
    assert all(torch.equal(pull.into, tensors[name].float()) for pull in pulls)


def test_scalars_and_empty_tensors_load(tmp_path):
    save_file({"scale": torch.tensor(2.5), "none": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    pulls = [Pull("scale", (), (), torch.tensor(0.0)), Pull("none", (0, 4), (), torch.zeros(0, 4))]
    assert load_weights(pulls, Checkpoint(tmp_path)).bytes_read == 4
    assert pulls[0].into.item() == 2.5


def test_unread_tensors_are_reported_once_and_ignored_ones_are_not(tmp_path, caplog):
    tensors = make_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    name = "model.language_model.norm.weight"
    with caplog.at_level(logging.WARNING):
        report = load_weights(
            [Pull(name, (8,), (), torch.zeros(8))], checkpoint, ignore=("lm_head.*", "model.visual.*")
        )
    assert sorted(report.unread) == [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
    ]
    (record,) = [record for record in caplog.records if "not used" in record.message]
    assert "model.language_model.embed_tokens.weight" in record.message


def test_speed_and_progress_are_logged(tmp_path, caplog, monkeypatch):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_sharded(tmp_path, tensors))
    monkeypatch.setattr("executor.checkpoint.weights.PROGRESS_LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        load_weights(pull_all(tensors), checkpoint, progress=True)
    assert any("GB/s" in record.message for record in caplog.records)
    assert sum(record.message.startswith("weights:") for record in caplog.records) == len(tensors) + 1


# Pulls that cannot be served


def test_missing_tensor_names_the_nearest(tmp_path):
    checkpoint = Checkpoint(write_sharded(tmp_path, make_tensors()))
    into = torch.zeros(8)
    with pytest.raises(
        UserError, match="'model.language_model.norms.weight' is missing.*'model.language_model.norm.we"
    ):
        load_weights([Pull("model.language_model.norms.weight", (8,), (), into)], checkpoint)
    with pytest.raises(UserError, match="'a.weight' is missing and 1 more, such as 'b.weight'"):
        load_weights([Pull(name, (8,), (), into) for name in ("b.weight", "a.weight")], checkpoint)
    with pytest.raises(UserError, match="'lm_heads.weight' is missing"):
        checkpoint.find("lm_heads.weight")
    assert checkpoint.find("lm_head.weight").shape == (12, 8)


def test_wrong_shape_is_refused_before_anything_is_copied(tmp_path):
    checkpoint = Checkpoint(write_sharded(tmp_path, make_tensors()))
    first = Pull("lm_head.weight", (12, 8), (), torch.zeros(12, 8))
    wrong = Pull("model.language_model.norm.weight", (16,), (), torch.zeros(16))
    with pytest.raises(UserError, match=r"norm.weight'.*shape \[8\], but the model expects \[16\]"):
        load_weights([first, wrong], checkpoint)
    assert not first.into.any()


def test_types_that_do_not_convert(tmp_path):
    save_file(
        {"int8": torch.ones(4, dtype=torch.int8), "float8": torch.ones(4).to(torch.float8_e4m3fn)},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(UserError, match="'int8'.*I8.*does not convert to float32.*quant_model_description.json"):
        load_weights([Pull("int8", (4,), (), torch.zeros(4))], checkpoint)
    with pytest.raises(UserError, match="'float8'.*F8_E4M3.*quantized weights.*take the float"):
        load_weights([Pull("float8", (4,), (), torch.zeros(4))], checkpoint)
    wide = Pull("int8", (4,), (), torch.zeros(4, dtype=torch.int32))
    load_weights([wide], checkpoint, ignore=("float8",))
    assert wide.into.tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="does not convert to uint8"):
        load_weights([Pull("int8", (4,), (), torch.zeros(4, dtype=torch.uint8))], checkpoint)


def test_an_adapter_among_the_weights_is_not_left_out(tmp_path):
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.weight": torch.ones(2, 2), f"{layer}.lora_A.weight": torch.ones(1, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    pull = Pull("model.language_model.layers.0.self_attn.q_proj.weight", (2, 2), (), torch.zeros(2, 2))
    with pytest.raises(UserError, match="an adapter that was not merged .1 tensors, such as .*lora_A.weight.*peft"):
        load_weights([pull], Checkpoint(tmp_path))
    assert not pull.into.any()


def test_values_beyond_float16_are_refused(tmp_path):
    save_file({"big": torch.tensor([[1.0, 1e6]]).bfloat16()}, tmp_path / "model.safetensors")
    for shape, transpose in (((1, 2), False), ((2, 1), True)):
        pull = Pull("big", shape, (), torch.zeros(shape, dtype=torch.float16), transpose)
        with pytest.raises(UserError, match="'big'.*float16 cannot hold.*bfloat16"):
            load_weights([pull], Checkpoint(tmp_path))


def test_a_pull_whose_place_does_not_fit_is_our_defect(tmp_path):
    checkpoint = Checkpoint(write_sharded(tmp_path, make_tensors()))
    with pytest.raises(AssertionError, match="lm_head.weight"):
        load_weights([Pull("lm_head.weight", (12, 8), (slice(0, 4),), torch.zeros(5, 8))], checkpoint)


# Folders that are no checkpoint


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "does not exist", "model_path")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file", "folder")


def test_folder_without_weights(tmp_path):
    refused(tmp_path, "no *.safetensors", "nothing")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no *.safetensors", "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "'pytorch_model.bin'", "Convert to safetensors: ")


def test_missing_shards(tmp_path):
    indexed = write_sharded(tmp_path / "indexed", make_tensors(), 3)
    (indexed / "model-00002-of-00003.safetensors").unlink()
    refused(indexed, "index.json", "1 of 3 shards are missing: model-00002-of-00003.safetensors")
    plain = write_sharded(tmp_path / "plain", make_tensors(), 3, index=False)
    (plain / "model-00003-of-00003.safetensors").unlink()
    refused(plain, "1 of 3 shards are missing: model-00003-of-00003.safetensors")


def test_bad_indices(tmp_path):
    folder = write_sharded(tmp_path, make_tensors())
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": good["weight_map"] | {"lm_tail.weight": "model-00001-of-00002.safetensors"}})
    )
    refused(folder, "'lm_tail.weight'", "does not hold it")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    refused(folder, "'../other.safetensors'", "same folder")
    index.write_text('{"weight_map": ')
    refused(folder, "index.json", "weight_map")
    index.write_text("[]")
    refused(folder, "index.json", "weight_map")
    index.rename(folder / "a.safetensors.index.json")
    (folder / "b.safetensors.index.json").write_text("{}")
    refused(folder, "more than one index", "a.safetensors.index.json, b.safetensors.index.json")


def test_duplicates_are_refused_unless_the_index_decides(tmp_path):
    values = {"a.safetensors": torch.tensor([1.0]), "b.safetensors": torch.tensor([2.0])}
    for file, value in values.items():
        save_file({"x": value, f"only_{file[0]}": value + 5}, tmp_path / file)
    refused(tmp_path, "tensor 'x' is there twice", "a.safetensors", "b.safetensors")
    for chosen, value in values.items():
        weight_map = {"x": chosen, "only_a": "a.safetensors", "only_b": "b.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        into = torch.zeros(1)
        load_weights([Pull("x", (1,), (), into)], Checkpoint(tmp_path), ignore=("only_*",))
        assert torch.equal(into, value)


def test_legacy_and_current_name_of_one_tensor_are_a_duplicate(tmp_path):
    save_file({"visual.x": torch.ones(2), "model.visual.x": torch.ones(2)}, tmp_path / "model.safetensors")
    refused(tmp_path, "'model.visual.x' is there twice", "as 'visual.x'")


# Damaged files


def damage(tmp_path: Path, change) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(64.0), "y": torch.ones(3)}, file)
    file.write_bytes(change(file.read_bytes()))
    return tmp_path


def with_header(header: dict, data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda raw: raw[:-1], ("truncated: 267 bytes", "announces 268")),
        (lambda raw: raw[:20], ("truncated",)),
        (lambda raw: raw[:5], ("truncated, 5 bytes",)),
        (lambda raw: b"", ("truncated, 0 bytes",)),
        (lambda raw: raw + b"!", ("too long",)),
        (lambda raw: b"\x80\x02}q\x01X\x04\x09" + raw, ("not a safetensors file",)),
        (lambda raw: raw[:9] + b"\xff\xff" + raw[11:], ("header is damaged",)),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("git lfs pull",)),
        (lambda raw: with_header({"x": F32_PAIR | {"shape": [3]}}, b"\0" * 8), ("damaged", "tensor 'x'")),
        (lambda raw: with_header({"x": {"dtype": "F32"}}, b""), ("damaged", "data_offsets")),
        (lambda raw: with_header({"x": F32_PAIR, "y": F32_PAIR}, b"\0" * 8), ("'y' does not follow",)),
        (lambda raw: with_header({"x": [1]}, b""), ("damaged",)),
        (lambda raw: with_header([1], b""), ("damaged",)),
    ],
)
def test_damaged_files_are_named(tmp_path, change, parts):
    refused(damage(tmp_path, change), "model.safetensors", *parts)


def test_an_intact_file_passes_and_keeps_file_order(tmp_path):
    infos = read_header(damage(tmp_path, lambda raw: raw) / "model.safetensors")
    assert [info.original_name for info in infos] == ["x", "y"]
    assert infos[1].offset == infos[0].num_bytes == 256


# Nothing of the model is left out


def pulls_of(module: nn.Module, skip: str = "") -> list[Pull]:
    return [Pull(name, tuple(p.shape), (), p) for name, p in module.named_parameters() if name != skip]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_check_complete_finds_what_no_pull_fills(device):
    module = nn.Sequential(nn.Linear(4, 6, device=device), nn.Linear(6, 2, device=device))
    check_complete(module, pulls_of(module))
    with pytest.raises(AssertionError, match=r"1.bias \[2\]: 0 of 2"):
        check_complete(module, pulls_of(module, skip="1.bias"))

    weight = module[0].weight
    halves = [Pull("a", (4, 4), (), weight.detach()[:4]), Pull("b", (2, 4), (), weight.detach()[4:])]
    rest = pulls_of(module, skip="0.weight")
    check_complete(module, halves + rest)
    with pytest.raises(AssertionError, match=r"0.weight \[6, 4\]: 16 of 24"):
        check_complete(module, halves[:1] + rest)
    check_complete(module, halves[:1] + rest, partial=("0.*",))
    with pytest.raises(AssertionError, match="0.weight"):
        check_complete(module, rest, partial=("0.*",))
    overlapping = [Pull("a", (3, 4), (), weight.detach()[:3]), Pull("b", (3, 4), (), weight.detach()[2:5])]
    with pytest.raises(AssertionError, match="0.weight"):
        check_complete(module, overlapping + rest)


def test_sentinel_is_gone_after_loading(tmp_path):
    module = nn.Linear(4, 6)
    module.scale = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, tmp_path / "model.safetensors")
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    poison(module)
    assert sorted(unwritten(module)) == ["bias", "scale", "weight"]
    load_weights(pulls_of(module, skip="bias"), Checkpoint(tmp_path))
    assert unwritten(module) == ["bias"]
    load_weights(pulls_of(module), Checkpoint(tmp_path))
    assert unwritten(module) == []
    assert all(torch.equal(p, expected[name]) for name, p in module.named_parameters())
