"""Speed and memory of the CPU's int8 linears beside its own bfloat16: the same layers, in one run.

    python -m tests.benchmarks.quantized [--cpu-isa avx2] [--schemes w8a8,w8a8_dynamic,wint8]
        [--parts decode_1,decode_8,decode_16,prefill] [--layers 8] [--vocab 33792]

The text layers of Qwen2.5-VL-3B at their true sizes, with random weights. The embedding stays bfloat16 and so does the
head, as msmodelslim leaves them, but for wint8, which rounds the head. There are so many tokens that its share of a
step is what it is in the whole model of 36 layers.
Both engines answer in turn, and the median of the pairs' ratios is printed: above 1 the quantized one is faster.
--cpu-isa avx2 starts a process whose libraries are kept from AVX-512 as far as variables do that: FBGEMM asks the CPU
itself and is not kept from it. The last line of stdout is JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from executor.checkpoint.load import build_on_meta, load_model
from executor.checkpoint.settings import PixelSettings
from executor.checkpoint.weights import Checkpoint
from executor.device import ops
from executor.device.cpu.ops import open_cpu
from executor.device.table import DeviceSettings
from executor.device.weights import DynamicInt8, QuantizedWeight, StaticInt8, WeightInt8
from executor.engine.engine import Engine
from executor.engine.replica import Replica
from executor.engine.runner import Runner
from executor.engine.sampler import Sampler
from executor.launch.options import apply, cpu_options
from executor.layers.linear import Linear
from executor.parallel.groups import SINGLE
from executor.quant.choose import MADE
from executor.quant.float import Float
from executor.schedule.request import SamplingParams
from executor.schedule.scheduler import Scheduler
from models.qwen2_5_vl import runner as family
from tests.benchmarks.against_transformers import TEXT_TOKENS, WITHOUT_AVX512, anonymous_bytes, raw_config, text_prompt
from tests.reference import tokenizer_of

MODEL_LAYERS, MODEL_VOCAB = 36, 151936
SHAPES = ((2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008))
BATCH = {"decode_1": 1, "decode_8": 8, "decode_16": 16}
PARTS = (*BATCH, "prefill")


def static(values: Tensor, scale: Tensor) -> StaticInt8:
    """Of a calibration that found -7 to 9: the values do not matter to the speed."""
    input_scale, offset = 16 / 255, -16.0
    deq_scale = scale * input_scale
    quant_bias = (-offset * values.sum(1, dtype=torch.int64)).to(torch.int32)
    return StaticInt8(values, deq_scale, quant_bias, torch.tensor([input_scale]), torch.tensor([offset]))


SCHEMES: dict[str, Callable[[Tensor, Tensor], QuantizedWeight]] = {
    "w8a8": static,
    "w8a8_dynamic": DynamicInt8,
    "wint8": lambda values, scale: WeightInt8(values, scale.unsqueeze(-1)),
}


class Rounded(Float):
    """Float weights from the checkpoint, rounded by row as they are handed to the backend."""

    def __init__(self, make: Callable[[Tensor, Tensor], QuantizedWeight]) -> None:
        self.make = make

    def prepare_linear(self, device: Any, share: Any, tensors: Any, many_rows: bool) -> Callable[[Tensor], Tensor]:
        weight, bias = tensors["weight"].data.float(), tensors["bias"]
        scale = weight.abs().amax(1) / 127
        values = (weight / scale.unsqueeze(1)).round_().to(torch.int8)
        return device.prepare_linear(self.make(values, scale), None if bias is None else bias.data, many_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-isa", choices=("auto", "avx2", "avx512"), default="auto")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    args = parser.parse_args()
    if args.cpu_isa == "avx2" and not WITHOUT_AVX512.keys() <= os.environ.keys():
        module = "tests.benchmarks.quantized"
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | WITHOUT_AVX512)
    apply(cpu_options(local_ranks=1))  # as the launcher does
    device = open_cpu(DeviceSettings("bfloat16", cpu_isa=args.cpu_isa))
    ops.bind(device)
    raw = small_config(args.layers, args.vocab or round(MODEL_VOCAB * args.layers / MODEL_LAYERS / 256) * 256)
    report = {
        "layers": args.layers,
        "vocab": raw["vocab_size"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device.capability.describe(torch.bfloat16),
        "bytes_per_parameter": {name: round(bytes_each(SCHEMES[name]), 3) for name in args.schemes},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(raw, Path(folder))
        plain = engine_of(raw, Path(folder), None)
        for name in args.schemes:
            engine = engine_of(raw, Path(folder), Rounded(SCHEMES[name]), rounds_head=name in MADE)
            report[name] = {part: compare(part, plain, engine, args) for part in args.parts}
            print(name, report[name], file=sys.stderr, flush=True)
            del engine
            gc.collect()
    print(json.dumps(report))


def small_config(layers: int, vocab: int) -> dict:
    """One vision layer, which no prompt here meets."""
    raw = raw_config(layers) | {"vocab_size": vocab}
    vision = raw["vision_config"]
    return raw | {"vision_config": vision | {"depth": 1, "fullatt_block_indexes": [0]}}


def write_checkpoint(raw: dict, folder: Path) -> None:
    model = build_on_meta(lambda: family.build_model(raw), torch.bfloat16)
    tensors = {}
    for pull in model.pulls({}):
        wide = torch.empty(pull.file_shape, dtype=torch.bfloat16)
        tensors[pull.name] = wide.normal_(0, 0.02) if wide.dim() > 1 else wide.fill_(float("bias" not in pull.name))
    save_file(tensors, folder / "model.safetensors")


def engine_of(raw: dict, folder: Path, scheme: Rounded | None, rounds_head: bool = False) -> Engine:
    device = ops.bound()

    def choose(model: nn.Module) -> tuple[str, ...]:
        for name, layer in model.language_model.named_modules():
            if scheme is not None and isinstance(layer, Linear):
                layer.take(scheme, "qkv" in name)
        if rounds_head:
            model.lm_head.take(scheme)
        return ()

    model, _ = load_model(lambda: family.build_model(raw), Checkpoint(folder), device, torch.bfloat16, choose)
    dtype, text = device.compute_dtype(torch.bfloat16), model.config.text
    num_blocks, block_size = 16 * 12, 128
    kv = device.kv_cache(text.num_layers, num_blocks, block_size, text.num_kv_heads, text.head_dim, dtype)
    pixel_format = PixelSettings(14, 2, 2, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 4 * 28**2, 16384 * 28**2)
    replica = Replica(SINGLE, model.visual.cost, shares_experts=False)
    sampler = Sampler(text.vocab_size, device.device)
    runner = Runner(model, device, kv, block_size, sampler, pixel_format, dtype, replica)
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=block_size, max_num_seqs=16, max_num_batched_tokens=8192, max_model_len=1536,
        enable_prefix_caching=False,
    )  # fmt: skip
    return Engine(
        SimpleNamespace(tokenizer=tokenizer_of("qwen2_5_vl"), eos_token_ids=()), scheduler, runner, text.vocab_size
    )


def compare(part: str, plain: Engine, quantized: Engine, args: argparse.Namespace) -> dict[str, float]:
    pairs = []
    for number in range(args.repeats + 1):
        engines = (plain, quantized) if number % 2 else (quantized, plain)
        times = {id(engine): seconds(part, engine, number, args) for engine in engines}
        pairs.append((times[id(plain)], times[id(quantized)]))
    pairs = pairs[1:]
    plain_s, quantized_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return {"bf16_ms": round(plain_s * 1e3, 1), "ms": round(quantized_s * 1e3, 1), "ratio": round(ratio, 2)}


def seconds(part: str, engine: Engine, number: int, args: argparse.Namespace) -> float:
    """Of a decode step: of two lengths the difference, so that prefill cancels out. Of 1000 tokens to the first one."""

    def answer(batch: int, tokens: int, new: int) -> float:
        prompts = [text_prompt(100 * number + row, tokens) for row in range(batch)]
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        return time.perf_counter() - start

    if part == "prefill":
        return answer(1, TEXT_TOKENS, 1)
    short, long = (answer(BATCH[part], 8, 2 + new) for new in (0, args.new_tokens))
    return (long - short) / args.new_tokens


def bytes_each(make: Callable[[Tensor, Tensor], QuantizedWeight], copies: int = 4) -> float:
    """Memory of a layer's linears, all that stays after packing, divided by their weights."""

    def weights() -> Iterator[tuple[Tensor, Tensor]]:
        for num_out, num_in in SHAPES * copies:
            yield torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8), torch.rand(num_out) * 0.01

    kept = [ops.bound().prepare_linear(make(*next(weights())), None)]  # what libraries take once
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous_bytes()
    kept += [ops.bound().prepare_linear(make(*each), None) for each in weights()]
    ctypes.CDLL(None).malloc_trim(0)  # what packing took and gave back is not the weights'
    return (anonymous_bytes() - before) / (copies * sum(num_out * num_in for num_out, num_in in SHAPES))


if __name__ == "__main__":
    main()
