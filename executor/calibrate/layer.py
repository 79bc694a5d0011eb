"""One stage: its layer loaded, the calibration set run through it, its linears quantized, its tensors written down.

In memory at a time: the layer in the type that it computes in, one linear in float32, one sample's activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from executor.calibrate.linears import LinearSource, linears_of, read_tensor
from executor.calibrate.observe import ChannelRange, Histogram, Observed, Products
from executor.calibrate.rounding import (
    INT4,
    INT8,
    four_bit_scales,
    gptq,
    low_entropy_scales,
    nearest,
    row_scales,
)
from executor.calibrate.settings import FLOAT, STATIC, Settings
from executor.calibrate.smooth import Folding, groups_of, smooth
from executor.calibrate.stages import Bench, Stage
from executor.calibrate.tensors import (
    InputRange,
    four_bit_tensors,
    mixed_tensors,
    row_tensors,
    static_tensors,
)
from executor.calibrate.work import Work
from executor.checkpoint.load import default_dtype
from executor.checkpoint.pull import deferred, finalize, materialise, pull_all
from executor.checkpoint.weights import Checkpoint, fill
from executor.checkpoint.writing import Entry, computed_entry, copied_entry, tensor_entry
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.layers.vision import VisionAttention


@dataclass(frozen=True)
class Looked:
    """What a stage's run has shown of its linears' inputs, by the name of the linear in the layer."""

    ranges: Mapping[str, ChannelRange]
    histograms: Mapping[str, Histogram]
    products: Mapping[str, Products]


@dataclass(frozen=True)
class Job:
    """What is the same for all stages. int64_scale: deq_scale as float16 models have it."""

    settings: Settings
    bench: Bench
    build: Callable[[], Any]  # the whole model, without memory
    kinds: Mapping[str, str]
    int64_scale: bool

    @property
    def checkpoint(self) -> Checkpoint:
        return self.bench.checkpoint


def without_memory(job: Job) -> Any:
    """The whole model, to be looked at or filled stage by stage."""
    with default_dtype(job.bench.dtype), deferred():
        return job.build()


def load_stage(job: Job, stage: Stage) -> Any:
    """A model of which this stage's modules alone have weights, in the device's form."""
    bench, model = job.bench, without_memory(job)
    for prefix, module in stage.modules(model):
        materialise(module, bench.device.device)
        fill(_pulls(module, bench.checkpoint, prefix), bench.checkpoint)
        finalize(module)
    model.rope.prepare()
    return model


def _pulls(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> list:
    return list(module.pulls(checkpoint.catalog, prefix) if hasattr(module, "pulls") else
                pull_all(module, checkpoint.catalog, prefix))  # fmt: skip


def linears_of_stage(model: Any, stage: Stage, checkpoint: Checkpoint) -> list[LinearSource]:
    """The stage's linears, of a model whose weights have not been given to the device: it has no memory for them."""
    found: list[LinearSource] = []
    for prefix, module in stage.modules(model):
        _pulls(module, checkpoint, prefix)  # from here on layers know their names
        found += linears_of(module, checkpoint.catalog)
    return found


@torch.inference_mode()
def run_stage(job: Job, stage: Stage, number: int, work: Work, names: list[str], linears: list[LinearSource]) -> None:
    """Run it for every sample, keep their states for the next, and write its tensors (`names`, all it has)."""
    is_run = stage.run is not None and job.settings.needs_activations
    model = load_stage(job, stage) if is_run else without_memory(job)
    looked = Looked({}, {}, {})
    if is_run:
        looked = _look(job, stage, number, work, model, linears)
    folding = Folding()
    if job.settings.smooth:
        for prefix, module in stage.modules(model):
            alpha = job.settings.smooth
            found = smooth(groups_of(module, prefix, linears), looked.ranges, job.kinds, alpha, job.checkpoint)
            folding.divided |= found.divided
            folding.multiplied |= found.multiplied
    if is_run and job.settings.looks_twice:
        looked = _look_again(job, stage, number, work, model, linears, looked, folding)
    del model
    work.finish_stage(number, *entries_of(job, names, linears, looked, folding))


