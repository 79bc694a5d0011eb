"""Whole runs over the tiny checkpoints: others read what they write, and it computes what the float weights do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from executor.calibrate import layer, run, sample
from executor.calibrate.layer import Job, load_stage
from executor.calibrate.sample import pieces_of
from executor.calibrate.settings import Settings
from executor.calibrate.stages import Bench, stages_of, tensors_of, with_cache
from executor.checkpoint.folder import read_json
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.load import build_on_meta
from executor.commands import quantize
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.schedule.request import SamplingParams
from models.registry import family_runner
from tests.calibrate.making import float_weight, quantized, read, tiny, write_calibration
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO

MEDIA = REPO / "dataset" / "media"
QUESTIONS = (
    (("objects.png",), "What do you see?"),
    (("clip.mp4",), "Describe the video."),
    (("word.png", "clip.mp4"), "What moves?"),
)
MORE = {
    "qwen3_vl_moe": ("w8a8", "w4a8_dynamic"),
    "qwen3_vl": ("w8a8", "w8a16"),
    "qwen2_5_vl": ("w8a8_dynamic", "w8a8_mix"),
}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration") / "set")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    engine = engine_over(tiny(request.param), num_blocks=64)
    engine.family = request.param
    return engine


def prompts_of(engine):
    for files, question in QUESTIONS:
        kinds = ("video" if file.endswith("mp4") else "image" for file in files)
        media = [{"type": kind, kind: str(MEDIA / file)} for kind, file in zip(kinds, files, strict=True)]
        yield engine.processor.build([{"role": "user", "content": [*media, {"type": "text", "text": question}]}])


def answered(engine):
    """Logits behind every prompt `[prompts, V]`, and the answers."""
    logits, texts = [], []
    forward = type(engine.runner).forward
    for prompt in prompts_of(engine):
        steps = []
        engine.runner.forward = lambda plan, steps=steps: steps.append(forward(engine.runner, plan)) or steps[-1]
        (answer,) = engine.generate([prompt], SamplingParams(max_new_tokens=6))
        logits.append(steps[0][-1])
        texts.append(answer.text)
    del engine.runner.forward
    return torch.stack(logits), texts


def error(ours, wanted) -> float:
    return float((ours - wanted).norm() / wanted.norm())


def test_stages_compute_what_the_model_does(family, monkeypatch):
    """One stage in memory after another, from patches to logits: as the engine, whose sums run in the same order."""
    folder, wanted = tiny(family.family), answered(family)[0]
    config, checkpoint = read_json(folder, "config.json"), Checkpoint(folder)

    def build():
        return family_runner(config).build_model(config)

    bench = Bench(ops.bound(), torch.float32, checkpoint)
    meta = build_on_meta(build, torch.float32)
    stages = stages_of(meta)
    held = tensors_of(stages, checkpoint.catalog)
    assert sorted(name for names in held for name in names) == sorted(checkpoint.catalog)
    assert {name.rpartition(".")[0] for name in held[-1]} <= {"lm_head", "model.language_model.norm"}
    bench = with_cache(bench, meta, 256)
    job = Job(Settings("w8a8", 0.0), bench, build, {}, False)
    monkeypatch.setattr(sample, "ENCODE_TOKENS", 16)  # so that the clip comes in two pieces
    runs = [pieces_of(prompt, family.processor, torch.float32) for prompt in prompts_of(family)]
    assert [len(each.grids) for each, _ in runs] == [1, 2, 3]
    with torch.inference_mode():
        for stage in stages[:-1]:
            model = load_stage(job, stage)
            assert sum(p.numel() for p in model.parameters() if not p.is_meta) < 10_000  # norms; linears are prepared
            runs = [(each, stage.run(bench, model, each, state)) for each, state in runs]
        ours = family.runner.model
        ends = [ours.language_model.norm.add(state["x"], state["residual"])[0][-1:] for _, state in runs]
        logits = torch.cat([ours.lm_head(end) for end in ends])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def made(family, calibration, tmp_path_factory):
    """{scheme: folder} of this family's checkpoint."""
    root = tmp_path_factory.mktemp(family.family)
    folders = {scheme: root / scheme for scheme in MORE[family.family]}
    for scheme, folder in folders.items():
        quantized(tiny(family.family), folder, scheme, None if scheme == "w8a16" else calibration)
    ops.bind(CpuOps())
    return folders


def test_our_engine_answers_as_with_float_weights(family, made):
    """The first scheme of each family; that the others load is what the command looks at last."""
    wanted, texts = answered(family)
    logits, answers = answered(engine_over(next(iter(made.values())), num_blocks=64))
    assert answers == texts
    assert error(logits, wanted) < 0.02


