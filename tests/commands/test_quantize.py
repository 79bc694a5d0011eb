"""The command quantize: what it refuses, and msmodelslim driven as a process, by a stand-in for its command."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.calibrate import memory, run
from executor.calibrate.vendor import model_type
from executor.calibrate.write import is_other_file
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.writing import copy_files
from executor.commands.quantize import work
from executor.commands.tool import run_tool
from models.published import published_config, published_shapes
from tests.calibrate.making import quantized, read, tiny, words, write_calibration

TOOL = """#!{python}
import json, os, shutil, sys, yaml
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "quant" and sys.stdin.read() == ""
recipe = yaml.safe_load(open(words["--config_path"]))
pictures = recipe["spec"]["dataset"]
rows = [json.loads(line) for line in open(os.path.join(pictures, "index.jsonl"))]
for place in (pictures, words["--model_path"], words["--save_path"], words["--config_path"]):
    assert not os.stat(place).st_mode & 0o022, place
heads = [open(os.path.join(pictures, row["image"]), "rb").read(4) for row in rows]
json.dump({{"words": words, "recipe": recipe, "rows": rows, "heads": len([h for h in heads if h == b"\\x89PNG"])}},
          open({seen!r}, "w"))
print("quantizing")
if {fails}:
    sys.exit("no layer is called so")
for name in os.listdir({written!r}):
    if name.startswith("quant_model") or name == "config.json":
        shutil.copy(os.path.join({written!r}, name), words["--save_path"])
