"""What a quantized tiny checkpoint loses: held-out samples answered right, and how far its logits are off.

    python -m tests.benchmarks.quantized_accuracy models/tiny/qwen3_vl QUANTIZED ... [--num 500] [--dtype bfloat16]
    python -m tests.benchmarks.quantized_accuracy models/tiny/qwen3_vl --make w8a8 w8a8_dynamic [--words "--smooth 0.7"]
    python -m tests.benchmarks.quantized_accuracy models/tiny/qwen3_vl --load wint8

The first folder is the float one, which all others are compared with, computed in the same type. --make quantizes it
here, with --words handed on to the command; --load makes it while the first folder is loaded once more. Logits are
those of the last prompt token, in float32; their error is |quantized - float| / |float| over all samples. Calibration
is 32 pictures with a question each of another seed. Greedy. Prints JSON, a line a form.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from executor.commands.build import build_engine
from executor.commands.quantize import work as quantize
from executor.engine.engine import Engine
from executor.recipe.schema import build_recipe
from executor.schedule.plan import Plan
from executor.schedule.request import Prompt, SamplingParams
from models.tiny.training import world

CALIBRATION_SEED, NUM_CALIBRATION = 7, 32
CONVENTION = {"qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--make", nargs="+", default=[])
    parser.add_argument("--words", default="")
    parser.add_argument("--load", nargs="+", default=[])
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2000)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = [make(args.source, scheme, shlex.split(args.words), Path(scratch)) for scheme in args.make]
        base = None
        forms = [(folder, "auto") for folder in (args.source, *args.folders, *made)]
        for folder, word in (*forms, *((args.source, word) for word in args.load)):
            score, logits = measure(folder, word, args, Path(scratch))
            base = logits if base is None else base
            error = float((logits - base).norm() / base.norm())
            name = {"folder": Path(folder).name, "quantization": word}
            print(json.dumps({**name, **score, "logits_error": round(error, 5)}), flush=True)


def make(source: str, scheme: str, words: Sequence[str], scratch: Path) -> str:
    pictures = scratch / "calibration"
    if not pictures.is_dir():
        world.write_rows(pictures, NUM_CALIBRATION, CALIBRATION_SEED)
    out = scratch / scheme
    named = ["--model_path", source, "--save_directory", str(out), "--scheme", scheme, "--device", "cpu"]
    document = quantize([*named, "--calibration", str(pictures), *words])
    print(json.dumps(document), file=sys.stderr)
    return str(out)


def measure(folder: str, quantization: str, args: argparse.Namespace, scratch: Path) -> tuple[dict, torch.Tensor]:
    """Scores in per cent, by kind of question where they are not 100, and the logits `[num, V]`."""
    model = {"model_path": folder, "device": "cpu", "dtype": args.dtype, "quantization": quantization}
    limits = {"max_num_seqs": 32, "max_model_len": 2048, "block_size": 16, "num_blocks": 2048}
    engine = build_engine(build_recipe({"model_config": model, "scheduler_config": limits}))
    samples = world.held_out(args.seed, args.num)
    prompts = [engine.processor.build(messages(sample, scratch)) for sample in samples]
    logits = first_logits(engine, prompts)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=64))
    convention = CONVENTION[Path(args.source).name]
    right: dict[str, list[bool]] = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        right[sample.question.kind].append(sample.question.is_right(answer.text, convention))
    below = {kind: round(100 * sum(marks) / len(marks), 1) for kind, marks in right.items() if not all(marks)}
    return {"right": round(100 * sum(map(sum, right.values())) / len(samples), 2), "below": below}, logits


def messages(sample: world.Sample, folder: Path) -> list[dict]:
    """The question beside its picture or clip."""
    kind = "video" if sample.scene.is_clip else "image"
    file = folder / ("clip.mp4" if sample.scene.is_clip else "picture.png")
    (world.write_clip if sample.scene.is_clip else world.write_picture)(sample.scene, file)
    content = [{"type": kind, kind: file.read_bytes()}, {"type": "text", "text": sample.question.text}]
    return [{"role": "user", "content": content}]


def first_logits(engine: Engine, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Logits behind each prompt, `[prompts, V]`."""
    found: dict[int, torch.Tensor] = {}
    forward = engine.runner.forward

    def recording(plan: Plan) -> torch.Tensor:
        logits = forward(plan)
        yielding = [row.request.prompt for row in plan.rows if row.max_yield]
        for prompt, row in zip(yielding, logits, strict=True):
            found.setdefault(id(prompt), row.clone())
        return logits

    engine.runner.forward = recording
    try:
        engine.generate(prompts, SamplingParams(max_new_tokens=1))
    finally:
        del engine.runner.forward
    return torch.stack([found[id(prompt)] for prompt in prompts])


if __name__ == "__main__":
    main()
