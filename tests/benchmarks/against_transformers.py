"""Our engine beside transformers' `generate`: one process, the same random weights, paired runs, ratios.

    python -m tests.benchmarks.against_transformers [--cpu-isa avx2] [--layers 8] [--new-tokens 24] [--repeats 3]
                                                    [--parts decode_1,decode_8,prefill_text,prefill_picture]

The model has Qwen2.5-VL-3B's layer shapes (text and vision), its checkpoint is in bfloat16 and is loaded as any other.
Decode runs at batch 1 and 8 behind a short text prompt; prefill is 1000 tokens of text, and a picture of about as
many. transformers gets the type that is fastest for it: bfloat16 where the CPU multiplies it, float32 elsewhere.
Reported beside the ratios: bytes a parameter, the share of the GEMM rate, and the engine's time outside the model.
`--cpu-isa avx2` starts anew with torch, oneDNN and MKL kept from AVX-512 (FBGEMM is not: it asks the CPU itself).
Not a test: timings on shared machines vary.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from executor.checkpoint.load import default_dtype, load_model
from executor.checkpoint.settings import PixelSettings
from executor.checkpoint.weights import Checkpoint
from executor.device import ops
from executor.device.cpu.ops import open_cpu
from executor.device.table import DeviceSettings
from executor.engine.engine import Engine
from executor.engine.replica import Replica
from executor.engine.runner import Runner
from executor.engine.sampler import Sampler
from executor.launch.options import apply, cpu_options
from executor.parallel.groups import SINGLE
from executor.schedule.request import MediaItem, Prompt, SamplingParams, Span
from executor.schedule.scheduler import Scheduler
from models.published import published_config
from models.qwen2_5_vl import runner as family
from models.qwen2_5_vl.processor import mrope_positions
from tests.reference import tokenizer_of

PICTURE_GRID = (1, 56, 72)  # patches: 1008 visual tokens
IMAGE_TOKEN = 151655
PROMPT_TOKENS = 64
TEXT_TOKENS = 1000
WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PARTS = ("decode_1", "decode_8", "prefill_text", "prefill_picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-isa", choices=("auto", "avx2", "avx512"), default="auto")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    args = parser.parse_args()
    if args.cpu_isa == "avx2" and not WITHOUT_AVX512.keys() <= os.environ.keys():
        module = "tests.benchmarks.against_transformers"
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | WITHOUT_AVX512)
    apply(cpu_options(local_ranks=1))  # as the launcher does
    device = open_cpu(DeviceSettings("bfloat16", cpu_isa=args.cpu_isa))
    ops.bind(device)
    with tempfile.TemporaryDirectory() as folder:
        reference = reference_model(args.layers)
        save_file(canonical_tensors(reference), Path(folder) / "model.safetensors")
        num_parameters = sum(parameter.numel() for parameter in reference.parameters())
        before = anonymous_bytes()
        engine = our_engine(Path(folder), args.layers)
        bytes_each = (anonymous_bytes() - before) / num_parameters
    theirs = device.compute_dtype(torch.bfloat16)
    reference = reference.to(theirs)
    report = {
        "layers": args.layers,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": device.capability.isa,
        "vectors": device.capability.vectors,
        "transformers_dtype": str(theirs).removeprefix("torch."),
        "bytes_per_parameter": round(bytes_each, 3),
    }
    runs = {
        "decode_1": lambda: compare_decode(reference, engine, 1, args),
        "decode_8": lambda: compare_decode(reference, engine, 8, args),
        "prefill_text": lambda: compare_text_prefill(reference, engine, args),
        "prefill_picture": lambda: compare_prefill(reference, engine, args),
    }
    for part in args.parts:
        report[part] = runs[part]()
        print(part, report[part], file=sys.stderr, flush=True)
    print(json.dumps(report))


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def reference_model(layers: int):
    """transformers' model with random bf16 weights."""
    config = transformers.Qwen2_5_VLConfig(**raw_config(layers))
    with default_dtype(torch.bfloat16):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(0.0 if "bias" in name else 1.0)
    return model


def raw_config(layers: int) -> dict:
    return published_config("Qwen2.5-VL-3B-Instruct") | {"num_hidden_layers": layers}


