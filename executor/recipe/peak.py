"""The most that a step takes beside weights and KV cache, by what the layers and backends really allocate.

Phases follow each other: a pass of the encoder, the text model over a full step, logits and sampling. What stays
through all of them: the encoder cache, and on a CPU the pictures of the prompts.
Knows sizes and degrees, no tensor.
`size`: bytes of a number of the activations.
Legend, in elements per token or patch: n hidden size, H and K query and key heads, D head dim, I intermediate size.
"""

from dataclasses import dataclass, replace

from executor.device.table import BACKENDS, INT8_READ_TOKENS
from executor.quant.sizes import FLOAT_BYTES
from executor.recipe.device import takes_int8_head
from executor.recipe.graph_sizes import graph_shapes, most_inputs, spare_blocks
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

ENCODE_TOKENS = 4096
"""Visual tokens that the encoder takes at a time; a single frame of more is encoded alone. The runner holds to it."""
HEAD_ROWS = 64
"""Tokens at most whose digits an int8 output head multiplies at a time on a CPU (executor/device/cpu/int8.py)."""
SCORED_ROWS = 32
"""Tokens whose logits exist at a time where a prompt's logprobs are wanted. The runner holds to it."""
LOOK_AHEAD = 2  # prompts that are ready beyond those being answered
HEAP_BYTES = 32 << 20
"""glibc keeps freed blocks up to this size for itself: those of one phase then lie beside those of the next."""
_NPU_HEADS = (64, 128)  # what vision heads are widened to there
_OVERLAPPING = tuple(name for name, backend in BACKENDS.items() if backend.overlaps_steps)


@dataclass(frozen=True)
class Peak:
    """What a step takes, by what it is for. Phases follow each other, so that the widest of them counts."""

    vision_bytes: float  # a pass of the encoder
    text_bytes: float  # a full prefill step
    logits_bytes: float  # of all rows, and sampling
    unread_bytes: float  # of the step before, its logits until the host has read its tokens
    vision_heap_bytes: float  # of each phase, what the allocator keeps beside the other one's
    text_heap_bytes: float
    encoder_cache_bytes: float
    pixels_bytes: float  # pictures of prompts that wait

    @property
    def phase_bytes(self) -> float:
        """The widest phase, with what is left of the one before."""
        return max(
            self.vision_bytes + self.text_heap_bytes,
            self.text_bytes + self.vision_heap_bytes,
            self.logits_bytes + self.unread_bytes,
        )

    @property
    def total_bytes(self) -> int:
        return round(self.phase_bytes + self.encoder_cache_bytes + self.pixels_bytes)


def peak_of(
    recipe: Recipe, shapes: ModelShapes, picture_tokens: int | None = None, compute_bytes: int | None = None
) -> Peak:
    """Of one rank; `picture_tokens` of the largest picture or frame (None: as large as a prompt can be).

    `compute_bytes`: of a number of the activations; None: of the recipe's dtype.
    Pictures of prompts that wait are part of it, those of running requests are not: see `pixel_bytes`.
    """
    limits = recipe.scheduler
    size, on_host = compute_bytes or FLOAT_BYTES[recipe.model.dtype], recipe.model.device != "npu"
    most_tokens = limits.max_num_seqs * limits.max_model_len
    picture_tokens = min(picture_tokens or limits.max_model_len, limits.max_model_len)
    pass_tokens = min(max(ENCODE_TOKENS, picture_tokens), most_tokens)
    step_tokens = min(limits.max_num_batched_tokens, most_tokens)
    vision = pass_tokens * vision_token_bytes(recipe, shapes, size)
    text = step_tokens * text_token_bytes(recipe, shapes, size) + attention_scratch_bytes(recipe, shapes, size)
    # Logits of all rows and their drafts as the head gives them and as float32, and their logprobs; or, beside these
    # logits, those of scored prompt tokens, with their logprobs and what is counted for their ranks.
    rows = min(limits.max_num_seqs * most_inputs(recipe), step_tokens)
    logits = max(rows * (8 + size % 4), rows * 4 + SCORED_ROWS * (9 + size % 4)) * shapes.vocab_size
    if recipe.model.device == "cpu" and takes_int8_head(recipe, shapes.vocab_size):
        digits = 3 if size == FLOAT_BYTES["float32"] else 2  # each a float32 result, of which logits are added up
        logits += min(max(rows, SCORED_ROWS), HEAD_ROWS) * digits * FLOAT_BYTES["float32"] * shapes.vocab_size
    # A step that is queued behind another has one token of each request.
    overlaps = recipe.model.device in _OVERLAPPING and most_inputs(recipe) == 1
    unread = rows * (4 + size % 4) * shapes.vocab_size if overlaps else 0
    text_heap = vision_heap = 0.0
    if on_host:
        # What is freed in small blocks stays with the allocator, beside the other phase's.
        text_heap = step_tokens * text_token_bytes(recipe, shapes, size, step_tokens)
        vision_heap = pass_tokens * vision_token_bytes(recipe, shapes, size, pass_tokens)
    # One request alone may need more than the cache holds.
    cache_tokens = max(limits.encoder_cache_tokens, min(limits.max_model_len, picture_tokens))
    cache = cache_tokens * shapes.hidden_size * (1 + shapes.vision.num_taps) * size
    pixels = pixel_bytes(recipe, shapes, LOOK_AHEAD * limits.max_model_len)
    return Peak(vision, text, logits, unread, vision_heap, text_heap, cache, pixels)


