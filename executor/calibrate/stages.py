"""The model cut into stages, each run with nothing but its own weights in memory: a layer, a merger, an embedding.

What goes from stage to stage is a sample's state, a few tensors by name. Both families' encoders and text models are
called by the methods that their own forward is made of; a test holds the stages' result equal to it.
Legend: P patches of a piece of a picture or video, T tokens of a prompt, n hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from executor.calibrate.sample import Sample
from executor.checkpoint.load import EMBEDDING
from executor.checkpoint.mapped import mapped_rows
from executor.checkpoint.weights import Checkpoint
from executor.device.ops import KVLayer, Ops
from executor.engine.forward import DeepStack, ForwardMeta

State = dict[str, Tensor]
BLOCK_SIZE = 128  # of the cache that one layer's keys and values go through

VISION = "model.visual."
TEXT = "model.language_model."


@dataclass(frozen=True)
class Bench:
    """What stages run on. `cache`: one layer's, for the longest prompt; every layer overwrites it."""

    device: Ops
    dtype: torch.dtype
    checkpoint: Checkpoint
    cache: KVLayer | None = None


Run = Callable[[Bench, Any, Sample, State], State]


@dataclass(frozen=True)
class Stage:
    """prefixes: of the checkpoint's tensors that belong to it, by canonical name. run: None where nothing follows.

    has_weights: whether `run` needs the modules of these prefixes.
    """

    name: str
    prefixes: tuple[str, ...]
    run: Run | None
    has_weights: bool = True

    def modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules of a model that is built, with their canonical prefixes."""
        for prefix in self.prefixes if self.has_weights else ():
            module = model
            for name in prefix.removeprefix("model.").split("."):
                module = getattr(module, name, None) if not isinstance(module, nn.ModuleList) else module[int(name)]
            if module is not None:
                yield prefix, module


def stages_of(model: nn.Module) -> list[Stage]:
    """All stages of a model, in the order in which they run; the last has every tensor that no other has."""
    visual, text = model.visual, model.language_model
    stages = [Stage("vision embedding", (f"{VISION}patch_embed", f"{VISION}pos_embed"), _embed_patches)]
    num_taps = 0
    for layer in range(len(visual.blocks)):
        stages.append(Stage(f"vision layer {layer}", (f"{VISION}blocks.{layer}",), _vision_layer(layer)))
        if layer in visual.tapped_layers:
            prefix = f"{VISION}deepstack_merger_list.{num_taps}"
            stages.append(Stage(f"vision tap {num_taps}", (prefix,), _tap(num_taps)))
            num_taps += 1
    stages.append(Stage("vision merger", (f"{VISION}merger",), _merge))
    stages.append(Stage("token embedding", (EMBEDDING,), _embed_tokens, has_weights=False))
    for layer in range(len(text.layers)):
        stages.append(Stage(f"text layer {layer}", (f"{TEXT}layers.{layer}",), _text_layer(layer)))
    return [*stages, Stage("the rest", ("",), None, has_weights=False)]


def tensors_of(stages: list[Stage], catalog: Mapping[str, Any]) -> list[list[str]]:
    """The canonical names of every stage's tensors, in the checkpoint's order: each tensor in exactly one stage."""
    owner = {prefix: number for number, stage in enumerate(stages) for prefix in stage.prefixes}
    held: list[list[str]] = [[] for _ in stages]
    for name in catalog:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        held[next(owner[prefix] for prefix in prefixes if prefix in owner)].append(name)
    return held


# ---- what they compute


def _embed_patches(bench: Bench, model: Any, sample: Sample, state: State) -> State:
    return {f"x.{n}": model.visual.embed(state[f"patches.{n}"], [grid]) for n, grid in enumerate(sample.grids)}


def _vision_layer(layer: int) -> Run:
    def run(bench: Bench, model: Any, sample: Sample, state: State) -> State:
        changed = {}
        for number, grid in enumerate(sample.grids):
            x = state[f"x.{number}"]
            changed[f"x.{number}"] = model.visual.block(layer, x, model.visual.place(x, [grid]))
        return {**state, **changed}

    return run


def _tap(tap: int) -> Run:
    def run(bench: Bench, model: Any, sample: Sample, state: State) -> State:
        merger = model.visual.deepstack_merger_list[tap]
        return {**state, **{f"tap{tap}.{n}": merger(state[f"x.{n}"]) for n in range(len(sample.grids))}}

    return run


def _merge(bench: Bench, model: Any, sample: Sample, state: State) -> State:
    visual, features = model.visual, {}
    for number, grid in enumerate(sample.grids):
        merged = visual.merger(state[f"x.{number}"])
        taps = [state[f"tap{tap}.{number}"] for tap in range(model.num_taps)]
        features[f"features.{number}"] = visual.gather(merged, taps, [grid])
    return features


def _embed_tokens(bench: Bench, model: Any, sample: Sample, state: State) -> State:
    """Rows of the embedding where they lie in the file: nothing else of it is read."""
    info = bench.checkpoint.find(f"{EMBEDDING}.weight")
    rows = mapped_rows(info, slice(0, info.shape[0]))
    x = rows[sample.token_ids].to(bench.device.device, bench.dtype)
    if not sample.spans:
        return {"x": x}
    features = torch.cat(sample.placed([state[f"features.{n}"] for n in range(len(sample.grids))]))
    index = sample.visual_index().to(x.device)
    x.index_copy_(0, index, features[:, 0].to(x.dtype))
    return {"x": x, "index": index, "features": features[:, 1:].contiguous()} if model.num_taps else {"x": x}


def _text_layer(layer: int) -> Run:
    def run(bench: Bench, model: Any, sample: Sample, state: State) -> State:
        device, count = bench.device, len(sample.token_ids)
        cos, sin = model.rope(sample.positions.to(device.device), bench.dtype)
        slots = torch.arange(count).to(device.slot_dtype).to(device.device)
        blocks = list(range(-(-count // BLOCK_SIZE)))
        attention = device.prepare_attention([count], [count], [blocks], BLOCK_SIZE)
        deepstack = DeepStack(state["index"], state["features"]) if "features" in state else None
        meta = ForwardMeta(cos, sin, slots, attention, [bench.cache] * (layer + 1), None, deepstack)
        x, residual = model.language_model.layer(layer, state["x"], state.get("residual"), meta)
        after = {"x": x, "residual": residual}
        if deepstack is not None and layer + 1 < model.num_taps:
            after |= {name: state[name] for name in ("index", "features")}
        return after

    return run


def with_cache(bench: Bench, model: Any, longest: int) -> Bench:
    """With room for one layer's keys and values of a prompt of `longest` tokens."""
    attention = model.language_model.layers[0].self_attn
    num_blocks = -(-longest // BLOCK_SIZE)
    (cache,) = bench.device.kv_cache(
        1, num_blocks, BLOCK_SIZE, attention.num_kv_heads, attention.head_dim, bench.dtype,
        normed=attention.q_norm is not None,
    )  # fmt: skip
    return replace(bench, cache=cache)