def canonical_tensors(reference) -> dict[str, torch.Tensor]:
    """What a published folder holds: no output head beside tied embeddings."""
    return {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}


def our_engine(folder: Path, layers: int) -> Engine:
    """Our engine over the same weights."""
    device = ops.bound()
    model, _ = load_model(lambda: family.build_model(raw_config(layers)), Checkpoint(folder), device, torch.bfloat16)
    dtype = device.compute_dtype(torch.bfloat16)
    text = model.config.text
    num_blocks, block_size = 8 * 12, 128
    kv = device.kv_cache(layers, num_blocks, block_size, text.num_kv_heads, text.head_dim, dtype)
    pixel_format = PixelSettings(14, 2, 2, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 4 * 28**2, 16384 * 28**2)
    sampler = Sampler(text.vocab_size, device.device)
    replica = Replica(SINGLE, model.visual.cost, shares_experts=False)
    runner = Runner(model, device, kv, block_size, sampler, pixel_format, dtype, replica)
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=8, max_num_batched_tokens=8192, max_model_len=1536,
        enable_prefix_caching=False,
    )  # fmt: skip
    return Engine(
        SimpleNamespace(tokenizer=tokenizer_of("qwen2_5_vl"), eos_token_ids=()), scheduler, runner, text.vocab_size
    )


def text_prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, 400, num_tokens).tolist()
    return Prompt(ids, np.broadcast_to(np.arange(num_tokens), (3, num_tokens)).copy(), 0)


def picture_prompt(seed: int) -> Prompt:
    t, h, w = PICTURE_GRID
    pixels = torch.randint(0, 256, (1, 3, h * 14, w * 14), dtype=torch.uint8, generator=torch.manual_seed(seed))
    count = t * h * w // 4
    media = (MediaItem("image", seed.to_bytes(16, "little"), pixels, PICTURE_GRID, count),)
    spans = (Span(8, count, 0),)
    ids = [5] * 8 + [IMAGE_TOKEN] * count + [7] * 8
    positions, delta = mrope_positions(len(ids), spans, media, merge_size=2, tokens_per_second=2)
    return Prompt(ids, positions, delta, media, spans)


def compare_decode(reference, engine: Engine, batch: int, args) -> dict:
    """Seconds per decode step: the difference of two lengths, so that prefill cancels out."""
    prompts = [text_prompt(seed) for seed in range(batch)]
    ids = torch.tensor([prompt.token_ids for prompt in prompts])
    short, long = 4, 4 + args.new_tokens

    def theirs(n: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            reference.generate(
                input_ids=ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids),
                pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - start

    def ours(n: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_new_tokens=n, ignore_eos=True))
        return time.perf_counter() - start

    for run in (theirs, ours):
        run(short)
    pairs = []
    for _ in range(args.repeats):
        pairs.append([(run(long) - run(short)) / args.new_tokens * 1e3 for run in (theirs, ours)])
    with ModelTime(engine) as model_time:
        total = ours(long)
    theirs_ms, ours_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "transformers_ms_per_step": round(theirs_ms, 1),
        "ours_ms_per_step": round(ours_ms, 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "engine_outside_model": round(1 - model_time.seconds / total, 4),
    }


def compare_text_prefill(reference, engine: Engine, args) -> dict:
    """1000 tokens of text to the first token of the answer."""
    rounds = []
    for seed in range(args.repeats + 1):
        prompt = text_prompt(seed, TEXT_TOKENS)
        start = time.perf_counter()
        with torch.inference_mode():
            reference(input_ids=torch.tensor([prompt.token_ids]), logits_to_keep=1)
        middle = time.perf_counter()
        engine.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
        rounds.append((middle - start, time.perf_counter() - middle))
    theirs_s, ours_s = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return {
        "transformers_s": round(theirs_s, 3),
        "ours_s": round(ours_s, 3),
        "ratio": round(statistics.median(a / b for a, b in rounds[1:]), 2),
    }


