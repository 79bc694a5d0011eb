"""The matrix products of a model on one rank: their sizes, their weights' bytes, what they cost for so many rows.

Sizes follow the layers (executor/layers, models/FAMILY) and degrees of a recipe; how weights are kept follows the type
of each linear. Bytes equal those of the checkpoint's tensors, operations those that a counter sees: tests hold both.
Legend: n hidden size, D head dim, H and K query and key heads of this rank, I intermediate size of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

from executor.capacity.work import Work
from executor.checkpoint.description import FLOAT_TYPE
from executor.quant.assumed import assumed_type
from executor.quant.sizes import FLOAT_BYTES, MADE_AT_LOAD
from executor.quant.w8a8sc import index_bytes
from executor.recipe.device import takes_int8_head
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

TypeOf = Callable[[str], str]
"""From the canonical name of a linear or of experts, without `.weight`, to a description's word (W8A8, FLOAT, ...)."""

WINT8 = "WINT8"
INT8_PRODUCTS = ("W8A8", "W8A8S", "W8A8SC", "W8A8_DYNAMIC", "W8A8_MIX", "W4A8_DYNAMIC")
"""Types whose activations are integers as well; others (W8A16, WINT8) are multiplied as floats."""
_VALUE_BYTES = {"W4A8_DYNAMIC": 0.5}  # others: 1
# Bytes beside the values: by output (scales, offsets, int32 biases), and by fused part (an input's scale and offset).
_ROW_BYTES = {
    "W8A8": 8, "W8A8S": 8, "W8A8SC": 8, "W8A8_DYNAMIC": 8, "W8A8_MIX": 16, "W8A16": 8, "W4A8_DYNAMIC": 8, WINT8: 4,
}  # fmt: skip
_PART_BYTES = {"W8A8": 8, "W8A8S": 8, "W8A8SC": 8, "W8A8_MIX": 8}
_HOLDS_BIAS = ("W8A8", "W8A8S", "W8A8SC")  # the bias is among the bytes by output
_INFO_BYTES = 5 * 8  # of a compressed part
_TEXT, _VISION = "model.language_model.layers.0", "model.visual"
_NPU_HEADS = (64, 128)


@dataclass(frozen=True)
class Product:
    """A linear of one rank, `count` times in the model. `parts`: outputs of the linears that are fused in it."""

    name: str
    kind: str
    num_in: int
    parts: tuple[int, ...]
    count: int = 1
    has_bias: bool = False
    float_bytes: int = 2

    @property
    def num_out(self) -> int:
        return sum(self.parts)

    @property
    def weight_bytes(self) -> float:
        """Of one of them, as it lies in memory."""
        bias = self.num_out * self.float_bytes if self.has_bias else 0
        if self.kind == FLOAT_TYPE:
            return self.num_in * self.num_out * self.float_bytes + bias
        values = self.num_in * self.num_out * _VALUE_BYTES.get(self.kind, 1)
        if self.kind == "W8A8SC":
            values += sum(index_bytes(self.num_in, part) + _INFO_BYTES for part in self.parts)
        rows = self.num_out * _ROW_BYTES[self.kind] + len(self.parts) * _PART_BYTES.get(self.kind, 0)
        return values + rows + (0 if self.kind in _HOLDS_BIAS else bias)

    def cost(self, rows: float) -> Work:
        """Of one of them, for so many rows; nothing is read for none."""
        if not rows:
            return Work()
        flops, is_int8 = 2.0 * rows * self.num_in * self.num_out, self.kind in INT8_PRODUCTS
        moved = rows * (self.num_in * (1 if is_int8 else self.float_bytes) + self.num_out * self.float_bytes)
        return Work(0.0 if is_int8 else flops, flops if is_int8 else 0.0, self.weight_bytes, 0.0, moved)


