"""Checkpoints with an int8 KV cache (C8), made of float ones by watching what a CPU engine writes into its cache."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from executor.engine.engine import Engine
from executor.quant.kv_cache import Extremes, cache_tensors, describe
from executor.schedule.request import SamplingParams


def observed(engine: Engine, prompts: Sequence[Any], params: SamplingParams) -> list[tuple[Extremes, Extremes]]:
    """Keys and values of every layer while a CPU engine answers."""
    device, kv = engine.runner.device, engine.runner.kv
    seen = [(Extremes(), Extremes()) for _ in kv]
    write = device.kv_write

    def watched(k: torch.Tensor, v: torch.Tensor, cache: Any, slots: torch.Tensor) -> None:
        keys, values = seen[next(index for index, layer in enumerate(kv) if layer.k is cache.k)]
        keys.observe(k.flatten(1))
        values.observe(v.flatten(1))
        write(k, v, cache, slots)

    device.kv_write = watched
    try:
        engine.generate(prompts, params)
    finally:
        del device.kv_write
    return seen


def add_scales(folder: Path, source: Path, seen: Sequence[tuple[Extremes, Extremes]], symmetric: bool = True) -> Path:
    """A copy of the float checkpoint `source` in `folder`, with the tensors and the description of C8."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "training"))
    tensors = load_file(source / "model.safetensors")
    # As the file's own names have it: "model.layers.N", or "model.language_model.layers.N".
    key = next(name for name in tensors if name.endswith("layers.0.self_attn.k_proj.weight"))
    layers = key.removesuffix("0.self_attn.k_proj.weight")
    made: dict[str, torch.Tensor] = {}
    for index, (keys, values) in enumerate(seen):
        made |= cache_tensors(f"{layers}{index}.self_attn", keys, values, symmetric)
    save_file(tensors | made, folder / "model.safetensors", metadata={"format": "pt"})
    return write_description(folder, {**dict.fromkeys(tensors, "FLOAT"), **describe(made)})


def write_description(folder: Path, types: dict[str, str]) -> Path:
    whole = {"model_quant_type": "FLOAT", "version": "1.0.0", **types}
    (folder / "quant_model_description.json").write_text(json.dumps(whole))
    return folder