def compare_prefill(reference, engine: Engine, args) -> dict:
    """A picture of about 1000 tokens to its first token, vision included."""
    rounds = []
    rate = gemm_rate(engine)
    for seed in range(args.repeats + 1):
        prompt = picture_prompt(seed)
        item = prompt.media[0]
        patches = torch.randn(PICTURE_GRID[1] * PICTURE_GRID[2], 1176, dtype=reference.dtype)
        ids = torch.tensor([prompt.token_ids])
        start = time.perf_counter()
        with torch.inference_mode():
            reference(
                input_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([item.grid_thw]), logits_to_keep=1,
                position_ids=torch.from_numpy(prompt.positions)[:, None],
            )  # fmt: skip
        middle = time.perf_counter()
        engine.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
        rounds.append((middle - start, time.perf_counter() - middle))
    rounds = rounds[1:]
    theirs_s, ours_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    flops, attention = linear_flops(engine), attention_flops(engine)
    return {
        "transformers_s": round(theirs_s, 3),
        "ours_s": round(ours_s, 3),
        "ratio": round(statistics.median(a / b for a, b in rounds), 2),
        "linear_gflop": round(flops / 1e9),
        "attention_gflop": round(attention / 1e9),
        "linears_share_of_gemm_rate": round(flops / ours_s / rate, 3),
        "all_products_share_of_gemm_rate": round((flops + attention) / ours_s / rate, 3),
        "gemm_gflops": round(rate / 1e9),
    }


def linear_shapes(engine: Engine) -> list[tuple[int, int, int]]:
    """(rows, in, out) of every linear of the picture prefill."""
    t, h, w = PICTURE_GRID
    patches, tokens = t * h * w, t * h * w // 4 + 16
    text, vision = engine.runner.model.config.text, engine.runner.model.config.vision
    n, width = vision.hidden_size, vision.hidden_size * 4
    shapes = [(patches, 1176, n)]
    shapes += [(patches, n, 3 * n), (patches, n, n), (patches, n, 2 * vision.intermediate_size)] * vision.depth
    shapes += [(patches, vision.intermediate_size, n)] * vision.depth
    shapes += [(patches // 4, width, width), (patches // 4, width, text.hidden_size)]
    q, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes += [(tokens, text.hidden_size, q + 2 * kv), (tokens, q, text.hidden_size)] * text.num_layers
    shapes += [(tokens, text.hidden_size, 2 * text.intermediate_size)] * text.num_layers
    shapes += [(tokens, text.intermediate_size, text.hidden_size)] * text.num_layers
    return shapes


def linear_flops(engine: Engine) -> float:
    return sum(2.0 * rows * n_in * n_out for rows, n_in, n_out in linear_shapes(engine))


def attention_flops(engine: Engine) -> float:
    """Of the two products of attention: vision windows and frames, and the causal text."""
    t, h, w = PICTURE_GRID
    patches, tokens = t * h * w, t * h * w // 4 + 16
    text, vision = engine.runner.model.config.text, engine.runner.model.config.vision
    num_full = len(vision.full_attention_layers)
    window = (vision.window_size // vision.patch_size) ** 2
    pairs = num_full * patches**2 + (vision.depth - num_full) * patches * window
    return 4.0 * pairs * vision.hidden_size + 2.0 * text.num_layers * tokens**2 * text.num_heads * text.head_dim


def gemm_rate(engine: Engine) -> float:
    """FLOP/s of the same multiplications alone, each distinct shape timed through the backend's own linear."""
    seconds = 0.0
    shapes = linear_shapes(engine)
    for shape in set(shapes):
        rows, n_in, n_out = shape
        is_text = rows == PICTURE_GRID[1] * PICTURE_GRID[2] // 4 + 16
        weight = torch.randn(n_out, n_in, dtype=torch.bfloat16)
        multiply = ops.bound().prepare_linear(weight, None, many_rows=not is_text)
        x = torch.randn(rows, n_in, dtype=engine.runner.dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply(x)
            times.append(time.perf_counter() - start)
        seconds += statistics.median(times) * shapes.count(shape)
    return linear_flops(engine) / seconds


class ModelTime:
    """Seconds spent in the model's forward while the context is open."""

    def __init__(self, engine: Engine) -> None:
        self.model, self.seconds = engine.runner.model, 0.0

    def __enter__(self) -> "ModelTime":
        self.forward = self.model.forward

        def timed(*args):
            start = time.perf_counter()
            try:
                return self.forward(*args)
            finally:
                self.seconds += time.perf_counter() - start

        self.model.forward = timed
        return self

    def __exit__(self, *_) -> None:
        del self.model.forward


if __name__ == "__main__":
    main()
