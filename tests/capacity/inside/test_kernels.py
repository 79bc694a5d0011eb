"""The count table against the emulator: graphs converted and steps traced, of every family, scheme and parallelism.

Models have their published widths and few layers: counts depend on neither, but for the rows of the 300I DUO's gate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from emulator.activate import activate
from emulator.traces import Traces
from executor.capacity.converted import converted_cost
from executor.capacity.costs import Row, decode_cost, prefill_cost, vision_cost
from executor.capacity.kernels import (
    block_kernels,
    counts_eager,
    counts_in_graph,
    prefill_kernels,
    vision_kernels,
)
from executor.checkpoint.load import build_on_meta
from executor.checkpoint.pull import finalize
from executor.command_line import parse
from executor.commands.check import fake_ranks
from executor.commands.plan.run import run
from executor.commands.plan.show import COUNTS
from executor.device import ops
from executor.device.npu.ops import NpuOps
from executor.device.npu.soc import soc_of
from executor.errors import UserError
from executor.quant.choose import assume_schemes
from executor.recipe.graph_sizes import decode_tokens
from executor.recipe.schema import load_recipe
from executor.recipe.sizes import ModelShapes
from models.registry import family_runner
from tests.capacity.models import MOE, QWEN2_5, QWEN3, Degrees, published, recipe_of
from tests.reference import REPO

A2, A3, DUO = "atlas_800i_a2", "atlas_800i_a3", "atlas_300i_duo"
LAYERS, GRID = 4, (1, 60, 34)  # taps stand before the last layer
ONE, TWO = (1, 1, 1, "tp"), (2, 2, 1, "tp")
OF_EXPERTS = (ONE, TWO, (2, 2, 2, "data"), (4, 2, 4, "tp"), (2, 1, 2, "tp"))
QUANTIZATIONS = ("none", "w8a8", "w8a8_dynamic", "w8a16", "w8a8_mix", "w4a8_dynamic", "wint8", "w8a8sc")
SOME = [
    (A3, QWEN3, "w8a8", TWO), (A3, MOE, "none", (4, 2, 4, "tp")), (A2, QWEN2_5, "none", TWO),
    (DUO, QWEN3, "w8a8sc", TWO),
]  # fmt: skip
ALL = [
    form
    for form in product((A2, A3, DUO), (QWEN2_5, QWEN3, MOE), QUANTIZATIONS, OF_EXPERTS)
    if form[1] == MOE or form[3] in (ONE, TWO)
]


@contextmanager
def traced(soc: str, name: str, quantization: str, degrees: Degrees) -> Iterator[tuple[Any, ModelShapes, Traces]]:
    """Rank 0's model on meta tensors. UserError where the chip has not such weights."""
    activate(soc)
    config, shapes = published(name, LAYERS)
    mode = "eager" if soc == DUO else "ge_graph"
    recipe = recipe_of(name, quantization, degrees, soc=soc, exe_mode=mode)
    dtype = getattr(torch, recipe.model.dtype)
    device = NpuOps(soc_of(soc), torch.device("meta"), decode_rows=decode_tokens(recipe), dtype=dtype)
    ops.bind(device)

    with fake_ranks(recipe) as parallel:

        def build() -> Any:
            model = family_runner(config).build_model(config, parallel)
            assume_schemes(model, quantization)
            return model

        model = build_on_meta(build, dtype)
        for _ in model.pulls({}):
            pass  # layers are named, for messages
        finalize(model)
        yield recipe, shapes, Traces(model, device, dtype, batch=8, blocks=32, block_size=128)


