"""The model's own cost accounting: what a decode step, a prefill step and a pass of the encoder ask of one rank.

From sizes and a settled recipe (no auto, no null) alone: no tensor, no chip, no time. Operations and bytes follow the
layers, kernels and collectives the graphs that the emulator converts (executor/capacity/kernels.py); tests hold each
against what it stands for. Of several replicas it is one replica's rank; experts see the tokens of all replicas.
Legend: n hidden size, H and K query and key heads of this rank, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from executor.capacity import products as sizes
from executor.capacity.kernels import decode_kernels, prefill_kernels, vision_kernels
from executor.capacity.products import Product, TypeOf
from executor.capacity.work import Messages, StepCost, Work, gathered, summed
from executor.engine.replica import deal
from executor.quant.sizes import FLOAT_BYTES
from executor.recipe.peak import ENCODE_TOKENS
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

Grid = tuple[int, int, int]  # temporal patches, patch rows, patch columns


@dataclass(frozen=True)
class Row:
    """One request's part of a step: `new` tokens behind `cached` ones.

    samples: its last token's logits are wanted. visual: how many of the new tokens are pictures'.
    """

    new: float  # a whole number, or an average
    cached: float = 0
    samples: bool = True
    visual: int = 0

    @property
    def pairs(self) -> float:
        """Queries by the keys that each of them sees."""
        return self.new * self.cached + self.new * (self.new + 1) / 2


@dataclass(frozen=True)
class _Text:
    """A text step's numbers: all that its cost depends on."""

    tokens: float
    sampled: float
    pairs: float
    read_tokens: float  # cached keys that are read, with the new ones
    visual: int


def decode_cost(
    recipe: Recipe, shapes: ModelShapes, batch: int, context: float, types: TypeOf | None = None, drafts: float = 0
) -> StepCost:
    """A decode step of `batch` requests of one replica, each with `context` tokens, the new one among them.

    `drafts`: tokens behind it that are verified in the same step, of every request, or on average.
    """
    row = Row(1 + drafts, context - 1)
    tokens = batch * row.new
    step = _Text(tokens, tokens, batch * row.pairs, batch * (context + drafts), 0)
    kernels = decode_kernels(recipe, shapes)
    return _text_cost(recipe, shapes, step, types or sizes.type_of(recipe), kernels)


def prefill_cost(recipe: Recipe, shapes: ModelShapes, rows: Sequence[Row], types: TypeOf | None = None) -> StepCost:
    """A step of these rows of one replica, without the encoder: prompts, chunks of them, decoding rows among them."""
    step = _Text(
        sum(row.new for row in rows),
        sum(row.samples for row in rows),
        sum(row.pairs for row in rows),
        sum(row.new + row.cached for row in rows),
        sum(row.visual for row in rows),
    )
    kernels = prefill_kernels(recipe, shapes, step.tokens, step.visual > 0)
    return _text_cost(recipe, shapes, step, types or sizes.type_of(recipe), kernels)


def _text_cost(recipe: Recipe, shapes: ModelShapes, step: _Text, types: TypeOf, kernels: int) -> StepCost:
    size, n = FLOAT_BYTES[recipe.model.dtype], shapes.hidden_size
    qkv, o = sizes.attention_products(recipe, shapes, types)
    out = sizes.head(recipe, shapes)
    parts = {
        "embedding": Work(0.0, 0.0, step.tokens * n * size, 0.0, step.tokens * n * size),
        "attention_linears": qkv.cost(step.tokens) * qkv.count + _but_last(o, step),
        "attention": _attention(recipe, shapes, step) * shapes.num_layers,
        "elementwise": _elementwise(recipe, shapes, step),
        "head": out.cost(step.sampled) + Work(activation_bytes=4.0 * step.sampled * out.num_out),
    }
    dense = sizes.mlp_products(recipe, shapes, types)
    if dense:
        # The last layer of a mixture of experts is one of its sparse layers.
        each = (product.cost(step.tokens) * product.count for product in dense)
        parts["mlp"] = sum(each if shapes.num_experts else (_but_last(product, step) for product in dense), Work())
    if shapes.num_experts:
        parts |= _mixture(recipe, shapes, step, types)
    return _collectives(recipe, shapes, step, size).cost(parts, kernels)


def _but_last(product: Product, step: _Text) -> Work:
    """Of all layers: behind its attention the last layer computes the sampled tokens alone."""
    return product.cost(step.tokens) * (product.count - 1) + product.cost(step.sampled)