def peak_bytes(
    recipe: Recipe, shapes: ModelShapes, picture_tokens: int | None = None, compute_bytes: int | None = None
) -> int:
    """The sum of `peak_of`."""
    return peak_of(recipe, shapes, picture_tokens, compute_bytes).total_bytes


def draft_step_bytes(
    recipe: Recipe,
    shapes: ModelShapes,
    step: Peak,
    picture_tokens: int | None = None,
    compute_bytes: int | None = None,
) -> int:
    """Of a draft model, what its steps take beyond a phase of the model's own, `step`: they are phases like others.

    `recipe`, `shapes`: the draft model's. Embeddings of its own encoder are there for a step's tokens, and for the
    picture that the step's last tokens are a part of.
    """
    limits, size = recipe.scheduler, compute_bytes or FLOAT_BYTES[recipe.model.dtype]
    own = replace(peak_of(recipe, shapes, picture_tokens, compute_bytes), unread_bytes=0.0)  # they are read at once
    item_tokens = min(picture_tokens or limits.max_model_len, limits.max_model_len)
    step_tokens = min(limits.max_num_batched_tokens, limits.max_num_seqs * limits.max_model_len)
    features = (step_tokens + item_tokens) * shapes.hidden_size * (1 + shapes.vision.num_taps) * size
    return round(max(0.0, own.phase_bytes - step.phase_bytes) + features)


def graph_bytes(recipe: Recipe, shapes: ModelShapes, compute_bytes: int | None = None) -> int:
    """Of the decode graphs, each with memory of its own for one layer's values and its logits, the attention's outputs
    that all of them share."""
    size, tokens = compute_bytes or FLOAT_BYTES[recipe.model.dtype], [each.num_tokens for each in graph_shapes(recipe)]
    if not tokens:
        return 0
    queries = shapes.num_heads * shapes.head_dim / recipe.attn_tp_size
    row = text_token_bytes(recipe, shapes, size) + shapes.vocab_size * (4 + size)
    return round(sum(tokens) * row + shapes.num_layers * max(tokens) * queries * size)


def padding_blocks(recipe: Recipe) -> int:
    """KV blocks that padding of decode graphs is written to, beside the scheduler's."""
    return spare_blocks(graph_shapes(recipe), recipe.scheduler.block_size)


def pixel_bytes(recipe: Recipe, shapes: ModelShapes, num_tokens: int) -> int:
    """RGB bytes of pictures of `num_tokens` visual tokens, on the host until their request has ended."""
    v = shapes.vision
    return num_tokens * 3 * (v.patch_size * v.merge_size) ** 2 if recipe.model.device != "npu" else 0