def compare(soc: str, name: str, quantization: str, degrees: Degrees) -> None:
    with traced(soc, name, quantization, degrees) as (recipe, shapes, traces):
        eager = [traces.decode_calls(layers, tensors=False) for layers in (1, 2)]
        counts = counts_eager(recipe, shapes)
        assert [counts.total(1), counts.total(2)] == [each.kernels.total() for each in eager]
        cost = decode_cost(recipe, shapes, 8, 4096)
        per, outside = eager[1].collectives.total() - eager[0].collectives.total(), 2 * eager[0].collectives.total()
        assert cost.collectives == per * LAYERS + outside - eager[1].collectives.total()
        if soc != DUO:
            one, two = (traces.decode_graph(layers) for layers in (1, 2))  # more are as many again: check holds that
            counts, (_, few) = counts_in_graph(recipe, shapes), published(name, 2)
            assert [counts.total(1), counts.total(2)] == [one.kernels.total(), two.kernels.total()]
            cost = decode_cost(recipe, few, 8, 4096)
            assert (cost.kernels, cost.collectives) == (two.kernels.total(), two.collectives.total())
            converted = converted_cost(two, recipe, few, 8, 4096)
            assert replace(converted, parts={}) == replace(cost, parts={})
            assert (converted.flops, converted.int8_flops) == (cost.flops, cost.int8_flops)
            assert 0.99 * cost.weight_bytes < converted.weight_bytes <= cost.weight_bytes
        for visual in (0, 510):
            found = traces.prefill_calls(4096, 2048, visual)
            wanted = prefill_cost(recipe, shapes, [Row(2048, visual=visual), Row(2048)])
            assert prefill_kernels(recipe, shapes, 4096, visual > 0) == wanted.kernels == found.kernels.total()
        traces.vision_calls(GRID)  # places and windows are made once and kept
        found = traces.vision_calls(GRID)
        encode = vision_cost(recipe, shapes, [GRID])
        dealt = degrees[3] == "data" and degrees[1] > 1
        assert vision_kernels(recipe, shapes) == found.kernels.total() == encode.kernels - dealt
        assert found.kernels.total() > shapes.vision.depth * block_kernels(recipe, shapes)


@pytest.mark.parametrize("soc, name, quantization, degrees", SOME)
def test_the_table_is_what_the_emulator_counts(soc, name, quantization, degrees):
    compare(soc, name, quantization, degrees)


@pytest.mark.long
@pytest.mark.parametrize("soc, name, quantization, degrees", ALL)
def test_the_whole_table_is_what_the_emulator_counts(soc, name, quantization, degrees):
    try:
        compare(soc, name, quantization, degrees)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("config, quantization", [("quickstart", "none"), ("quickstart_w8a8", "w8a8")])
def test_a_plan_from_the_converted_graph_is_the_plan_by_arithmetic(config, quantization, capsys, tmp_path):
    """The command in both ways, on a float checkpoint and on one whose files say the types of its linears."""
    settings = ["model_config.exe_mode=ge_graph", f"model_config.output_path={tmp_path}"]
    words = ["--chip", "a3_die", "--dtype", "auto", "--set", *settings]
    documents = {}
    for way in ((), ("--from-graph", "--plot")):
        arguments = parse([str(REPO / "config" / f"{config}.yaml"), "plan", *way, *words])
        document, status = run(load_recipe(arguments.config, arguments.overrides))
        assert status == 0 and document["quantization"] == quantization
        assert COUNTS[document["counts_from"]] in capsys.readouterr().out
        documents[document["counts_from"]] = document
    table, graph = documents["table"], documents["ge_graph"]
    exact = ("batch", "kernels", "collectives", "collective_bytes", "flops", "int8_flops", "kv_bytes")
    assert [graph["decode_step"][key] for key in exact] == [table["decode_step"][key] for key in exact]
    assert graph["decode_step"]["kernels"] > 0
    for found, wanted in ((graph["decode_step"], table["decode_step"]), (graph["predicted"], table["predicted"])):
        assert {key: pytest.approx(value, rel=0.01) for key, value in wanted.items()} == found
    same = ("memory_bytes", "max_users", "workload", "calibration_error")
    assert [graph[key] for key in same] == [table[key] for key in same]
    assert graph["plots"] and all(Path(path).is_file() for path in graph["plots"])