open(os.path.join(words["--save_path"], "x_best_practice.yaml"), "w").close()
"""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration") / "set")


def refused(capsys, *argv: object) -> str:
    """The error of a command line that must be refused with status 2."""
    status = run_tool("quantize", work, [str(word) for word in argv])
    out, err = capsys.readouterr()
    document = json.loads(out.splitlines()[-1])
    assert status == 2 and document["command"] == "quantize" and f"error: {document['error']}" in err
    return document["error"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_path": "/nowhere/at/all"}, "--model_path: /nowhere/at/all does not exist"),
        ({"calibration": "/no/pictures"}, "--calibration: there is no folder or file /no/pictures"),
        ({"calibration": None}, "--calibration: w8a8 measures activations: name a folder of about 32 pictures"),
        ({"scheme": "w8a9"}, "got w8a9; one of w8a8, "),
        ({"scheme": "w4a8_dynamic"}, "this model is dense; use w8a8_dynamic"),
        ({"smooth": "1.5"}, "--smooth: got 1.5; a number from 0 (none) to below 1"),
        ({"percentile": "50"}, "--percentile: got 50; from 90 to 100"),
        ({"percentile": "99", "scheme": "w8a8_dynamic"}, "--percentile: w8a8_dynamic has no scale that is measured"),
        ({"smooth": "0.5", "scheme": "w8a16"}, "--smooth: activations stay float with w8a16"),
        ({"samples": "0"}, "--samples: got 0; at least 1"),
        ({"keep_float": "*.layer.0.*"}, "--keep_float: no linear is called *.layer.0.*"),
        ({"keep_float": "*"}, "--keep_float: it leaves no linear to quantize"),
        ({"dtype": "float16", "device": "npu"}, "--device: npu needs torch_npu beside torch"),
        ({"tool": "msmodelslim"}, "--tool msmodelslim: the command msmodelslim is not on the PATH"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    change, said, calibration, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", "/nothing")
    flags = {"model_path": tiny("qwen3_vl"), "save_directory": tmp_path / "out", "scheme": "w8a8", "device": "cpu"}
    flags |= {"calibration": calibration} | change
    argv = [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
    assert said in refused(capsys, *argv)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_quantized_source_is_refused(msmodelslim, tmp_path, capsys, calibration):
    argv = words(msmodelslim("qwen3_vl_w8a16"), tmp_path / "out", "w8a8", calibration)
    assert "is quantized already (w8a16); give the float checkpoint" in refused(capsys, *argv)


def test_a_folder_that_holds_anything_else_is_refused(calibration, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in refused(capsys, *words(tiny("qwen3_vl"), out, "w8a8", calibration))
    (out / "notes.txt").unlink()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny("qwen3_vl"), out, "w8a8", calibration)
    other = refused(capsys, *words(tiny("qwen3_vl"), out, "w8a8", calibration, "--smooth", "0.7"))
    assert "an unfinished quantization with other settings (smooth)" in other
    other = refused(capsys, *words(tiny("qwen3_vl"), out, "w8a8", write_calibration(tmp_path / "set", 3)))
    assert "an unfinished quantization with another calibration set" in other


def test_a_machine_with_too_little_memory_is_refused(calibration, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "host_memory_bytes", lambda: 100 << 20)
    said = refused(capsys, *words(tiny("qwen3_vl"), tmp_path / "out", "w8a8", calibration))
    assert "its largest layer and the longest calibration sample need 0.2 GB of memory, and 0.1 GB are free" in said
    assert memory.SLACK_BYTES < 200 << 20


def test_rows_that_cannot_be_asked_are_left_out_and_none_is_an_error(tmp_path, capsys, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"question": "What is it?", "image": "gone.png"}\nno JSON\n')
    said = refused(capsys, *words(tiny("qwen3_vl"), tmp_path / "out", "w8a8", folder))
    assert "none of the rows of" in said and "gone.png" in caplog.text
    (folder / "rows.jsonl").write_text('{"question": "How are you?"}\n')
    said = refused(capsys, *words(tiny("qwen3_vl"), tmp_path / "out2", "w8a8", folder))
    assert "holds no picture or video" in said and "--no-quantize_vision" in said


def test_float16_models_and_a_float_encoder(calibration, tmp_path):
    """deq_scale is int64 there; --no-quantize_vision, --keep_float and --quantize say which linears are meant."""
    source = tmp_path / "half"
    shutil.copytree(tiny("qwen3_vl"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tensors = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    out = tmp_path / "out"
    more = ["--no-quantize_vision", "--keep_float", "*.layers.0.self_attn.q_proj", "--quantize", "*.layers.1.mlp.down*"]
    quantized(source, out, "w8a8", calibration, *more)
    catalog = Checkpoint(out).catalog
    scaled = {name.removesuffix(".deq_scale") for name in catalog if name.endswith(".deq_scale")}
    assert {catalog[f"{name}.deq_scale"].dtype_name for name in scaled} == {"I64"}
    text = "model.language_model.layers"
    assert not any(".visual." in name for name in scaled)
    assert f"{text}.1.mlp.down_proj" in scaled and f"{text}.0.mlp.down_proj" not in scaled
    assert not {f"{text}.0.self_attn.{name}_proj" for name in "qkv"} & scaled  # multiplied together, float together
    assert f"{text}.0.self_attn.o_proj" in scaled and f"{text}.1.self_attn.q_proj" in scaled


@pytest.mark.parametrize("missing", ["model.language_model.layers.1.mlp.up_proj.weight", "merges.txt", "norm"])
def test_a_source_that_is_not_whole_is_refused_before_anything_is_written(missing, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("qwen3_vl"), source)
    name = {"norm": "model.language_model.layers.1.input_layernorm.weight"}.get(missing, missing)
    if missing.endswith(".txt"):
        (source / "tokenizer.json").unlink()
        (source / name).unlink()
    else:
        tensors = load_file(source / "model.safetensors")
        del tensors[name]
        save_file(tensors, source / "model.safetensors")
    said = refused(capsys, *words(source, out, "w8a16", None))
    assert said.startswith("--model_path: ") and name in said and str(source) in said and str(out) not in said
    assert not out.exists()


def test_a_place_that_cannot_be_one(tmp_path, capsys):
    source, file = tmp_path / "source", tmp_path / "file"
    shutil.copytree(tiny("qwen3_vl"), source)
    file.write_text("")
    assert f"{source / 'out'} lies in the checkpoint" in refused(capsys, *words(source, source / "out", "w8a16", None))
    assert "holds the checkpoint that is read" in refused(capsys, *words(source, tmp_path, "w8a16", None))
    for out in (file, file / "out"):
        said = refused(capsys, *words(source, out, "w8a16", None))
        assert f"--save_directory: {file} is a file" in said and "go on" not in said
    said = refused(capsys, *words(source, Path("/proc/x/out"), "w8a16", None))
    assert "--save_directory: /proc/x/out/.quantize cannot be made" in said and "go on" not in said


def test_other_checkpoints_below_the_source_are_left(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for name in (
        "other/quant_model_description.json",
        "deep/er/config.json",
        "w/a.safetensors",
        "assets/a.txt",
        "a.txt",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
        (source / name).with_name("beside.json").write_text("{}")
    copy_files(source, out, is_other_file)
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert copied == {"assets/a.txt", "assets/beside.json", "a.txt", "beside.json"}


def test_experts_that_stay_float_are_written_one_by_one(tmp_path):
    out, source = tmp_path / "out", Checkpoint(tiny("qwen3_vl_moe"))
    quantized(tiny("qwen3_vl_moe"), out, "w8a16", None, "--keep_float", "*.layers.1.mlp.experts.*")
    tensors, types = read(out)
    stem = "model.language_model.layers.1.mlp.experts"
    assert not any(name.startswith(f"{stem}.gate_up") for name in tensors)
    stack = load_file(source.files[0])
    gate_up, down = stack[f"{stem}.gate_up_proj"], stack[f"{stem}.down_proj"]  # [E, k, n], as they are published
    inner = down.shape[1]
    for expert in range(len(gate_up)):
        wanted = {"gate_proj": gate_up[expert, :, :inner], "up_proj": gate_up[expert, :, inner:]}
        for name, weight in {**wanted, "down_proj": down[expert]}.items():
            assert torch.equal(tensors[f"{stem}.{expert}.{name}.weight"], weight.t())
            assert types[f"{stem}.{expert}.{name}.weight"] == "FLOAT"


@pytest.mark.parametrize("scheme, more", [("w8a16", ()), ("w8a8_dynamic", ("--smooth", "0"))])
def test_what_measures_nothing_needs_no_calibration_set(scheme, more, tmp_path):
    document = quantized(tiny("qwen3_vl_moe"), tmp_path / "out", scheme, None, *more)
    assert document["num_samples"] == 0 and document["kinds"][scheme.upper()] >= 64


def test_check_judges_a_folder_and_makes_none(msmodelslim, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(msmodelslim("qwen3_vl_w8a8"), folder)
    document = work(["--check", str(folder)])
    assert document["types"]["W8A8"] == 36
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refused(capsys, "--check", folder)
    assert "give it alone" in refused(capsys, "--check", folder, "--save_directory", tmp_path / "out")


# ---- msmodelslim


@pytest.fixture
def tool(tmp_path, monkeypatch, msmodelslim):
    """Puts a stand-in on the PATH; it writes down what it was given. Call it with whether it fails."""
    seen, folder = tmp_path / "seen.json", tmp_path / "bin"

    def install(fails: bool = False) -> Path:
        folder.mkdir(exist_ok=True)
        script = TOOL.format(
            python=sys.executable, seen=str(seen), written=str(msmodelslim("qwen3_vl_w8a8")), fails=fails
        )
        (folder / "msmodelslim").write_text(script)
        (folder / "msmodelslim").chmod(0o755)
        return seen

    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return install


@pytest.fixture
def guarded(tmp_path) -> Path:
    """The tiny checkpoint in files that nobody else may write to."""
    source = tmp_path / "float"
    shutil.copytree(tiny("qwen3_vl"), source)
    for path in (source, *source.iterdir()):
        path.chmod(0o750 if path.is_dir() else 0o640)
    return source


def test_the_tool_is_driven_where_it_is_installed(tool, guarded, calibration, tmp_path):
    seen = tool()
    document = quantized(guarded, tmp_path / "out", "w8a8", calibration)
    assert document["tool"] == "msmodelslim" and document["num_samples"] == 7  # its clip is no picture
    given = json.loads(seen.read_text())
    options = given["words"]
    assert options["--model_type"] == "Qwen3-VL-32B-Instruct" and options["--trust_remote_code"] == "False"
    assert options["--device"] == "cpu" and options["--model_path"] == str(guarded)
    assert given["heads"] == 7 and all(row["text"] for row in given["rows"])
    steps = given["recipe"]["spec"]["process"]
    assert [step["type"] for step in steps] == ["quarot", "iter_smooth", "linear_quant"]
    assert steps[2]["qconfig"]["act"]["scope"] == "per_tensor" and not steps[2]["qconfig"]["act"]["symmetric"]
    assert "model.language_model.layers.*.mlp.down_proj" in steps[2]["exclude"]
    assert steps[1]["alpha"] == 0.9 and steps[1]["scale_min"] == 1e-5  # numbers, for YAML's idea of one
    out = tmp_path / "out"
    assert (out / "merges.txt").read_bytes() == (guarded / "merges.txt").read_bytes()  # which the tool left out
    assert not list(out.glob("*.yaml")) and not list(tmp_path.glob(".quantize-*"))


def test_a_failing_tool_leaves_nothing_and_its_last_words(tool, guarded, calibration, tmp_path, capsys):
    tool(fails=True)
    status = run_tool("quantize", work, words(guarded, tmp_path / "out", "w8a8", calibration))
    assert status == 1 and not (tmp_path / "out").exists()
    assert "ended with status 1: quantizing | no layer is called so" in capsys.readouterr().err


def test_what_the_tool_cannot_make_is_made_here(tool, guarded, calibration, tmp_path, caplog, capsys):
    tool()
    with caplog.at_level("INFO"):
        document = quantized(guarded, tmp_path / "out", "w8a8", calibration, "--percentile", "99.99")
    assert document["tool"] == "builtin" and "--percentile, --rounding and --quantize belong to" in caplog.text
    (guarded / "vocab.json").chmod(0o666)
    said = refused(capsys, *words(guarded, tmp_path / "more", "w8a8", calibration))
    assert "chmod -R go-w" in said


def test_every_published_model_has_a_name_that_the_tool_knows():
    known = ("Qwen3-VL-4B-Instruct", "Qwen3-VL-32B-Instruct", "Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B")
    known += tuple(f"Qwen2.5-VL-{size}-Instruct" for size in ("7B", "32B", "72B"))
    named = {name: model_type(published_config(name)) for name in published_shapes()}
    assert set(named.values()) == set(known)
    assert named["Qwen3-VL-8B-Instruct"] == "Qwen3-VL-32B-Instruct"
    assert named["Qwen2.5-VL-32B-Instruct"] == "Qwen2.5-VL-32B-Instruct"