@dataclass(frozen=True)
class Experts:
    """The experts of one layer on one rank, `count` layers: `num_local` of `num_experts`, each `inner` wide here."""

    kind: str
    hidden_size: int
    inner: int
    num_local: int
    num_experts: int
    per_token: int
    count: int
    float_bytes: int

    @property
    def one(self) -> tuple[Product, Product]:
        """The two products of one expert."""
        up = Product("gate_up", self.kind, self.hidden_size, (self.inner, self.inner), float_bytes=self.float_bytes)
        return up, Product("down", self.kind, self.inner, (self.hidden_size,), float_bytes=self.float_bytes)

    @property
    def weight_bytes(self) -> float:
        """Of one layer's experts on this rank."""
        return self.num_local * sum(product.weight_bytes for product in self.one)

    def touched(self, tokens: float) -> float:
        """How many of the experts here so many tokens need, on average, where any expert is as likely as another."""
        return self.num_local * (1.0 - (1.0 - self.per_token / self.num_experts) ** tokens)

    def cost(self, tokens: float) -> Work:
        """Of one layer: each token goes through `per_token` experts, of which a share is here."""
        if not tokens:
            return Work()
        rows = tokens * self.per_token * self.num_local / self.num_experts
        work = sum((product.cost(rows) for product in self.one), Work())
        read = self.touched(tokens) * sum(product.weight_bytes for product in self.one)
        return Work(work.flops, work.int8_flops, read, 0.0, work.activation_bytes)


def type_of(recipe: Recipe) -> TypeOf:
    """The vendor's choice of types under the recipe's settled quantization, for a folder that is not here."""
    quantization = recipe.model.quantization
    if quantization in MADE_AT_LOAD:
        return lambda name: WINT8 if name.startswith(_TEXT) and not name.endswith(".mlp.gate") else FLOAT_TYPE
    return lambda name: assumed_type(name, quantization)


