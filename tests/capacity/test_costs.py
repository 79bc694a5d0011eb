"""The accounting against the models themselves: operations as a counter sees them, bytes as a checkpoint has them."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from executor.capacity import costs
from executor.capacity.costs import Row, decode_cost, prefill_cost, vision_cost, vision_pairs, vision_passes
from executor.capacity.products import experts, held_bytes, type_of
from executor.capacity.work import StepCost, Work
from executor.checkpoint.pull import finalize, local_bytes
from executor.engine.encode import passes
from executor.engine.forward import ForwardMeta
from executor.recipe.peak import ENCODE_TOKENS
from executor.schedule.request import MediaItem
from models.qwen2_5_vl.vision import window_order
from models.registry import read_shapes
from tests.capacity.models import MOE, QWEN2_5, QWEN3, model_on_meta, published, ready_model, recipe_of, step_of
from tests.reference import FAMILIES, REPO

ATTENTION = "scaled_dot_product"


def tiny(family: str) -> tuple[dict[str, Any], Any]:
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    return config, read_shapes(config, family)


def counted(function: Any, *arguments: Any) -> tuple[int, int]:
    """Operations of a call: (products, attention). Packed weights have a shape of their own, and attention is whole."""

    def packed(x: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
        return 2 * x.shape[-1] * out_val.numel()

    def vector(weight: Any, x: Any, *_: Any, **__: Any) -> int:
        return 2 * weight.numel()

    def attended(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    packed._get_raw = vector._get_raw = attended._get_raw = True  # whole arguments rather than shapes
    mapping = {
        torch.ops.mkldnn._linear_pointwise: packed,
        torch.ops.aten.mv: vector,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attended,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        function(*arguments)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in counts.items() if ATTENTION in op)
    return sum(counts.values()) - attention, attention


def split(cost: StepCost, name: str) -> tuple[float, float]:
    """(products, attention) of a cost."""
    attention = cost.parts[name].flops
    return cost.flops - attention, attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("contexts", [(24,), (24, 24, 24), (5, 40)])
def test_operations_of_a_decode_step_are_those_of_the_model(family, contexts):
    config, shapes = tiny(family)
    recipe, batch = recipe_of(family), len(contexts)
    with ready_model(config) as model:
        found = counted(*flat(step_of(model, [1] * batch, contexts, range(batch))))
    assert found == split(decode_cost(recipe, shapes, batch, sum(contexts) / batch), "attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_step_that_verifies_drafts_are_those_of_the_model(family):
    """Three drafts behind each of two requests' tokens; every place is sampled from."""
    config, shapes = tiny(family)
    with ready_model(config) as model:
        products, attention = counted(*flat(step_of(model, [4, 4], [27, 27], range(8))))
    cost = decode_cost(recipe_of(family), shapes, 2, 24, drafts=3)
    assert split(cost, "attention") == (products, attention * (4 * 23 + 4 * 5 / 2) / (4 * 27))
    assert cost.kv_bytes == pytest.approx(decode_cost(recipe_of(family), shapes, 2, 24).kv_bytes * (27 + 4) / (24 + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_of_a_prefill_step_are_those_of_the_model(family):
    """Its last layer computes the sampled tokens alone. The counter takes a causal square for a whole one."""
    config, shapes = tiny(family)
    with ready_model(config) as model:
        products, attention = counted(*flat(step_of(model, [40, 24], [40, 24], [39, 63])))
    cost = prefill_cost(recipe_of(family), shapes, [Row(40), Row(24)])
    assert split(cost, "attention") == (products, attention * (40 * 41 + 24 * 25) / 2 / (40 * 40 + 24 * 24))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_without_its_prompts_end_and_one_behind_a_cache(family):
    config, shapes = tiny(family)
    with ready_model(config) as model:
        products, attention = counted(*flat(step_of(model, [16, 8], [16, 32], [23])))
    cost = prefill_cost(recipe_of(family), shapes, [Row(16, samples=False), Row(8, 24)])
    whole, seen = 16 * 16 + 8 * 32, 16 * 17 / 2 + 8 * 24 + 8 * 9 / 2
    assert split(cost, "attention") == (products, attention * seen / whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grids", [[(1, 8, 12)], [(1, 6, 10), (2, 4, 4), (1, 14, 2)]])
def test_operations_of_the_encoder_are_those_of_the_model(family, grids):
    """Whole frames, windows with smaller ones at the edges, taps; several pictures and a video in a pass."""
    config, shapes = tiny(family)
    v = shapes.vision
    patches = sum(t * h * w for t, h, w in grids)
    with ready_model(config) as model:
        pixels = torch.zeros(patches, 3 * v.temporal_patch_size * v.patch_size**2)
        found = counted(model.encode, pixels, grids)
    assert found == split(vision_cost(recipe_of(family), shapes, grids), "vision_attention_pairs")


@pytest.mark.parametrize("name", [QWEN2_5, QWEN3])
def test_operations_at_published_sizes(name):
    """Every layer and the whole vocabulary, on the meta device."""
    config, shapes = published(name)
    model = model_on_meta(config, "none", (1, 1, 1, "tp"), torch.float32)
    finalize(model)
    with torch.device("meta"):
        _, (_, _, slots, attention, select, _) = step = step_of(model, [1] * 4, [512] * 4, range(4))
        angles = torch.empty(4, shapes.head_dim)
        forward = ForwardMeta(angles, angles, slots, attention, step[0].kv, select)
        found = counted(lambda x: model(x, forward), torch.empty(4, shapes.hidden_size))
    # Attention is two plain products there.
    assert sum(found) == decode_cost(recipe_of(name), shapes, 4, 512).flops


def flat(step: tuple[Any, tuple]) -> tuple[Any, ...]:
    return step[0], *step[1]


FORMS = [
    (name, quantization, degrees)
    for name in (QWEN2_5, QWEN3, MOE)
    for quantization in ("none", "w8a8", "w8a8_dynamic", "w8a16", "w8a8_mix", "w4a8_dynamic", "wint8", "w8a8sc")
    for degrees in ((1, 1, 1, "tp"), (2, 2, 1, "tp"), (4, 2, 4, "data"), (2, 1, 2, "tp"))
    if name == MOE or degrees[0] == degrees[1]
]


@pytest.mark.parametrize("name, quantization, degrees", FORMS)
def test_bytes_of_weights_are_those_that_a_rank_reads_of_its_checkpoint(name, quantization, degrees):
    """Exactly: values, scales, offsets, biases, norms and positions of every scheme at every degree."""
    config, shapes = published(name, layers=2)
    model = model_on_meta(config, quantization, degrees, torch.bfloat16)
    held = held_bytes(recipe_of(name, quantization, degrees, dtype="bfloat16"), shapes)
    assert sum(held.values()) == local_bytes(model.pulls({}))


@pytest.mark.parametrize("name", [QWEN2_5, QWEN3])
def test_a_dense_step_reads_all_of_the_text_models_weights_but_the_embedding(name):
    _, shapes = published(name)
    recipe = recipe_of(name)
    held, cost = held_bytes(recipe, shapes), decode_cost(recipe, shapes, 3, 100)
    rows = 3 * shapes.hidden_size * 4
    assert cost.weight_bytes == held["text"] + held["vocabulary"] / (1 if shapes.tied_embeddings else 2) + rows
    size = 2 * shapes.num_layers * shapes.num_kv_heads * shapes.head_dim * 4
    assert cost.kv_bytes == size * (3 * 100 + 3)


def test_experts_are_read_where_a_token_needs_them():
    """One token: as many as it has. Many tokens: all. A rank of several: those that it holds."""
    _, shapes = published(MOE)
    recipe = recipe_of(MOE)
    held = experts(recipe, shapes, type_of(recipe))
    assert held.touched(1) == pytest.approx(shapes.experts_per_token)
    assert held.touched(10_000) == pytest.approx(shapes.num_experts)
    one = sum(product.weight_bytes for product in held.one)
    assert decode_cost(recipe, shapes, 1, 10).parts["experts"].weight_bytes == pytest.approx(
        shapes.num_layers * shapes.experts_per_token * one
    )
    split_up = recipe_of(MOE, degrees=(8, 8, 8, "tp"))
    part = experts(split_up, shapes, type_of(split_up))
    assert part.touched(1) == pytest.approx(shapes.experts_per_token / 8)
    whole, eighth = (decode_cost(each, shapes, 64, 10).parts["experts"] for each in (recipe, split_up))
    assert eighth.flops == pytest.approx(whole.flops / 8)
    assert eighth.weight_bytes == pytest.approx(whole.weight_bytes / 8)


@pytest.mark.parametrize("grid", [(1, 20, 30), (3, 16, 16), (2, 34, 4)])
def test_windows_are_those_of_the_encoder(grid):
    _, shapes = published(QWEN2_5)
    v = shapes.vision
    _, lengths = window_order((grid,), v.window_size // v.patch_size, v.merge_size)
    assert vision_pairs(shapes, grid) == (grid[0] * (grid[1] * grid[2]) ** 2, sum(length**2 for length in lengths))


def test_passes_are_those_of_the_encoder():
    """As executor/engine/encode.py cuts them."""
    _, shapes = published(QWEN3)
    grids = [(1, 68, 120), (1, 68, 120), (4, 60, 60), (1, 32, 32), (20, 40, 40), (1, 200, 200)]
    items = [MediaItem("video", b"", None, grid, grid[0] * grid[1] * grid[2] // 4) for grid in grids]
    wanted = [[piece.grid for piece in batch] for batch in passes(items, ENCODE_TOKENS)]
    assert vision_passes(shapes, grids) == wanted


def test_dealt_pictures_cost_the_busiest_rank_its_own():
    _, shapes = published(QWEN3)
    two, four = recipe_of(QWEN3, degrees=(2, 2, 1, "data")), recipe_of(QWEN3, degrees=(4, 4, 1, "data"))
    grids = [(1, 40, 40)] * 4
    one = vision_cost(recipe_of(QWEN3), shapes, grids[:1])
    assert vision_cost(four, shapes, grids).flops == one.flops
    assert vision_cost(two, shapes, grids).flops == pytest.approx(2 * one.flops)
    assert vision_cost(four, shapes, grids).collectives == 4
    assert vision_cost(four, shapes, []) == StepCost()


def test_ranks_share_the_work():
    """Twice the ranks halve what is split; messages are counted as the layers send them."""
    _, shapes = published(QWEN3)
    for quantization in ("none", "w8a8"):
        one, two = (decode_cost(recipe_of(QWEN3, quantization, (tp, tp, 1, "tp")), shapes, 4, 1000) for tp in (1, 2))
        assert two.flops + two.int8_flops == (one.flops + one.int8_flops) / 2
        assert two.kv_bytes == one.kv_bytes / 2
        assert (one.collectives, two.collectives) == (0, 2 * shapes.num_layers + 2)
        hidden, logits = 4 * shapes.hidden_size * 4, 4 * shapes.vocab_size * 4
        assert two.collective_bytes == (2 * shapes.num_layers + 1) * hidden + logits / 2
        assert two.ring_steps == 2 * (2 * shapes.num_layers + 1) + 1


def test_int8_products_are_counted_as_such():
    _, shapes = published(QWEN3)
    plain = decode_cost(recipe_of(QWEN3), shapes, 2, 100)
    static, dynamic, weight_only = (
        decode_cost(recipe_of(QWEN3, word), shapes, 2, 100) for word in ("w8a8", "w8a8_dynamic", "w8a16")
    )
    assert weight_only.int8_flops == 0 and weight_only.flops == plain.flops
    for cost in (static, dynamic):
        assert cost.flops + cost.int8_flops == plain.flops
    down = 2 * 2 * shapes.intermediate_size * shapes.hidden_size * shapes.num_layers
    assert dynamic.int8_flops - static.int8_flops == down, "the vendor leaves the MLP's second linear float"
    assert weight_only.weight_bytes < 0.35 * plain.weight_bytes, "of four bytes one, but for the head"


def test_chunks_add_up_to_the_whole_prompt():
    """Attention and cache writes are the same however a prompt is cut; weights are read again by every step."""
    _, shapes = published(QWEN3)
    recipe = recipe_of(QWEN3)
    whole = prefill_cost(recipe, shapes, [Row(1000)])
    cut = prefill_cost(recipe, shapes, [Row(600, samples=False)]) + prefill_cost(recipe, shapes, [Row(400, 600)])
    assert cut.parts["attention"].flops == whole.parts["attention"].flops
    assert cut.weight_bytes > 1.8 * whole.weight_bytes
    assert cut.parts["head"] == whole.parts["head"]


def test_costs_add_and_scale():
    work = Work(1, 2, 3, 4, 5)
    assert work + work == work * 2 == Work(2, 4, 6, 8, 10)
    assert work.bytes == 12
    step = StepCost({"a": work}, 3, 2, 10.0, 4) + StepCost({"a": work, "b": work}, 1)
    assert step == StepCost({"a": work * 2, "b": work}, 4, 2, 10.0, 4)
    assert (step.flops, step.int8_flops, step.weight_bytes, step.kv_bytes, step.activation_bytes) == (3, 6, 9, 12, 15)
    # Bytes: 21 of weights and cache. Operations: 3 of floats, 6 of integers.
    assert step.floor_s(7.0, 3.0, 6.0) == 3.0
    assert step.floor_s(1e9, 3.0, 6.0) == 2.0


def test_an_npu_widens_vision_heads_and_counts_kernels_and_a_cpu_does_neither():
    _, shapes = published(QWEN3)
    grids = [(1, 20, 20)]
    cpu = vision_cost(recipe_of(QWEN3), shapes, grids)
    npu = vision_cost(recipe_of(QWEN3, soc="atlas_800i_a3"), shapes, grids)
    assert npu.parts["vision_attention_pairs"].flops == cpu.parts["vision_attention_pairs"].flops * 128 / 72
    assert cpu.kernels == 0 and npu.kernels > shapes.vision.depth
    wider = replace(shapes, vision=replace(shapes.vision, hidden_size=1024))
    assert costs.sizes.vision_head_dim(recipe_of(QWEN3, soc="atlas_800i_a3"), wider) == 64
