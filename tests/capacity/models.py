"""Models, recipes and steps that the accounting is compared with."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from executor.checkpoint.load import build_on_meta, default_dtype
from executor.checkpoint.pull import finalize
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.device.table import BACKENDS, DeviceSettings
from executor.engine.step import ModelStep
from executor.parallel.groups import groups
from executor.quant.choose import assume_schemes
from executor.recipe.schema import Recipe, build_recipe
from executor.recipe.sizes import ModelShapes
from models.published import published_config
from models.registry import family_runner, read_shapes

QWEN2_5, QWEN3, MOE = "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"
BLOCK = 16
Degrees = tuple[int, int, int, str]  # world_size, attn_tp_size, moe_ep_size, vision_parallel


def recipe_of(
    name: str,
    quantization: str = "none",
    degrees: Degrees = (1, 1, 1, "tp"),
    *,
    soc: str | None = None,
    exe_mode: str = "eager",
    dtype: str = "",
    **scheduler: int,
) -> Recipe:
    """A settled recipe; `soc` None: on the CPU, in float32 unless `dtype` says another."""
    world, tp, ep, vision = degrees
    dtype = dtype or ("float32" if soc is None else "float16" if soc == "atlas_300i_duo" else "bfloat16")
    model = {
        "model_path": name, "device": "cpu" if soc is None else "npu", "soc": soc, "dtype": dtype,
        "exe_mode": exe_mode, "quantization": quantization, "kv_cache_dtype": "float",
    }  # fmt: skip
    parallel = {"world_size": world, "attn_tp_size": tp, "moe_ep_size": ep, "vision_parallel": vision}
    limits = {"max_model_len": 4096, "max_num_seqs": 8} | scheduler
    return build_recipe({"model_config": model, "parallel_config": parallel, "scheduler_config": limits})


def published(name: str, layers: int | None = None) -> tuple[dict[str, Any], ModelShapes]:
    """config.json and sizes of a published model, with fewer text layers where `layers` says so."""
    config = published_config(name)
    if layers is not None:
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
    return config, read_shapes(config, name)


def model_on_meta(config: dict[str, Any], quantization: str, degrees: Degrees, dtype: torch.dtype) -> Any:
    """Rank 0's model, without memory, its linears in the types that the vendor chooses, as a CPU takes them."""
    world, tp, ep, vision = degrees
    rank = groups(world, tp, ep, vision, rank=0, new_group=lambda ranks, buffer_mb: None)
    ops.bind(CpuOps())

    def build() -> Any:
        model = family_runner(config).build_model(config, rank)
        settings = DeviceSettings(str(dtype).removeprefix("torch."))
        rounds_head = BACKENDS["cpu"].takes_int8_head(settings, model.config.text.vocab_size)
        assume_schemes(model, quantization, rounds_head)
        return model

    return build_on_meta(build, dtype)


@contextmanager
def ready_model(config: dict[str, Any]):
    """One rank's float32 model of small weights on the CPU, bound and ready."""
    ops.bind(CpuOps())
    with default_dtype(torch.float32):
        model = family_runner(config).build_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator)
    finalize(model)
    yield model


def step_of(model: Any, q_lens: Sequence[int], kv_lens: Sequence[int], samples: Sequence[int]) -> tuple[Any, tuple]:
    """A ModelStep and its arguments: rows of new tokens over so many cached, logits of the tokens `samples`."""
    device, shapes = ops.bound(), model.language_model.layers[0].self_attn
    blocks = [-(-length // BLOCK) for length in kv_lens]
    tables, first = [], 0
    for count in blocks:
        tables.append(list(range(first, first + count)))
        first += count
    kv = device.kv_cache(
        len(model.language_model.layers), first, BLOCK, shapes.num_kv_heads, shapes.head_dim, torch.float32
    )
    for layer in kv:
        layer.k.zero_(), layer.v.zero_()
    slots = torch.cat(
        [
            torch.arange(total - new, total) + table[0] * BLOCK
            for new, total, table in zip(q_lens, kv_lens, tables, strict=True)
        ]
    )
    attention = device.prepare_attention(q_lens, kv_lens, tables, BLOCK)
    tokens = sum(q_lens)
    ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens).expand(3, tokens)
    step = ModelStep(model, kv, BLOCK, torch.float32)
    return step, (ids, positions, slots, attention, torch.tensor(samples), None)
