"""Shared by the tests of the NPU backend: backends per chip, engines over them, and kernels that take fp32."""

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emulator import kernels
from emulator.activate import activate
from emulator.graph import fake_world
from emulator.limits import FLOATS
from emulator.traces import Traces
from executor.checkpoint.description import Description
from executor.checkpoint.load import build_on_meta, load_model
from executor.checkpoint.pull import finalize
from executor.checkpoint.weights import Checkpoint
from executor.commands.build import join, load_draft
from executor.device import ops
from executor.device.cpu.capability import Capability
from executor.device.cpu.ops import CpuOps
from executor.device.npu.ops import NpuOps
from executor.device.npu.soc import SOCS
from executor.device.ops import Ops
from executor.device.table import BACKENDS, DeviceSettings
from executor.engine.engine import Engine
from executor.engine.replica import Replica
from executor.parallel.groups import SINGLE, groups
from executor.prompt.options import media_options
from executor.quant.choose import SCHEMES, assume_schemes, choose_cache, choose_schemes
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare
from models.published import published_config
from models.registry import family_runner

A2, A3, DUO = SOCS
BATCH, MOST_INPUTS = 8, 16  # of steps at true size: requests, and tokens of each at most
WHOLLY_STATIC = "w8a8, down_proj as well"
# The reference computes in the type it is asked for, on every CPU; the products are those of fast_products.
CPU = CpuOps(Capability(isa="other", vectors="", reorders=frozenset(), packs_fp16=False))
_products = torch.library.Library("aten", "IMPL")  # lives as long as the process


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a.float().unsqueeze(0), b.float().unsqueeze(0))[0]


def fast_products() -> None:
    """Matrix products through fp32, rounded once: a CPU takes fifteen times as long over fp16 ones of its own."""
    if not _products._op_impls:
        _products.impl("mm", lambda a, b: _product(a, b).to(a.dtype), "CPU", allow_override=True)
        _products.impl("addmm", _add_product, "CPU", allow_override=True)


def _add_product(bias, a, b, *, beta=1, alpha=1):
    return (bias.float() * beta + _product(a, b) * alpha).to(a.dtype)


def backend(soc: str, **options: Any) -> NpuOps:
    """The backend of an emulated chip, which becomes the emulated one."""
    activate(soc)
    fast_products()
    return NpuOps(SOCS[soc], torch.device("cpu"), **options)


def engine_on(
    device: Ops,
    folder: Path,
    dtype: torch.dtype,
    *,
    model: dict[str, Any] | None = None,
    speculative: dict[str, Any] | None = None,
    **scheduler: Any,
) -> Engine:
    """An engine on any backend in any dtype: past the recipe's own checks of the two. `model`: keys of model_config,
    `speculative` of speculative_config."""
    fast_products()
    settings = {"max_model_len": 2048, "block_size": 16, "max_num_seqs": 8, "num_blocks": 256} | scheduler
    start = {"model_path": str(folder), "device": "cpu", "dtype": "float32"}
    sections = {"model_config": start, "scheduler_config": settings, "speculative_config": speculative or {}}
    prepared = prepare(build_recipe(sections))
    recipe = prepared.recipe.replace(model=model or {})
    ops.bind(device)
    family = family_runner(prepared.config)
    processor = family.build_processor(prepared.folder, media_options(recipe))
    checkpoint = Checkpoint(prepared.folder)
    loaded, _ = load_model(
        lambda: family.build_model(prepared.config),
        checkpoint,
        device,
        dtype,
        lambda model: _choose(model, checkpoint, prepared.description, recipe.model.kv_cache_dtype == "int8"),
    )
    replica = Replica(SINGLE, loaded.visual.cost, shares_experts=False)
    draft, drafting = prepared.draft, None
    if draft is not None:
        draft = replace(draft, recipe=draft.recipe.replace(model=model or {}))
        drafting = load_draft(draft, device, SINGLE, family)
    num_blocks = prepared.memory.num_blocks
    return join(recipe, num_blocks, loaded, processor, device, dtype, replica, drafting=drafting)


def _choose(model: Any, checkpoint: Checkpoint, description: Description | None, int8: bool) -> list[str]:
    left = choose_schemes(model, checkpoint.catalog, description)
    return left + choose_cache(model, checkpoint.catalog, description, int8)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Kernels of A2 and A3 that take halves only take fp32 too, which no chip does: only then is equality exact.

    The kernels' arithmetic is fp32 anyway; their limits are lifted, nothing else.
    """
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    changed = [(module, module.HALF) for module in modules if hasattr(module, "HALF")]
    for module, _ in changed:
        module.HALF = FLOATS
    try:
        yield
    finally:
        for module, half in changed:
            module.HALF = half


@contextlib.contextmanager
def true_size(
    name: str,
    soc: str,
    *,
    tp: int = 1,
    ep: int = 1,
    replicas: int = 1,
    dtype: torch.dtype | None = None,
    layers: int = 2,
    calls: dict[str, str] | None = None,
    int8_cache: bool = False,
    quantization: str = "none",
    vocab_size: int | None = None,
) -> Iterator[Traces]:
    """A published model's first layers on a chip, traced as rank 0 of `tp * replicas` ranks, on meta tensors.

    `calls`: ops that another call of the table serves. `quantization`: a recipe's word, for the vendor's choice of
    layers; WHOLLY_STATIC: every linear of the layers is static. `vocab_size`: None: the published one.
    """
    activate(soc)
    dtype = dtype or SOCS[soc].dtypes[0]
    device = NpuOps(SOCS[soc], torch.device("meta"), dtype=dtype, decode_rows=BATCH * MOST_INPUTS)
    device.calls |= calls or {}
    ops.bind(device)
    config = published_config(name)
    if vocab_size is not None:
        config.get("text_config", config)["vocab_size"] = vocab_size
    world_size = tp * replicas
    with fake_world(world_size) if world_size > 1 else contextlib.nullcontext():
        parallel = groups(world_size, tp, ep, "tp", rank=0) if world_size > 1 else SINGLE
        model = build_on_meta(lambda: _built(config, parallel, layers, quantization, int8_cache), dtype)
        finalize(model)
        yield Traces(model, device, dtype, batch=BATCH, blocks=32, block_size=128)


def _built(config: Any, parallel: Any, layers: int, quantization: str, int8_cache: bool) -> torch.nn.Module:
    model = family_runner(config).build_model(config, parallel)
    model.language_model.layers = model.language_model.layers[:layers]
    settings = DeviceSettings(str(torch.get_default_dtype()).removeprefix("torch."))
    rounds_head = BACKENDS["npu"].takes_int8_head(settings, model.config.text.vocab_size)
    assume_schemes(model, "w8a8" if quantization == WHOLLY_STATIC else quantization, rounds_head)
    if quantization == WHOLLY_STATIC:
        for layer in model.language_model.layers:
            layer.mlp.down_proj.take(SCHEMES["W8A8"], False)
    if int8_cache:
        for layer in model.language_model.layers:
            layer.self_attn.quantize_cache()
    return model