def _wanted(job: Job, linears: list[LinearSource]) -> set[str]:
    """The linears of the layer whose inputs must be known: those of quantized ones, and what their smoothing asks."""
    return {source.module for source in linears if not source.is_expert}


def _watch(model: Any, stage: Stage, look: Callable[[str, Tensor], None], wanted: set[str]) -> None:
    """Show `look` the inputs of the linears of these names, by name, from now on."""
    for _, module in stage.modules(model):
        heads = {part.proj.prefix: part.head_dim for part in module.modules() if isinstance(part, VisionAttention)}
        for layer in module.modules():
            if isinstance(layer, Linear) and layer.prefix in wanted:
                product = layer.product.product if isinstance(layer.product, Observed) else layer.product
                del layer.product  # which may be a module: only another could stand in its place
                narrow = partial(_narrowed, layer.share.num_in, heads.get(layer.prefix))
                layer.product = Observed(product, partial(_shown, look, layer.prefix, narrow))


def _shown(look: Callable[[str, Tensor], None], name: str, narrow: Callable[[Tensor], Tensor], x: Tensor) -> None:
    look(name, narrow(x))


def _narrowed(width: int, head_dim: int | None, x: Tensor) -> Tensor:
    """`x [T, k]` without the zeros that a device has widened vision heads with: behind each half of a head."""
    if x.shape[-1] == width:
        return x
    assert head_dim is not None, f"inputs of {x.shape[-1]}, weights of {width}"
    halves = x.unflatten(-1, (-1, head_dim // 2))
    return halves[..., : width // halves.shape[-2]].flatten(-2)


def _look(job: Job, stage: Stage, number: int, work: Work, model: Any, linears: list[LinearSource]) -> Looked:
    ranges = {name: ChannelRange() for name in _wanted(job, linears)}
    _watch(model, stage, lambda name, x: ranges[name].see(x), set(ranges))
    device = job.bench.device.device
    for index, sample in work.samples():
        state = {name: x.to(device) for name, x in work.state(number, index).items()}
        after = stage.run(job.bench, model, sample, state)
        work.keep_state(number + 1, index, {name: x.cpu() for name, x in after.items()})
    for name, seen in ranges.items():
        if seen.low is not None and not bool(torch.isfinite(seen.largest).all()):
            raise UserError(
                f"{name}: the calibration set's activations are not finite there in {_name(job.bench.dtype)}; take "
                "another --dtype (bfloat16 and float32 have the wider range), or mend the checkpoint"
            )
    return Looked({name: seen for name, seen in ranges.items() if seen.low is not None}, {}, {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _look_again(
    job: Job,
    stage: Stage,
    number: int,
    work: Work,
    model: Any,
    linears: list[LinearSource],
    looked: Looked,
    folding: Folding,
) -> Looked:
    """Once more with the inputs as they are after smoothing: their distribution, their products."""
    settings = job.settings
    quantized = {source.module: source for source in linears if job.kinds[source.name] != FLOAT}
    factors = {module: folding.multiplied.get(source.name) for module, source in quantized.items()}
    histograms: dict[str, Histogram] = {}
    products: dict[str, Products] = {}
    for module, source in quantized.items():
        if module not in looked.ranges:
            continue
        if settings.percentile < 100 and job.kinds[source.name] in STATIC:
            histograms[module] = Histogram(looked.ranges[module].over(factors[module]))
        if settings.rounding == "gptq":
            products[module] = Products()

    def look(name: str, x: Tensor) -> None:
        x = x.float()
        if factors[name] is not None:
            x = x / factors[name].to(x.device)
        for found in (histograms.get(name), products.get(name)):
            if found is not None:
                found.see(x)

    _watch(model, stage, look, {*histograms, *products})
    device = job.bench.device.device
    for index, sample in work.samples():
        state = {name: x.to(device) for name, x in work.state(number, index).items()}
        stage.run(job.bench, model, sample, state)
    return Looked(looked.ranges, histograms, products)


# ---- what is written


def entries_of(
    job: Job, names: list[str], linears: list[LinearSource], looked: Looked, folding: Folding
) -> tuple[list[Entry], dict[str, str]]:
    """The stage's tensors by the source's own names, and the type of each."""
    catalog = job.checkpoint.catalog
    by_tensor: dict[str, list[LinearSource]] = {}
    float_stacks: dict[str, list[LinearSource]] = {}  # experts of a mixture that stay float
    for source in linears:
        if source.expert is not None and job.kinds[source.name] == FLOAT:
            float_stacks.setdefault(source.tensor, []).append(source)
        if job.kinds[source.name] != FLOAT:
            by_tensor.setdefault(source.tensor, []).append(source)
    entries: list[Entry] = []
    kinds: dict[str, str] = {}
    for name in names:
        info = catalog[name]
        if name in float_stacks:
            for source in float_stacks[name]:
                whole = f"{source.original(catalog)}.weight"
                entries.append(_unstacked(job, source, whole))
                kinds[whole] = FLOAT
            continue
        if name not in by_tensor:
            entries.append(_kept(job, name, folding))
            kinds[info.original_name] = FLOAT
            continue
        for source in by_tensor[name]:
            base, kind = source.original(catalog), job.kinds[source.name]
            for suffix, tensor in _quantized(job, source, kind, looked, folding).items():
                entries.append(tensor_entry(f"{base}.{suffix}", tensor))
                kinds[f"{base}.{suffix}"] = kind
    return entries, kinds


def _unstacked(job: Job, source: LinearSource, name: str) -> Entry:
    """One expert's weight [n, k] out of its stack, as it is: others read experts of quantized checkpoints one by one.

    Nothing is folded into experts that stay float (smooth.py).
    """
    dtype = job.checkpoint.catalog[source.tensor].dtype
    return computed_entry(name, dtype, source.shape, lambda: (source.read(job.checkpoint),))


def _kept(job: Job, name: str, folding: Folding) -> Entry:
    """A tensor that stays float, in its own type: what is folded into it are powers of two."""
    info = job.checkpoint.catalog[name]
    base, _, suffix = name.rpartition(".")
    if not folding.touches(base) or suffix not in ("weight", "bias"):
        return copied_entry(info)
    tensor = read_tensor(info)
    folded = folding.weight(base, tensor.float()) if tensor.dim() > 1 else folding.vector(base, tensor.float())
    return tensor_entry(info.original_name, folded.to(tensor.dtype))


def _quantized(job: Job, source: LinearSource, kind: str, looked: Looked, folding: Folding) -> dict[str, Tensor]:
    weight = source.read(job.checkpoint).float()
    if not bool(torch.isfinite(weight).all()):
        raise UserError(
            f"{source.name}: the weight holds values that are not finite; mend the checkpoint, or keep it float: "
            f"--keep_float {source.name}"
        )
    weight = folding.weight(source.name, weight)
    bounds = INT4 if kind == "W4A8_DYNAMIC" else INT8
    scales = {"W8A8S": low_entropy_scales, "W4A8_DYNAMIC": four_bit_scales}.get(kind, row_scales)
    scale = scales(weight)
    found = looked.products.get(source.module)
    if found is None or found.sum is None or source.is_expert:
        rounded = nearest(weight, scale, bounds)
    else:
        rounded = gptq(weight, scale, found.sum, bounds)
    values = rounded.to(torch.int8)
    if kind in ("W8A8_DYNAMIC", "W8A16"):
        return row_tensors(values, scale)
    if kind == "W4A8_DYNAMIC":
        return four_bit_tensors(values, scale, source.is_summed)
    bias = None
    if source.bias in job.checkpoint.catalog:
        bias = folding.vector(source.name, read_tensor(job.checkpoint.catalog[source.bias]).float())
    make = mixed_tensors if kind == "W8A8_MIX" else static_tensors
    return make(values, scale, bias, _input_range(job, source, looked, folding), job.int64_scale)


def _input_range(job: Job, source: LinearSource, looked: Looked, folding: Folding) -> InputRange:
    if source.module in looked.histograms:
        return looked.histograms[source.module].within(job.settings.percentile)
    if source.module not in looked.ranges:
        raise UserError(
            f"--calibration: nothing of it has reached {source.name}, so its activations are not known; add samples "
            f"that do, or keep it float (--keep_float {source.name})"
        )
    return looked.ranges[source.module].over(folding.multiplied.get(source.name))
