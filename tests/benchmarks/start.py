"""From files to the first token: a checkpoint's reading beside plain reading of the same files, and what follows it.

    python -m tests.benchmarks.start [FOLDER] [--model Qwen2.5-VL-3B-Instruct --layers 8 --vision_layers 8]

Without FOLDER a random bfloat16 checkpoint of a published model's shapes is written first. `plain_*`: every byte of the
files read in order into one buffer of 16 MiB, as `dd` does. `load_*`: weights into their places (`load_weights`), in
the same process. Cold: the files' pages are dropped from the cache before (posix_fadvise). Each is done `--repeats`
times in turns, the fastest counts. `after_weights_s`: from the last weight read to an engine that is ready (weights in
the device's form, cache, tokenizer); `first_token_s`: from the last weight to the first token of a short text, and
`first_picture_token_s`, of a picture of 224 x 224 px, once the text has been answered. Not a test.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from executor.checkpoint import load
from executor.checkpoint.load import build_on_meta
from executor.checkpoint.part_pulls import open_checkpoint
from executor.checkpoint.pull import materialise
from executor.checkpoint.weights import load_weights
from executor.commands.build import build_engine
from executor.recipe.schema import build_recipe
from executor.schedule.request import SamplingParams
from models.registry import family_runner
from tests.benchmarks.peak_memory import write_random

CHUNK_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", default="Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), args)
        os.sync()  # dirty pages are not dropped from the cache
        print(json.dumps({"model": args.model, "layers": args.layers} | measure(Path(folder), args)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    total_bytes = sum(file.stat().st_size for file in files)
    reading = read_beside_plain(folder, files, args)
    gigabytes = {name: round(total_bytes / seconds / 1e9, 2) for name, seconds in reading.items()}
    return {
        "bytes": total_bytes,
        "gigabytes_per_s": gigabytes,
        "cold_to_plain": round(gigabytes["load_cold"] / gigabytes["plain_cold"], 2),
        "warm_to_plain": round(gigabytes["load_warm"] / gigabytes["plain_warm"], 2),
        **first_tokens(folder, args),
    }


def read_beside_plain(folder: Path, files: list[Path], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each way, the fastest of its turns."""
    checkpoint = open_checkpoint(folder, 0, 1)
    raw = json.loads((folder / "config.json").read_text())
    model = build_on_meta(lambda: family_runner(raw).build_model(raw), getattr(torch, args.dtype))
    materialise(model, torch.device("cpu"))
    pulls = list(model.pulls(checkpoint.catalog))
    for pull in pulls:
        pull.into.zero_()  # memory is there before: what is measured is reading
    buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)

    def plain() -> None:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def loaded() -> None:
        load_weights(pulls, checkpoint, ignore=("lm_head.weight",), progress=False)

    found: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, way in (("plain", plain), ("load", loaded)):
            drop(files)
            for state in ("cold", "warm"):
                seconds = seconds_of(way)
                found[f"{name}_{state}"] = min(seconds, found.get(f"{name}_{state}", seconds))
    return found


def seconds_of(way: Callable[[], None]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def drop(files: list[Path]) -> None:
    """Clean pages of these files out of the cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def first_tokens(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    read_at: list[float] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        report = load_weights(*arguments, **options)
        read_at.append(time.perf_counter())
        return report

    load.load_weights = watched
    recipe = build_recipe(
        {
            "model_config": {"model_path": str(folder), "device": "cpu", "dtype": args.dtype},
            "scheduler_config": {"max_num_seqs": 8, "max_model_len": 4096, "block_size": 128},
        }
    )
    started = time.perf_counter()
    with build_engine(recipe) as engine:
        ready = time.perf_counter()
        params = SamplingParams(max_new_tokens=1, temperature=0)
        engine.generate(["What is the capital of France?"], params)
        answered = time.perf_counter()
        picture = {"type": "image", "image": np.full((224, 224, 3), 90, dtype=np.uint8)}
        engine.generate([[{"role": "user", "content": [picture]}]], params)
        seen = time.perf_counter()
    (read,) = read_at
    return {
        "start_s": round(ready - started, 2),
        "after_weights_s": round(ready - read, 2),
        "first_token_s": round(answered - read, 2),
        "first_picture_token_s": round(seen - answered, 2),
    }


if __name__ == "__main__":
    main()
