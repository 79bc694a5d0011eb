"""deq_scale tensors between float32 and int64: only they change, and a folder is there whole or not at all."""

import errno
import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.checkpoint import writing
from executor.checkpoint.headers import Checkpoint
from executor.commands.cast_scales import bits_of_scale, work
from executor.commands.tool import run_tool
from executor.quant.fields import scale_of_bits

SCALES = torch.tensor([1.5, 3.1415927e-3, 2.0**-23, 7.7e-5])


def floats() -> dict[str, torch.Tensor]:
    return {
        "model.layers.0.mlp.up_proj.weight": torch.arange(-8, 8, dtype=torch.int8).view(4, 4),
        "model.layers.0.mlp.up_proj.deq_scale": SCALES.clone(),
        "model.layers.0.mlp.up_proj.input_scale": torch.tensor([0.25]),
        "model.layers.0.mlp.up_proj.quant_bias": torch.tensor([1, -2, 3, -4], dtype=torch.int32),
        "model.norm.weight": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        "lm_head.deq_scale": SCALES[:1].clone(),
        "odd": torch.tensor([1, 0, 1], dtype=torch.uint8),
    }


@pytest.fixture
def v0(tmp_path):
    """One file without an index, as v0 has it; a tokenizer, a folder, and what a download leaves."""
    folder = tmp_path / "v0"
    (folder / "optional").mkdir(parents=True)
    (folder / ".cache").mkdir()
    save_file(floats(), folder / "quant_model_weight_w8a8.safetensors", {"format": "pt", "made": "here"})
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}))
    for name in ("quant_model_description.json", "tokenizer.json", "merges.txt", "optional/more.bin", ".cache/x"):
        (folder / name).write_text(f'{{"text": "{name}"}}')
    return folder


@pytest.fixture
def v1(tmp_path):
    """Two files and an index."""
    folder = tmp_path / "v1"
    folder.mkdir()
    names = ("quant_model_weights-00001-of-00002.safetensors", "quant_model_weights-00002-of-00002.safetensors")
    tensors, places = floats(), {}
    for file, part in zip(names, (list(tensors)[:3], list(tensors)[3:]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    return folder


def cast(source, target, *options):
    return work(["--model_path", str(source), "--save-directory", str(target), *options])


def tensors_of(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def test_the_two_encodings_of_the_field():
    packed = bits_of_scale(SCALES, plain=False)
    for value, bits in zip(SCALES.tolist(), packed.tolist(), strict=True):
        (plain,) = struct.unpack("<I", struct.pack("<f", value))
        assert bits == (plain & 0xFFFFE000) | 1 << 46  # what npu_trans_quant_param documents
    assert torch.equal(scale_of_bits(bits_of_scale(SCALES, plain=True)), SCALES)
    torch.testing.assert_close(scale_of_bits(packed), SCALES, rtol=2.0**-10, atol=0)


def test_only_the_scales_change(v0, tmp_path):
    document = cast(v0, tmp_path / "out")
    found, before = tensors_of(tmp_path / "out"), floats()
    assert (document["cast"], document["to"]) == (2, "int64")
    for name, x in before.items():
        wanted = bits_of_scale(x, plain=False) if "deq_scale" in name else x
        assert found[name].dtype is wanted.dtype and torch.equal(found[name], wanted), name
    assert writing.read_metadata(tmp_path / "out" / "quant_model_weight_w8a8.safetensors")["made"] == "here"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "float16", "text_config": {"dtype": "float16"}}
    for name in ("quant_model_description.json", "tokenizer.json", "merges.txt", "optional/more.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (v0 / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []


def test_there_and_back_with_all_bits(v1, tmp_path):
    cast(v1, tmp_path / "there", "--plain")
    assert all(x.dtype is torch.int64 for name, x in tensors_of(tmp_path / "there").items() if "deq_scale" in name)
    there = Checkpoint(tmp_path / "there")  # checks the index against the files
    index = json.loads((tmp_path / "there" / "quant_model_weights.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == there.total_bytes
    cast(tmp_path / "there", tmp_path / "back", "--to", "float32")
    found, before = tensors_of(tmp_path / "back"), tensors_of(v1)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype is x.dtype for name, x in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"dtype": "bfloat16"}
    packed = cast(tmp_path / "there", tmp_path / "packed")  # from one int64 form into the other
    assert packed["cast"] == 2


def test_parts_of_compressed_weights(tmp_path):
    """Both have the same names; one of them has been cast already."""
    source = tmp_path / "parts"
    for rank, scale in enumerate((SCALES, bits_of_scale(SCALES, plain=False))):
        (source / f"part{rank}-of-2").mkdir(parents=True)
        held = {"a.deq_scale": scale, "a.index": torch.ones(8, dtype=torch.int8)}
        save_file(held, source / f"part{rank}-of-2" / "w.safetensors")
    (source / "config.json").write_text("{}")
    document = cast(source, tmp_path / "out")
    assert (document["cast"], document["scales"]) == (1, 2)
    for rank in (0, 1):
        held = load_file(tmp_path / "out" / f"part{rank}-of-2" / "w.safetensors")
        assert torch.equal(held["a.deq_scale"], bits_of_scale(SCALES, plain=False)) and held["a.index"].sum() == 8
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    "prepare, options, words",
    [
        (lambda folder: None, ("--to", "float32"), "all 2 deq_scale tensors .* are float32 already"),
        (lambda folder: None, ("--to", "float32", "--plain"), "--plain is a form of int64"),
        (lambda folder: None, ("--to", "int32"), "invalid choice"),
        (lambda folder: (folder / "config.json").unlink(), (), "has no config.json"),
        (lambda folder: save_file({"lm_head.weight": torch.ones(2)}, next(folder.glob("*.safetensors"))), (),
         "has no deq_scale tensors"),
        (lambda folder: save_file({"a.deq_scale": torch.ones(2, dtype=torch.int32)}, next(folder.glob("*.safetens*"))),
         (), "'a.deq_scale' has type I32"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_no_folder(v0, tmp_path, capsys, prepare, options, words):
    prepare(v0)
    words_of = ["--model_path", str(v0), "--save_directory", str(tmp_path / "out"), *options]
    assert run_tool("cast_scales", work, words_of) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert re.search(words, error), error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(v0, tmp_path, capsys):
    held = tmp_path / "held"
    held.mkdir()
    (held / "notes").touch()
    for target, words in ((v0, "is the checkpoint"), (v0 / "config.json", "lies in"), (held, "not empty")):
        assert run_tool("cast_scales", work, ["--model_path", str(v0), "--save_directory", str(target)]) == 2
        assert words in capsys.readouterr().err
    assert run_tool("cast_scales", work, ["--model_path", str(v0 / "absent"), "--save_directory", str(v0)]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("was_there", [False, True])
def test_a_full_disk_leaves_nothing_that_looks_whole(v0, tmp_path, capsys, monkeypatch, was_there):
    def full(info):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "out"
    if was_there:
        target.mkdir()
    monkeypatch.setattr("executor.commands.cast_scales.copied_entry", full)
    words = ["--model_path", str(v0), "--save_directory", str(target)]
    assert run_tool("cast_scales", work, words) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert target.exists() is was_there and not (was_there and list(target.iterdir()))
    monkeypatch.undo()
    (target / writing.STAGING / "torn").mkdir(parents=True)  # what a killed run leaves is no obstacle
    assert run_tool("cast_scales", work, words) == 0
    assert not (target / writing.STAGING).exists() and (target / "config.json").is_file()
