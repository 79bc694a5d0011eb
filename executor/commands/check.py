"""The `check` command: what a recipe needs of a chip, on any machine, without weights and without the chip.

The decode step is converted at its true size by the real torchair (Atlas A2, A3) or traced (300I DUO, which decodes
eagerly); prefill and vision are traced through the real meta kernels. It proves that calls, shapes, types and
documented limits fit, and what is in the graph; not how fast or how right a chip computes it.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint.description import read_description
from executor.checkpoint.folder import local_checkpoint
from executor.checkpoint.load import build_on_meta
from executor.checkpoint.part_pulls import open_checkpoint
from executor.checkpoint.pull import finalize, local_bytes
from executor.device import ops
from executor.errors import UserError
from executor.parallel.groups import SINGLE, Parallel, groups
from executor.quant.choose import MADE, assume_schemes, choose_cache, choose_schemes, schemes_of
from executor.recipe.device import takes_int8_head
from executor.recipe.graph_sizes import batch_sizes, decode_tokens, graph_sizes, most_inputs, verify_shapes
from executor.recipe.on_paper import settle_on_paper
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes
from models.registry import family_runner

logger = logging.getLogger(__name__)

GRAPH_CHIPS = ("atlas_800i_a2", "atlas_800i_a3")
PICTURE = (1, 60, 34)  # patches of the picture that is traced: 510 visual tokens
NOTE = "converted and traced by emulation: calls, shapes and documented limits, no times"


def run(recipe: Recipe, save: Path | None = None) -> tuple[dict[str, Any], int]:
    """Check `recipe` on its chip; the JSON document and the exit status. `save`: write the decode graph there."""
    recipe, shapes, config = settle(recipe)
    model = recipe.model
    if save is not None and model.soc not in GRAPH_CHIPS:
        raise UserError(
            f"--save: {model.soc} decodes eagerly and has no graph; graphs are for {', '.join(GRAPH_CHIPS)}"
        )
    started = time.monotonic()
    _say(f"emulating {model.soc}")
    from emulator.activate import activate

    activate(model.soc, install=True)
    report = _examined(recipe, config, save)
    document = {
        "command": "check",
        "model": model.model_path,
        "soc": model.soc,
        "dtype": model.dtype,
        "world_size": recipe.parallel.world_size,
        "attn_tp_size": recipe.attn_tp_size,
        "moe_ep_size": recipe.parallel.moe_ep_size,
        "layers": shapes.num_layers,
        "quantization": model.quantization,
        **report,
        "ok": not report["unsupported"],
    }
    _print(document, time.monotonic() - started)
    return document, 0 if document["ok"] else 1


def settle(recipe: Recipe) -> tuple[Recipe, ModelShapes, Mapping[str, Any]]:
    """The recipe for its chip with every `auto` filled in, the model's sizes, and its config.json."""
    if recipe.model.soc is None:
        raise UserError(
            "model_config.soc: check asks what a recipe needs of a chip; name one, as in  "
            "--set model_config.soc=atlas_800i_a2 (or atlas_800i_a3, atlas_300i_duo)"
        )
    # Whatever device the recipe is for, the question is the chip's.
    recipe = recipe.replace(model={"device": "npu_emulated"})
    found = settle_on_paper(recipe, "check")
    return found.recipe, found.shapes, found.config


@contextlib.contextmanager
def fake_ranks(recipe: Recipe) -> Iterator[Parallel]:
    """The groups of rank 0 in the recipe's world, whose other ranks exist in name only."""
    from emulator.graph import fake_world

    degrees = recipe.parallel
    if degrees.world_size == 1:
        yield SINGLE
        return
    with fake_world(degrees.world_size):
        yield groups(degrees.world_size, recipe.attn_tp_size, degrees.moe_ep_size, degrees.vision_parallel, rank=0)


@dataclass(frozen=True)
class OnMeta:
    """Rank 0's model at its true size without memory, ready to be traced, and what it was before it was finalised."""

    traces: Any
    weights_bytes: int
    schemes: dict[str, list[str]]