def vision_token_bytes(recipe: Recipe, shapes: ModelShapes, size: int, heap_tokens: int | None = None) -> float:
    """Of a pass of the encoder, for each visual token: its patches, the widest moment of a block, and what comes out.

    A block of a CPU: x and its norm (2 n), q, k and v (3), rotated queries (1), and for rotated keys halves swapped,
    two products and their sum (4); attention in two bytes repacks keys and values instead; or the MLP's 2 I or 3 I.
    An NPU rotates in one kernel. `heap_tokens`: only tensors that are small in a pass of so many.
    """
    v = shapes.vision
    tp = recipe.attn_tp_size if recipe.parallel.vision_parallel == "tp" else 1
    pixels = 3 * v.temporal_patch_size * v.patch_size**2
    heads = v.hidden_size
    rotation = 5 if size == 4 else 6
    if recipe.model.device in ("npu", "npu_emulated"):
        dim = v.hidden_size // v.num_heads
        heads = v.num_heads * min((wide for wide in _NPU_HEADS if wide >= dim), default=dim)
        rotation = 3
    inner = (3 if shapes.family == "qwen2_5_vl" else 2) * v.intermediate_size
    attention = (2 * v.hidden_size + (3 + rotation) * heads / tp) * size
    block = max(attention, (2 * v.hidden_size + inner / tp) * size)
    if v.num_positions:
        # Position embeddings of four neighbours, and the same weighted in float32.
        block = max(block, 2 * v.hidden_size * size + 4 * v.hidden_size * (size + 4))
    features = 2 * shapes.hidden_size * (1 + v.num_taps) * size
    if heap_tokens is not None:
        is_small = heap_tokens * v.merge_size**2 * v.hidden_size * size < HEAP_BYTES
        return v.merge_size**2 * attention if is_small else 0
    return v.merge_size**2 * (pixels * size + block) + features


def text_token_bytes(recipe: Recipe, shapes: ModelShapes, size: int, heap_tokens: int | None = None) -> float:
    """Of a prefill step, for each token: embedding, features, residual, x and its norm, and the widest moment of a
    layer: q, k and v and their rotation, gate and up and their product, or the experts of all replicas' tokens.

    `heap_tokens`: only tensors that are small in a step of so many.
    """
    tp = recipe.attn_tp_size
    queries = shapes.num_heads * shapes.head_dim / tp
    keys = max(1, shapes.num_kv_heads / tp) * shapes.head_dim
    rotation = 2 if recipe.model.device == "npu" else 5
    common = shapes.hidden_size * (5 + shapes.vision.num_taps)
    attention = (1 + rotation) * queries + 3 * keys
    if heap_tokens is not None:
        is_small = heap_tokens * max(shapes.hidden_size, queries) * size < HEAP_BYTES
        return (common + attention) * size if is_small else 0
    width = max(attention, 3 * shapes.intermediate_size / tp)
    if shapes.num_experts:
        # For each of a token's experts its input, the gated product and its output.
        replicas = recipe.parallel.world_size // tp
        inner = shapes.expert_intermediate_size * recipe.parallel.moe_ep_size / recipe.parallel.world_size
        routed = shapes.experts_per_token * (2 * shapes.hidden_size + inner)
        width = max(width, replicas * (shapes.hidden_size + routed))
    return (common + width) * size


def attention_scratch_bytes(recipe: Recipe, shapes: ModelShapes, size: int) -> float:
    """Of the CPU's attention over one row: keys and values repeated for every query head, and the mask of a chunk
    behind cached tokens, as booleans and as numbers. NPU kernels mask by themselves.

    Of an int8 cache besides, on a CPU a row's keys and values as floats, on an NPU those of the prompts whose keys are
    read together."""
    limits = recipe.scheduler
    is_int8 = recipe.model.kv_cache_dtype == "int8"
    row = 2 * max(1, shapes.num_kv_heads // recipe.attn_tp_size) * shapes.head_dim * size if is_int8 else 0
    if recipe.model.device != "cpu":
        return max(limits.max_model_len, INT8_READ_TOKENS) * row * 1.5  # gathered as int8, and as floats
    repeated = 2 * limits.max_model_len * shapes.num_heads * shapes.head_dim / recipe.attn_tp_size * size
    chunk = min(limits.max_num_batched_tokens, limits.max_model_len)
    masked = limits.enable_prefix_caching or chunk < limits.max_model_len
    return repeated + row * limits.max_model_len + (chunk * limits.max_model_len * (1 + size) if masked else 0)
