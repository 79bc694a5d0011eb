"""How much memory one rank needs, by arithmetic alone, before anything is loaded: weights + KV cache + peak of a step.

The estimate decides how many KV blocks there are on a CPU, and refuses what cannot fit. A device that can measure
its peak after loading corrects it. Knows sizes and degrees, no tensor.
"""

from dataclasses import dataclass

from executor.errors import UserError
from executor.quant.sizes import FLOAT_BYTES, weight_bytes
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, and the KV blocks they buy."""

    weights_bytes: int
    kv_bytes: int
    peak_bytes: int  # activations of the larger of a full vision batch and a full prefill step, encoder cache, logits
    budget_bytes: int  # memory_fraction of what is free
    num_blocks: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.peak_bytes

    def __str__(self) -> str:
        def gib(count: float) -> str:
            return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"

        return (
            f"memory per rank, estimated: weights {gib(self.weights_bytes)} + KV cache {gib(self.kv_bytes)} "
            f"({self.num_blocks} blocks) + peak of a step {gib(self.peak_bytes)} = {gib(self.total_bytes)} "
            f"of {gib(self.budget_bytes)} allowed"
        )


def weights_bytes(recipe: Recipe, shapes: ModelShapes) -> int:
    """Weights of one rank in the recipe's dtype (resolved, not auto) and degrees."""
    size = FLOAT_BYTES[recipe.model.dtype]
    linear_size = weight_bytes(recipe.model.quantization, recipe.model.dtype)
    tp, kv_tp = recipe.attn_tp_size, min(recipe.attn_tp_size, shapes.num_kv_heads)
    whole = shapes.replicated_attention_parameters
    attention = (shapes.attention_parameters - shapes.kv_parameters - whole) / tp + shapes.kv_parameters / kv_tp + whole
    linears = shapes.num_layers * attention + shapes.mlp_parameters / tp
    linears += shapes.expert_parameters / recipe.parallel.world_size
    vision = shapes.vision_parameters
    if recipe.parallel.vision_parallel == "tp":
        whole = shapes.replicated_vision_parameters
        vision = whole + (vision - whole) / tp
    plain = shapes.vocabulary_parameters / tp + shapes.router_parameters + shapes.norm_parameters + vision
    return round(linears * linear_size + plain * size)


def kv_block_bytes(recipe: Recipe, shapes: ModelShapes, compute_bytes: int | None = None) -> int:
    """Keys and values of one block on one rank, all layers. `compute_bytes`: see estimate."""
    heads = max(1, shapes.num_kv_heads // recipe.attn_tp_size)
    per_token = 2 * shapes.num_layers * heads * shapes.head_dim * (compute_bytes or FLOAT_BYTES[recipe.model.dtype])
    return recipe.scheduler.block_size * per_token


def peak_bytes(recipe: Recipe, shapes: ModelShapes, compute_bytes: int | None = None) -> int:
    """Activations of one rank at the worst step: a full vision batch, or a full prefill; and what stays beside it."""
    size, v, tp = compute_bytes or FLOAT_BYTES[recipe.model.dtype], shapes.vision, recipe.attn_tp_size
    vision_tp = tp if recipe.parallel.vision_parallel == "tp" else 1
    tokens = min(recipe.scheduler.encoder_cache_tokens, recipe.scheduler.max_model_len)
    patches = tokens * v.merge_size**2
    pixels = 3 * v.temporal_patch_size * v.patch_size**2
    # residual, normed input, q/k/v and output, or gate and up, alive at the same time in a block
    block = 2 * v.hidden_size + max(4 * v.hidden_size, 2 * v.intermediate_size) / vision_tp
    vision = patches * (pixels + block) * size
    width = max(4 * shapes.num_heads * shapes.head_dim, 2 * shapes.intermediate_size) / tp
    if shapes.num_experts:
        # Every replica's tokens, and for each of a token's experts its input, the gated product and its output.
        replicas = recipe.parallel.world_size // tp
        inner = shapes.expert_intermediate_size * recipe.parallel.moe_ep_size / recipe.parallel.world_size
        routed = shapes.experts_per_token * (2 * shapes.hidden_size + inner)
        width = max(width, replicas * (shapes.hidden_size + routed))
    prefill = recipe.scheduler.max_num_batched_tokens * (3 * shapes.hidden_size + width) * size
    cache = recipe.scheduler.encoder_cache_tokens * shapes.hidden_size * (1 + v.num_taps) * size
    logits = 3 * recipe.scheduler.max_num_seqs * shapes.vocab_size * 4  # float32, with a sorted copy and its order
    return round(max(vision, prefill) + cache + logits)


def estimate(recipe: Recipe, shapes: ModelShapes, free_bytes: int, compute_bytes: int | None = None) -> MemoryEstimate:
    """The memory of one rank that may take `memory_fraction` of `free_bytes`. `recipe` is resolved: no auto, no null.

    compute_bytes: of a number of activations and KV cache where the device computes in another type than that of the
    weights.
    KV blocks: what the recipe names, else what max_num_seqs requests of max_model_len use, as far as the memory goes.
    Raises UserError when weights, peak and one request of full length do not fit.
    """
    scheduler = recipe.scheduler
    budget = int(free_bytes * scheduler.memory_fraction)
    weights, peak = weights_bytes(recipe, shapes), peak_bytes(recipe, shapes, compute_bytes)
    block = kv_block_bytes(recipe, shapes, compute_bytes)
    blocks_of_one = -(-scheduler.max_model_len // scheduler.block_size)
    affordable = (budget - weights - peak) // block
    num_blocks = scheduler.num_blocks or min(scheduler.max_num_seqs * blocks_of_one, max(affordable, blocks_of_one))
    result = MemoryEstimate(weights, num_blocks * block, peak, budget, num_blocks, block)
    if result.total_bytes > budget:
        raise UserError(f"{shapes.name} does not fit: {result}. {_advice(recipe, weights > budget)}")
    return result


def _advice(recipe: Recipe, weights_alone: bool) -> str:
    if weights_alone:
        narrower = "model_config.dtype: bfloat16, " if recipe.model.dtype == "float32" else ""
        return f"The weights alone are too many: use {narrower}a smaller model, a quantized checkpoint or more ranks."
    knobs = "scheduler_config.max_model_len, encoder_cache_tokens, max_num_batched_tokens or max_num_seqs"
    if recipe.scheduler.num_blocks:
        knobs = f"scheduler_config.num_blocks ({recipe.scheduler.num_blocks}), or {knobs}"
    return f"Lower {knobs}, or free memory."