@contextlib.contextmanager
def on_meta(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[OnMeta]:
    """The model of a settled recipe on its emulated chip, in an emulating process."""
    from emulator.traces import Traces
    from executor.device.npu.ops import NpuOps
    from executor.device.npu.soc import soc_of

    limits, dtype = recipe.scheduler, getattr(torch, recipe.model.dtype)
    device = NpuOps(
        soc_of(recipe.model.soc), torch.device("meta"), weight_nz=recipe.model.enable_weight_nz,
        decode_rows=decode_tokens(recipe), dtype=dtype,
    )  # fmt: skip
    ops.bind(device)
    batch = max(_batch_sizes(recipe))
    blocks = -(-limits.max_model_len // limits.block_size)
    with fake_ranks(recipe) as parallel:
        family = family_runner(config)
        _say(f"building {recipe.model.model_path} at its size, without weights")
        model = build_on_meta(lambda: _quantized(recipe, family.build_model(config, parallel)), dtype)
        size = local_bytes(model.pulls({}))
        schemes = schemes_of(model)
        finalize(model)
        yield OnMeta(Traces(model, device, dtype, batch, blocks, limits.block_size), size, schemes)


def decode_graph(recipe: Recipe, config: Mapping[str, Any]) -> Any:
    """The decode step of a settled recipe for A2 or A3 as its GE graph, in this process, which emulates from then on.

    UserError where torch_npu cannot be had, RuntimeError where torchair cannot convert the step.
    """
    from emulator.activate import activate

    activate(recipe.model.soc, install=True)
    with on_meta(recipe, config) as built:
        _say(f"converting the decode step, {built.traces.num_layers} layers")
        return built.traces.decode_graph()


def _examined(recipe: Recipe, config: Mapping[str, Any], save: Path | None) -> dict[str, Any]:
    """The report's part that comes out of conversion and tracing."""
    from emulator import chips

    limits = recipe.scheduler
    with on_meta(recipe, config) as built:
        traces, model = built.traces, built.traces.model
        in_graph = recipe.model.soc in GRAPH_CHIPS
        counts, failures = _graph_counts(traces, save) if in_graph else (_traced_counts(traces), [])
        patches = PICTURE[0] * PICTURE[1] * PICTURE[2]
        _say(f"tracing a decode step of {traces.batch} requests")
        traced = {"decode": traces.decode_calls(tensors=in_graph)}
        verified, faults = _verify_counts(traces, recipe, in_graph)
        if not failures:
            faults += _grown_layers(counts, verified)
        for q_len in verified:
            _say(f"tracing a step that verifies drafts, {q_len} tokens of a request")
            has_graph = verified[q_len]["from"] == "ge_graph"
            traced[f"verify_{q_len}"] = traces.decode_calls(tensors=has_graph, q_len=q_len)
        _say(f"tracing a prefill step of {limits.max_num_batched_tokens} tokens")
        traced["prefill"] = traces.prefill_calls(limits.max_num_batched_tokens, limits.max_model_len, patches // 4)
        _say(f"tracing the vision encoder on {patches // 4} tokens")
        traced["vision"] = traces.vision_calls(PICTURE)
        if in_graph:
            _say("converting a vision block")
        block = traces.vision_block_graph(patches).kernels if in_graph else _per_vision_block(traced["vision"], model)
    called = {call.op for recorded in traced.values() for call in recorded.calls}
    refused, undocumented = chips.report({op.partition(".")[0] for op in called}, chips.current())
    violations = [f"{step}: {text}" for step, recorded in traced.items() for text in recorded.violations]
    return {
        **counts,
        "verify": verified,
        "schemes": built.schemes,
        "weights_bytes": built.weights_bytes,
        "decode_from": "ge_graph" if in_graph else "traced step",
        "vision_nodes_per_block": sum(block.values()),
        "vision_ops_per_block": dict(block),
        "calls": {step: _sorted(recorded.counts) for step, recorded in traced.items()},
        "moved_bytes": {step: recorded.moved_bytes for step, recorded in traced.items()},
        "unsupported": [*failures, *faults, *(f"{s.op}: {s.source}" for s in refused), *violations],
        "undocumented": [f"{s.op}: {s.source}" for s in undocumented],
        "note": NOTE,
    }


def _quantized(recipe: Recipe, model: torch.nn.Module) -> torch.nn.Module:
    """The model with its schemes: by the folder's description, or the vendor's choice where the folder is not here."""
    folder = local_checkpoint(recipe.model.model_path, recipe.model.hub)
    if folder is None or recipe.model.quantization in MADE:
        assume_schemes(model, recipe.model.quantization, takes_int8_head(recipe, model.config.text.vocab_size))
    if folder is not None:
        catalog = open_checkpoint(folder, 0, recipe.attn_tp_size).catalog
        description = read_description(folder)
        if recipe.model.quantization not in MADE:
            choose_schemes(model, catalog, description)
        choose_cache(model, catalog, description, recipe.model.kv_cache_dtype == "int8")
    return model


def _batch_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Of the decode graphs; whatever its exe_mode, a recipe is checked with graphs where the chip has them."""
    return graph_sizes(recipe) or batch_sizes(recipe.scheduler.max_num_seqs)


def _say(step: str) -> None:
    """A line for each step on stderr: a large model takes a minute and more."""
    logger.info("%s ...", step)


def _graph_counts(traces: Any, save: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Kernels of the converted decode step: per layer from one more layer, the rest from what all layers leave."""
    _say(f"converting the decode step, {traces.num_layers} layers, then 1 and 2 to compare")
    try:
        whole, one, two = traces.decode_graph(), traces.decode_graph(1), traces.decode_graph(2)
    except RuntimeError as error:
        return _counts(Counter(), Counter(), Counter()), [f"decode graph: {error}"]
    if save is not None:
        whole.save(save)
        logger.info("the decode graph is in %s", save)
    counts = _converted_counts(one, two)
    expected = counts["kernel_nodes_fixed"] + traces.num_layers * counts["kernel_nodes_per_layer"]
    assert whole.kernels.total() == expected, f"{whole.kernels.total()} nodes, {expected} by layers: they differ"
    return counts, []


def _verify_counts(traces: Any, recipe: Recipe, in_graph: bool) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Kernels of the step that verifies drafts, by the tokens of a request: as graphs, each of its length, or traced
    where it runs eagerly. Of one layer and two: the others are as the second. And what keeps it from being made."""
    found: dict[int, dict[str, Any]] = {}
    if most_inputs(recipe) == 1:
        return found, []
    lengths = sorted({shape.q_len for shape in verify_shapes(recipe, _batch_sizes(recipe)) if in_graph})
    for q_len in lengths:
        _say(f"converting the step that verifies drafts, {q_len} tokens of a request, 1 layer and 2")
        try:
            one, two = (traces.decode_graph(layers, q_len=q_len) for layers in (1, 2))
        except RuntimeError as error:
            return found, [f"graph of {q_len} tokens of a request: {error}"]
        found[q_len] = {"from": "ge_graph", **_converted_counts(one, two)}
    if not lengths:
        found[most_inputs(recipe)] = {"from": "traced step", **_traced_counts(traces, most_inputs(recipe))}
    return found, []


def _grown_layers(decode: dict[str, Any], verified: dict[int, dict[str, Any]]) -> list[str]:
    """Graphs that have more kernels in a layer than the decode step's: none should, the rows of both are tokens."""
    key = "kernel_nodes_per_layer"
    return [
        f"graph of {q_len} tokens of a request: {each[key]} kernels per layer, a decode step has {decode[key]}"
        for q_len, each in verified.items()
        if each["from"] == "ge_graph" and each[key] > decode[key]
    ]


def _converted_counts(one: Any, two: Any) -> dict[str, Any]:
    """Of the graphs of one layer and of two."""
    from emulator.graph import per_layer

    layer, fixed = per_layer(one, two), Counter(one.kernels)
    fixed.subtract(layer)
    return _counts(layer, fixed, Counter({t: n for t, n in layer.items() if t in two.collectives}))


def _traced_counts(traces: Any, q_len: int = 1) -> dict[str, Any]:
    one, two = (traces.decode_calls(layers, tensors=False, q_len=q_len) for layers in (1, 2))
    layer, fixed = Counter(two.kernels), Counter(one.kernels)
    layer.subtract(one.kernels)
    fixed.subtract(layer)
    return _counts(+layer, fixed, Counter({t: n for t, n in (+layer).items() if t in two.collectives}))


def _per_vision_block(recorded: Any, model: torch.nn.Module) -> Counter[str]:
    """Kernels that stand once or more in every block, of a traced encoder."""
    depth = len(model.visual.blocks)
    return Counter({kind: count // depth for kind, count in recorded.kernels.items() if count >= depth})


def _counts(layer: Counter[str], fixed: Counter[str], collectives: Counter[str]) -> dict[str, Any]:
    return {
        "kernel_nodes_per_layer": layer.total(),
        "kernel_nodes_fixed": fixed.total(),
        "collectives_per_layer": collectives.total(),
        "ops_per_layer": _sorted(layer),
        "ops_fixed": _sorted(fixed),
    }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {kind: count for kind, count in sorted(counts.items()) if count}


def _print(document: dict[str, Any], seconds: float) -> None:
    """The report for the eye."""

    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "nothing"

    lines: list[tuple[str, str]] = [
        ("model", f"{document['model']}, {document['layers']} layers, {document['dtype']}"),
        ("ranks", f"{document['world_size']}, attention over {document['attn_tp_size']}, "
                  f"experts in {document['moe_ep_size']} groups"),
        ("weights", f"{document['weights_bytes'] / 2**30:.2f} GiB per rank"),
        *((scheme, ", ".join(names)) for scheme, names in document["schemes"].items() if scheme != "none"),
        ("decode", f"{document['kernel_nodes_per_layer']} kernels per layer, {document['collectives_per_layer']} of "
                   f"them collectives, {document['kernel_nodes_fixed']} outside ({document['decode_from']})"),
        *(("verify", f"{q_len} tokens of a request: {each['kernel_nodes_per_layer']} kernels per layer, "
                     f"{each['kernel_nodes_fixed']} outside ({each['from']})")
          for q_len, each in document["verify"].items()),
        ("layer", listed(document["ops_per_layer"])),
        ("outside", listed(document["ops_fixed"])),
        ("vision", f"{document['vision_nodes_per_block']} kernels per block"),
        ("block", listed(document["vision_ops_per_block"])),
        ("prefill", listed(document["calls"]["prefill"])),
    ]  # fmt: skip
    print(f"{document['soc']}: {'ok' if document['ok'] else 'NOT ok'} after {seconds:.1f} s ({NOTE})")
    for name, text in (*lines, *_problems("unsupported", document), *_problems("undocumented", document)):
        print(f"  {name:<13}{text}")
    print("  memory and predicted speed: the command plan, with the same options")


def _problems(kind: str, document: dict[str, Any]) -> Iterable[tuple[str, str]]:
    return ((kind, text) for text in document[kind])
