"""The estimate of memory beside the measured peak, in a process of its own: every request full of pictures.

    python -m tests.benchmarks.peak_memory FOLDER [--dtype float32] [--max_num_seqs 4] [--max_model_len 2048] ...
    python -m tests.benchmarks.peak_memory --model Qwen2.5-VL-3B-Instruct --layers 8 --vision_layers 8

With --model a random checkpoint of a published model's shapes is written to a temporary folder first. The measure is
the high-water mark of the resident set (VmHWM) over loading and answering; the estimate is all of what is printed
before loading, the process's own memory included. Prints both as JSON.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from executor.checkpoint.load import build_on_meta
from executor.commands.build import build_engine
from executor.engine.engine import Engine
from executor.host.limits import peak_memory_bytes
from executor.recipe.schema import Recipe, build_recipe
from executor.recipe.settle import prepare
from executor.schedule.request import MediaItem, Prompt, SamplingParams, Span
from models.published import published_config
from models.registry import family_runner
from tests.reference import REPO

SIZES = {
    "max_num_seqs": 4,
    "max_model_len": 2048,
    "max_num_batched_tokens": 4096,
    "encoder_cache_tokens": 4096,
    "block_size": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--draft", help="folder of a draft model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vision_layers", type=int)
    parser.add_argument("--untied", action="store_true", help="a head of its own, whatever the model has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", type=int, default=20, help="visual tokens along a picture's edge")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=3)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if args.folder:
        print(json.dumps(measure(Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), args)
        _reset_high_water()
        print(json.dumps(measure(Path(folder), args)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    sizes = {name: getattr(args, name) for name in SIZES}
    model = {"model_path": str(folder), "device": "cpu", "dtype": args.dtype}
    tree = {"model_config": model, "scheduler_config": sizes | {"enable_prefix_caching": False}}
    if args.draft:
        tree["speculative_config"] = {"method": "draft", "model_path": args.draft, "adaptive": False}
    recipe = build_recipe(tree)
    prepared = prepare(recipe)
    engine = build_engine(prepared.recipe)
    loaded = peak_memory_bytes()
    answer(engine, prepared.recipe, args)
    peak = peak_memory_bytes()
    memory = prepared.memory
    return {
        "model": folder.name if args.folder else args.model,
        "estimated_bytes": memory.total_bytes,
        "measured_bytes": peak,
        "estimated_to_measured": round(memory.total_bytes / peak, 3),
        "process_bytes": memory.process_bytes,
        "weights_bytes": memory.weights_bytes,
        "kv_bytes": memory.kv_bytes,
        "peak_bytes": memory.peak_bytes,
        "draft_bytes": memory.draft_weights_bytes + memory.draft_kv_bytes + memory.draft_step_bytes,
        "high_water_after_loading_bytes": loaded,
    }


def answer(engine: Engine, recipe: Recipe, args: argparse.Namespace) -> None:
    """As many requests as are answered together, and two that wait; then once more without these."""
    vision = engine.runner.model.config.vision
    limits = recipe.scheduler
    count = (limits.max_model_len - args.new_tokens - 1) // args.side**2
    params = SamplingParams(max_new_tokens=args.new_tokens, temperature=0.7, top_k=20, top_p=0.8, ignore_eos=True)
    for turn in range(args.turns):
        prompts = [
            pictures(1000 * turn + number, count, args.side, vision.patch_size)
            for number in range(limits.max_num_seqs + 2 * (turn == 0))
        ]
        engine.generate(prompts, params)


def pictures(seed: int, count: int, side: int, patch_size: int) -> Prompt:
    """A prompt of `count` pictures of noise, each of side x side visual tokens."""
    edge, tokens = 2 * side * patch_size, side * side
    media, spans = [], []
    for number in range(count):
        pixels = torch.randint(0, 256, (1, 3, edge, edge), dtype=torch.uint8)
        digest = (seed * 1000 + number).to_bytes(16, "little")
        media.append(MediaItem("image", digest, pixels, (1, 2 * side, 2 * side), tokens))
        spans.append(Span(number * tokens, tokens, number))
    num_tokens = count * tokens + 1
    positions = np.broadcast_to(np.arange(num_tokens), (3, num_tokens)).copy()
    return Prompt([5] * num_tokens, positions, 0, tuple(media), tuple(spans))


def write_random(folder: Path, args: argparse.Namespace) -> None:
    """A checkpoint of a published model's shapes, cut to some layers, in files of a layer each."""
    raw = published_config(args.model)
    text = raw.get("text_config", raw)
    if args.untied:
        raw["tie_word_embeddings"] = False
        text["tie_word_embeddings"] = False
    if args.layers:
        text["num_hidden_layers"] = args.layers
    if args.vision_layers:
        raw["vision_config"]["depth"] = args.vision_layers
        for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if key in raw["vision_config"]:
                raw["vision_config"][key] = [i for i in raw["vision_config"][key] if i < args.vision_layers]
    # The tiny checkpoints' tokenizers have other ids for the special tokens.
    family = "qwen2_5_vl" if raw["architectures"][0].startswith("Qwen2_5") else "qwen3_vl"
    tiny = REPO / "models" / "tiny" / family
    special = json.loads((tiny / "config.json").read_text())
    raw |= {key: special[key] for key in special if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(raw))
    for file in tiny.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    model = build_on_meta(lambda: family_runner(raw).build_model(raw), torch.bfloat16)
    index: dict[str, str] = {}
    for number, pull in enumerate({pull.name: pull for pull in model.pulls({})}.values()):
        name = f"model-{number:05d}.safetensors"
        save_file({pull.name: torch.randn(pull.file_shape).mul_(0.02).bfloat16()}, folder / name)
        index[pull.name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