def num_kv_heads(recipe: Recipe, shapes: ModelShapes) -> int:
    """Key heads of one rank; neighbours hold the same one where there are fewer than ranks."""
    return max(1, shapes.num_kv_heads // recipe.attn_tp_size)


def vision_degree(recipe: Recipe) -> int:
    """Ranks that split a picture's encoder."""
    return recipe.attn_tp_size if recipe.parallel.vision_parallel == "tp" else 1


def vision_head_dim(recipe: Recipe, shapes: ModelShapes) -> int:
    """What vision heads are computed in: an NPU has kernels for 64 and 128, and weights are widened for them."""
    dim = shapes.vision.hidden_size // shapes.vision.num_heads
    if recipe.model.device not in ("npu", "npu_emulated"):
        return dim
    return next(wide for wide in _NPU_HEADS if wide >= dim)


def attention_products(recipe: Recipe, shapes: ModelShapes, types: TypeOf) -> tuple[Product, Product]:
    """The two linears of a text layer's attention: q, k and v together, and o."""
    heads, kv, dim = shapes.num_heads // recipe.attn_tp_size, num_kv_heads(recipe, shapes), shapes.head_dim
    layers, size, bias = shapes.num_layers, FLOAT_BYTES[recipe.model.dtype], shapes.family == "qwen2_5_vl"
    q, o = (types(f"{_TEXT}.self_attn.{name}_proj") for name in "qo")
    qkv = Product("qkv_proj", q, shapes.hidden_size, (heads * dim, kv * dim, kv * dim), layers, bias, size)
    return qkv, Product("o_proj", o, heads * dim, (shapes.hidden_size,), layers, False, size)


def mlp_products(recipe: Recipe, shapes: ModelShapes, types: TypeOf) -> tuple[Product, ...]:
    """The two linears of a dense MLP; none where every layer is a mixture of experts."""
    layers = shapes.num_dense_layers if shapes.num_experts else shapes.num_layers
    if not layers:
        return ()
    inner, size = shapes.intermediate_size // recipe.attn_tp_size, FLOAT_BYTES[recipe.model.dtype]
    up, down = (types(f"{_TEXT}.mlp.{name}_proj") for name in ("gate", "down"))
    gate_up = Product("gate_up_proj", up, shapes.hidden_size, (inner, inner), layers, False, size)
    return gate_up, Product("down_proj", down, inner, (shapes.hidden_size,), layers, False, size)


def router(recipe: Recipe, shapes: ModelShapes) -> Product:
    """The router of a mixture-of-experts layer; every rank has all of it."""
    layers, size = shapes.num_layers - shapes.num_dense_layers, FLOAT_BYTES[recipe.model.dtype]
    return Product("gate", FLOAT_TYPE, shapes.hidden_size, (shapes.num_experts,), layers, False, size)


def experts(recipe: Recipe, shapes: ModelShapes, types: TypeOf) -> Experts:
    """The experts of a mixture-of-experts layer on one rank."""
    world, groups = recipe.parallel.world_size, recipe.parallel.moe_ep_size
    return Experts(
        types(f"{_TEXT}.mlp.experts"),
        shapes.hidden_size,
        shapes.expert_intermediate_size // (world // groups),
        shapes.num_experts // groups,
        shapes.num_experts,
        shapes.experts_per_token,
        shapes.num_layers - shapes.num_dense_layers,
        FLOAT_BYTES[recipe.model.dtype],
    )


def head(recipe: Recipe, shapes: ModelShapes) -> Product:
    """The output head's part of the vocabulary, its own weight or the embedding's."""
    size, vocab = FLOAT_BYTES[recipe.model.dtype], shapes.vocab_size // recipe.attn_tp_size
    kind = WINT8 if takes_int8_head(recipe, shapes.vocab_size) else FLOAT_TYPE
    return Product("lm_head", kind, shapes.hidden_size, (vocab,), 1, False, size)


def vision_products(
    recipe: Recipe, shapes: ModelShapes, types: TypeOf, head_dim: int
) -> dict[str, tuple[Product, ...]]:
    """The linears of the encoder by part: patch embedding, blocks' attention and MLP, and mergers.

    Rows of "merger" are visual tokens, of the others patches. head_dim: see vision_head_dim.
    """
    v, degree, size = shapes.vision, vision_degree(recipe), FLOAT_BYTES[recipe.model.dtype]
    n, inner, is_qwen3 = v.hidden_size, v.intermediate_size // degree, shapes.family != "qwen2_5_vl"
    heads = v.num_heads // degree * head_dim
    block, merged = f"{_VISION}.blocks.0", n * v.merge_size**2
    pixels = 3 * v.temporal_patch_size * v.patch_size**2
    up, down = ("linear_fc1", "linear_fc2") if is_qwen3 else ("gate_proj", "down_proj")
    ups = (inner,) if is_qwen3 else (inner, inner)
    mergers = 1 + v.num_taps
    return {
        "patches": (Product("patch_embed", FLOAT_TYPE, pixels, (n,), 1, is_qwen3, size),),
        "attention": (
            Product("qkv", types(f"{block}.attn.qkv"), n, (heads, heads, heads), v.depth, True, size),
            Product("proj", types(f"{block}.attn.proj"), heads, (n,), v.depth, True, size),
        ),
        "mlp": (
            Product("up", types(f"{block}.mlp.{up}"), n, ups, v.depth, True, size),
            Product("down", types(f"{block}.mlp.{down}"), inner, (n,), v.depth, True, size),
        ),
        "merger": (
            Product("merger_up", FLOAT_TYPE, merged, (merged // degree,), mergers, True, size),
            Product("merger_down", FLOAT_TYPE, merged // degree, (v.out_size,), mergers, True, size),
        ),
    }


def held_bytes(recipe: Recipe, shapes: ModelShapes, types: TypeOf | None = None) -> dict[str, float]:
    """Bytes of the weights that one rank reads from the checkpoint, by part; the sum is what loading counts.

    Vision heads have their true size here: what a device widens them by comes on top.
    """
    types, v, size = types or type_of(recipe), shapes.vision, FLOAT_BYTES[recipe.model.dtype]
    linears = [*attention_products(recipe, shapes, types), *mlp_products(recipe, shapes, types)]
    out, embedding = head(recipe, shapes), shapes.vocab_size // recipe.attn_tp_size * shapes.hidden_size * size
    norms = shapes.norm_parameters + shapes.num_layers * shapes.replicated_attention_parameters
    vision = vision_products(recipe, shapes, types, v.hidden_size // v.num_heads)
    vision_bytes = sum(each.weight_bytes * each.count for group in vision.values() for each in group)
    parts = {
        "text": sum(each.weight_bytes * each.count for each in linears) + norms * size,
        "vocabulary": embedding + (0 if shapes.tied_embeddings and out.kind == FLOAT_TYPE else out.weight_bytes),
        "vision": vision_bytes + vision_norm_parameters(shapes) * size,
    }
    if shapes.num_experts:
        gate, held = router(recipe, shapes), experts(recipe, shapes, types)
        parts["experts"] = gate.weight_bytes * gate.count + held.weight_bytes * held.count
    return parts


def vision_norm_parameters(shapes: ModelShapes) -> int:
    """Of the encoder, what no product has: norms, and learned position embeddings."""
    v = shapes.vision
    kinds = 2 if shapes.family != "qwen2_5_vl" else 1  # LayerNorms have a bias, RMSNorms have none
    norms = kinds * v.hidden_size * (2 * v.depth + 1 + v.num_taps * v.merge_size**2)
    return norms + v.num_positions * v.hidden_size