def test_others_read_the_same_weights(family, made, tmp_path):
    """Dequantized by the formulas alone and written as a float checkpoint, the model computes the same: every linear
    is there, under the source's own names, and what smoothing has folded cancels out."""
    source = Checkpoint(tiny(family.family))
    wanted = answered(family)[0]
    for scheme, folder in made.items():
        tensors, types = read(folder)
        plain = {name: tensor for name, tensor in tensors.items() if types[name] == "FLOAT"}
        for name, kind in types.items():
            if name.endswith(".weight") and kind != "FLOAT":
                plain[name] = float_weight(tensors, name.removesuffix(".weight"), kind)
        own = {info.original_name for info in source.catalog.values()}
        assert {name for name in own if ".experts." not in name} <= set(plain) and "experts.gate_up_proj" not in plain
        for info in source.catalog.values():
            assert info.original_name not in plain or tuple(plain[info.original_name].shape) == info.shape
        target = tmp_path / scheme
        target.mkdir()
        for file in tiny(family.family).iterdir():
            if file.suffix in (".json", ".jinja", ".txt"):
                assert (folder / file.name).read_bytes() == file.read_bytes()
                (target / file.name).write_bytes(file.read_bytes())
        save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
        logits, _ = answered(engine_over(target, num_blocks=64))
        assert error(logits, wanted) < (0.1 if scheme == "w4a8_dynamic" else 0.015), scheme


class WideOps(CpuOps):
    """A device as NPUs are: vision heads are widened with zeros, and products are modules."""

    def vision_head_dim(self, head_dim: int) -> int:
        return 96

    def prepare_linear(self, weight, bias, many_rows=False):
        product = super().prepare_linear(weight, bias, many_rows)
        module = torch.nn.Module()
        module.forward = product
        return module


def test_a_device_with_wider_heads_sees_the_same_activations(calibration, tmp_path, monkeypatch):
    quantized(tiny("qwen3_vl"), tmp_path / "plain", "w8a8", calibration)
    monkeypatch.setattr(quantize, "open_device", lambda told, own: (WideOps(), "float32"))
    quantized(tiny("qwen3_vl"), tmp_path / "wide", "w8a8", calibration, "--percentile", "100", "--rounding", "gptq")
    plain, wide = (read(tmp_path / name)[0] for name in ("plain", "wide"))
    assert plain.keys() == wide.keys()
    for name in plain:
        if name.endswith(("input_scale", "norm1.weight", "input_layernorm.weight")):
            torch.testing.assert_close(wide[name], plain[name], rtol=1e-3, atol=0)


def test_float_tensors_keep_their_type_and_smoothing_is_exact(made, family):
    """What is folded are powers of two: a smoothed norm's weight has the same significand bits."""
    folder = next(folder for scheme, folder in made.items() if scheme != "w8a16")
    tensors, types = read(folder)
    source = Checkpoint(tiny(family.family))
    changed = 0
    for info in source.catalog.values():
        if types.get(info.original_name) != "FLOAT":
            continue
        written, before = tensors[info.original_name], layer.read_tensor(info)
        assert written.dtype is before.dtype
        if not torch.equal(written, before):
            changed += 1
            assert torch.equal(*(torch.frexp(x.float()).mantissa for x in (written, before))), info.original_name
    assert changed >= 6


def test_stopped_and_started_again_the_bytes_are_the_same(calibration, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantized(tiny("qwen3_vl"), whole, "w8a8", calibration)
    real, packed = run.run_stage, run.pack
    for stop in (0, 6, 11):

        def stopping(job, stage, number, *more, stop=stop):
            if number == stop:
                (out / ".quantize" / "stages").mkdir(exist_ok=True)
                (out / ".quantize" / "stages" / f".{number:04d}.safetensors.part").write_bytes(b"half of it")
                raise KeyboardInterrupt
            real(job, stage, number, *more)

        monkeypatch.setattr(run, "run_stage", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantized(tiny("qwen3_vl"), out, "w8a8", calibration)
        assert json.loads((out / ".quantize" / "manifest.json").read_text())["done"] == stop
    monkeypatch.setattr(run, "run_stage", real)

    def stopped_packing(work, num_stages, folder, *more):
        packed(work, num_stages, folder, *more)
        (folder / "quant_model_description.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "pack", stopped_packing)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny("qwen3_vl"), out, "w8a8", calibration)
    monkeypatch.setattr(run, "pack", packed)
    quantized(tiny("qwen3_vl"), out, "w8a8", calibration)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