def _attention(recipe: Recipe, shapes: ModelShapes, step: _Text) -> Work:
    """Of one layer: scores and weighted sums, the cache read and written; queries read, results written."""
    heads, size = shapes.num_heads // recipe.attn_tp_size, FLOAT_BYTES[recipe.model.dtype]
    kv_size = 1 if recipe.model.kv_cache_dtype == "int8" else size
    cached = 2 * sizes.num_kv_heads(recipe, shapes) * shapes.head_dim * kv_size
    width = heads * shapes.head_dim
    return Work(
        flops=4.0 * width * step.pairs,
        kv_bytes=float(cached * (step.read_tokens + step.tokens)),
        activation_bytes=2.0 * step.tokens * width * size,
    )


def _elementwise(recipe: Recipe, shapes: ModelShapes, step: _Text) -> Work:
    """Of all layers: norms with the residual, rotation of queries and keys, the MLP's activation, DeepStack."""
    tp, size, n = recipe.attn_tp_size, FLOAT_BYTES[recipe.model.dtype], shapes.hidden_size
    layers, dim = shapes.num_layers, shapes.head_dim
    heads, kv = shapes.num_heads // tp, sizes.num_kv_heads(recipe, shapes)
    normed = 4.0 * n * ((2 * layers - 1) * step.tokens + 2 * step.sampled)
    rotated = layers * step.tokens * 2.0 * (heads + kv) * dim
    dense = shapes.num_dense_layers if shapes.num_experts else layers
    gated = dense * step.tokens * 3.0 * shapes.intermediate_size / tp
    taps = 3.0 * shapes.vision.num_taps * step.visual * n
    norms = shapes.norm_parameters + layers * shapes.replicated_attention_parameters
    return Work(weight_bytes=float(norms * size), activation_bytes=(normed + rotated + gated + taps) * size)


def _mixture(recipe: Recipe, shapes: ModelShapes, step: _Text, types: TypeOf) -> dict[str, Work]:
    """Routers and experts of all sparse layers, over the tokens of all replicas; rows sorted, gated and summed back."""
    replicas, size = recipe.parallel.world_size // recipe.attn_tp_size, FLOAT_BYTES[recipe.model.dtype]
    held, gate = sizes.experts(recipe, shapes, types), sizes.router(recipe, shapes)
    tokens, last = step.tokens * replicas, step.sampled * replicas
    share = held.num_local / held.num_experts
    rows = ((held.count - 1) * tokens + last) * held.per_token * share
    moved = rows * (4.0 * shapes.hidden_size + 3.0 * held.inner) * size
    return {
        "router": gate.cost(tokens) * (gate.count - 1) + gate.cost(last),
        "experts": held.cost(tokens) * (held.count - 1) + held.cost(last),
        "routing": Work(activation_bytes=moved),
    }


