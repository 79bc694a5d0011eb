"""A checkpoint of which two would not fit into the memory that the run takes: one layer of it is there at a time."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from executor.checkpoint.folder import read_json
from executor.checkpoint.load import build_on_meta
from executor.checkpoint.writing import computed_entry, write_json, write_safetensors
from models.registry import family_runner
from tests.calibrate.making import tiny, words, write_calibration
from tests.reference import REPO

LIMIT_BYTES = 560 << 20
"""Torch alone, before it computes anything, takes 250 to 330 MiB of it."""


def large_checkpoint(folder: Path) -> int:
    """The tiny Qwen3-VL with 12 text layers of 6.4 million weights each, in float32; its bytes."""
    folder.mkdir()
    for file in tiny("qwen3_vl").iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = read_json(tiny("qwen3_vl"), "config.json")
    config["text_config"] |= {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 12}
    config["text_config"] |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    config |= {"dtype": "float32"}
    config["vision_config"] |= {"out_hidden_size": 768}
    write_json(folder / "config.json", config)
    model = build_on_meta(lambda: family_runner(config).build_model(config), torch.float32)
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.03)

    def parts(shape: tuple[int, ...], is_norm: bool):
        count = torch.Size(shape).numel()
        while count:
            part = values[: min(count, len(values))]
            count -= len(part)
            yield part.abs() + 1 if is_norm else part

    pulls = {pull.name: pull for pull in model.pulls({})}
    entries = [
        computed_entry(name, torch.float32, pull.shape, lambda p=pull: parts(p.shape, len(p.shape) == 1))
        for name, pull in pulls.items()
    ]
    write_safetensors(folder / "model.safetensors", entries)
    return (folder / "model.safetensors").stat().st_size


def test_a_checkpoint_larger_than_half_of_the_memory(tmp_path):
    """The run's peak stays below what it said before, and below a limit that the whole checkpoint would break."""
    num_bytes = large_checkpoint(tmp_path / "float")
    assert num_bytes > LIMIT_BYTES / 2
    command = words(tmp_path / "float", tmp_path / "out", "w8a8", write_calibration(tmp_path / "set", 3))
    done = subprocess.run(
        [sys.executable, "-m", "executor.commands.quantize", *command], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["peak_bytes"] <= min(document["bound_bytes"], LIMIT_BYTES)
    assert f"peak memory {document['peak_bytes'] / 1e9:.2f} GB" in done.stdout
    assert "samples are few" in done.stderr
