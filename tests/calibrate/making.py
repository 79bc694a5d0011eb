"""Quantized folders for tests, made of the tiny checkpoints by the command itself; and a reader of our own for them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from executor.commands.quantize import work
from models.tiny.training import world
from tests.reference import REPO

NUM_SAMPLES = 8


def tiny(family: str) -> Path:
    return REPO / "models" / "tiny" / family


def write_calibration(folder: Path, count: int = NUM_SAMPLES) -> Path:
    """Pictures of the tiny models' world with a question each, and one clip."""
    world.write_rows(folder, count - 1, seed=7)
    clip = world.held_out(7, 1, kinds=world.CLIP_KINDS)[0]
    world.write_clip(clip.scene, folder / "clip.mp4")
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"video": "clip.mp4", "question": clip.question.text}) + "\n")
    return folder


def words(source: Path, out: Path, scheme: str, calibration: Path | None, *more: str) -> list[str]:
    named = ["--model_path", str(source), "--save_directory", str(out), "--scheme", scheme, "--device", "cpu"]
    return [*named, *(() if calibration is None else ("--calibration", str(calibration))), *more]


def quantized(source: Path, out: Path, scheme: str, calibration: Path | None, *more: str) -> dict:
    return work(words(source, out, scheme, calibration, *more))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and their types, as any other reader finds them: by index and description."""
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        tensors |= held
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in tensors.values())
    description = json.loads((folder / "quant_model_description.json").read_text())
    head = {"version", "model_quant_type", "metadata", "group_size", "optional"}
    assert head <= set(description)
    types = {name: kind for name, kind in description.items() if name not in head}
    assert set(types) == set(tensors)
    return tensors, types


def float_weight(tensors: dict[str, Tensor], name: str, kind: str) -> Tensor:
    """The weight that the quantized linear `name` stands for, float32."""
    values = tensors[f"{name}.weight"].float()
    if kind == "W4A8_DYNAMIC":
        packed = tensors[f"{name}.weight"]
        values = torch.stack(((packed << 4) >> 4, packed >> 4), 1).flatten(0, 1).float()
    if f"{name}.weight_scale" in tensors:
        return values * tensors[f"{name}.weight_scale"]
    return values * (tensors[f"{name}.deq_scale"] / tensors[f"{name}.input_scale"]).unsqueeze(1)