def _collectives(recipe: Recipe, shapes: ModelShapes, step: _Text, size: int) -> Messages:
    """Sums behind attention and MLP, of the embedding's parts, and the gathering of logits; experts' over the world."""
    tp, world = recipe.attn_tp_size, recipe.parallel.world_size
    replicas, layers, n = world // tp, shapes.num_layers, shapes.hidden_size
    each = ((layers - 1) * step.tokens + step.sampled) * n * size / layers  # of a layer on average, behind attention
    sparse = layers - shapes.num_dense_layers if shapes.num_experts else 0
    found = summed(step.tokens * n * size, tp) + gathered(step.sampled * shapes.vocab_size // tp * size, tp)
    found += summed(each, tp) * (layers + layers - sparse)
    return found + (gathered(each, replicas) + summed(each * replicas, world)) * sparse


def vision_cost(recipe: Recipe, shapes: ModelShapes, grids: Sequence[Grid], types: TypeOf | None = None) -> StepCost:
    """Encoding these pictures and videos, in as many passes as the encoder makes of them, on the busiest rank.

    Under vision_parallel data whole pictures are dealt to the ranks, and each rank's features are sent to the others.
    """
    types = types or sizes.type_of(recipe)
    if not grids:
        return StepCost()
    ranks = recipe.attn_tp_size if recipe.parallel.vision_parallel == "data" else 1
    owners = deal([vision_flops(shapes, grid) for grid in grids], ranks)
    loads = [[grid for grid, owner in zip(grids, owners, strict=True) if owner == rank] for rank in range(ranks)]
    busiest = max(loads, key=lambda load: sum(vision_flops(shapes, grid) for grid in load))
    cost = sum((_vision_pass(recipe, shapes, part, types) for part in vision_passes(shapes, busiest)), StepCost())
    if ranks == 1:
        return cost
    v = shapes.vision
    features = sum(_tokens(shapes, grid) for grid in grids) * (1 + v.num_taps) * v.out_size
    told = Messages(len(grids), float(features * FLOAT_BYTES[recipe.model.dtype]), len(grids) * (ranks - 1))
    return cost + told.cost({}, len(grids))


def vision_passes(shapes: ModelShapes, grids: Sequence[Grid]) -> list[list[Grid]]:
    """Cut as executor/engine/encode.py cuts them: a pass has at most ENCODE_TOKENS visual tokens, or one frame."""
    passes: list[list[Grid]] = []
    room = 0
    for t, h, w in grids:
        tokens = _tokens(shapes, (t, h, w))
        frames = t if tokens <= ENCODE_TOKENS else max(1, ENCODE_TOKENS * t // tokens)
        for first in range(0, t, frames):
            piece = (min(frames, t - first), h, w)
            if not passes or _tokens(shapes, piece) > room:
                passes.append([])
                room = ENCODE_TOKENS
            passes[-1].append(piece)
            room -= _tokens(shapes, piece)
    return passes


def vision_pairs(shapes: ModelShapes, grid: Grid) -> tuple[int, int]:
    """Queries by keys of one block that attends over frames, and of one that attends inside windows."""
    t, h, w = grid
    v = shapes.vision
    frames = t * (h * w) ** 2
    if not v.window_size:
        return frames, frames
    side = v.window_size // v.patch_size // v.merge_size * v.merge_size
    squares = [sum(min(side, size - start) ** 2 for start in range(0, size, side)) for size in (h, w)]
    return frames, t * squares[0] * squares[1]


def vision_flops(shapes: ModelShapes, grid: Grid) -> float:
    """Of one picture's blocks in true head sizes, for dealing pictures to ranks."""
    v = shapes.vision
    whole, windows = vision_pairs(shapes, grid)
    pairs = v.num_full_blocks * whole + (v.depth - v.num_full_blocks) * windows
    ups = 2 if shapes.family == "qwen2_5_vl" else 1
    linears = v.hidden_size * (4 * v.hidden_size + (1 + ups) * v.intermediate_size)
    return 2.0 * grid[0] * grid[1] * grid[2] * linears * v.depth + 4.0 * v.hidden_size * pairs


def _tokens(shapes: ModelShapes, grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2] // shapes.vision.merge_size**2


def _vision_pass(recipe: Recipe, shapes: ModelShapes, grids: Sequence[Grid], types: TypeOf) -> StepCost:
    v, size, degree = shapes.vision, FLOAT_BYTES[recipe.model.dtype], sizes.vision_degree(recipe)
    patches, tokens = sum(t * h * w for t, h, w in grids), sum(_tokens(shapes, grid) for grid in grids)
    head_dim = sizes.vision_head_dim(recipe, shapes)
    linears, width = sizes.vision_products(recipe, shapes, types, head_dim), v.num_heads // degree * head_dim
    whole, windows = (sum(pairs) for pairs in zip(*(vision_pairs(shapes, grid) for grid in grids), strict=True))
    pairs = v.num_full_blocks * whole + (v.depth - v.num_full_blocks) * windows
    is_qwen3 = shapes.family != "qwen2_5_vl"
    # A block: two norms (2 n each), the sums behind them (3 n each), rotation, and the MLP's activation.
    activated = (2 if is_qwen3 else 3) * v.intermediate_size / degree
    moved = v.depth * patches * (10.0 * v.hidden_size + 4.0 * width + activated)
    positions = patches * v.hidden_size * 4.0 if v.num_positions else 0.0
    parts = {
        f"vision_{name}": sum(
            (each.cost(tokens if name == "merger" else patches) * each.count for each in group), Work()
        )
        for name, group in linears.items()
    }
    parts["vision_attention_pairs"] = Work(4.0 * width * pairs, 0, 0, 0, v.depth * 4.0 * patches * width * size)
    norms = sizes.vision_norm_parameters(shapes) - v.num_positions * v.hidden_size
    parts["vision_elementwise"] = Work(
        weight_bytes=(norms + positions) * size, activation_bytes=(moved + positions) * size
    )
    told = summed(patches * v.hidden_size * size, degree) * (2 * v.depth)
    told += summed(tokens * v.out_size * size, degree) * (1 + v.num_taps)
    return told.cost(parts, vision_kernels(recipe, shapes))
