"""How much memory one rank needs, by arithmetic alone, before anything is loaded.

Process + weights + KV cache + peak of a step, the worst that the recipe allows: every request full of pictures, the
encoder cache full, a full pass of the encoder and a full prefill step. The peak stands in executor/recipe/peak.py.
On an NPU the decode graphs and the buffers of communicators besides. A draft model counts on every rank, and the
replica's leader alone has it: the other ranks keep in step with its KV cache.
The estimate decides how many KV blocks there are on a CPU, and refuses what cannot fit. A device that can measure
its peak after loading corrects it. Knows sizes and degrees, no tensor. A test holds it against a measured peak.
"""

from dataclasses import dataclass

from executor.checkpoint.stored import ATTENTION, EXPERTS, KV, MLP, VISION, VOCABULARY, WHOLE, StoredSizes
from executor.errors import UserError
from executor.host.env import environment
from executor.quant.sizes import FLOAT_BYTES, weight_bytes
from executor.recipe.communicators import buffer_bytes
from executor.recipe.device import takes_int8_head
from executor.recipe.draft import Draft
from executor.recipe.peak import Peak, draft_step_bytes, graph_bytes, padding_blocks, peak_of, pixel_bytes
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes

GIB = 2**30
TORCH_BYTES = 240 << 20
LIBRARY_BYTES = 40 << 20
"""What a process has once it has imported torch and the engine, and what it takes after that for the tokenizer, threads
and code that runs the first time: measured with torch 2.13 for CPUs."""


SCALE_BYTES = 4  # of a row of int8 weights
STAGED_BYTES = 512 << 20
QUEUED_BYTES = 256 << 20
"""Of a prefix cache on disk at most: what is read ahead of requests, in host memory, and what waits to be written, in
the device's; each no more than the KV cache."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, and the KV blocks they buy."""

    weights_bytes: int
    kv_bytes: int
    peak_bytes: int  # of a step: activations, encoder cache, pictures in waiting, logits
    budget_bytes: int  # memory_fraction of what the process may have in all
    num_blocks: int
    block_bytes: int  # with the draft model's
    process_bytes: int = 0  # Python, torch and libraries, where they lie in the same memory
    loading_bytes: int = 0  # beside the weights while the last of them take the device's layout
    graph_bytes: int = 0  # decode graphs of an NPU, with the block that their padding rows write to
    communication_bytes: int = 0  # buffers of an NPU's communicators
    step: Peak | None = None  # what peak_bytes is made of, the pictures of running requests left out
    draft_weights_bytes: int = 0
    draft_kv_bytes: int = 0
    draft_step_bytes: int = 0  # of the draft model's steps, beyond what the model's own take
    disk_cache_bytes: int = 0  # on its way from and to a prefix cache on disk

    @property
    def all_weights_bytes(self) -> int:
        """With the draft model's."""
        return self.weights_bytes + self.draft_weights_bytes

    @property
    def _working_bytes(self) -> int:
        """What is taken once all weights are loaded."""
        return self.kv_bytes + self.peak_bytes + self.draft_kv_bytes + self.draft_step_bytes

    @property
    def total_bytes(self) -> int:
        beside = self.process_bytes + self.graph_bytes + self.communication_bytes + self.disk_cache_bytes
        return beside + self.all_weights_bytes + max(self._working_bytes, self.loading_bytes)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget_bytes

    def by_part(self) -> dict[str, int]:
        """Bytes of each part; their sum is total_bytes."""
        assert self.step is not None, "an estimate knows what its peak is made of"
        phase, cache = round(self.step.phase_bytes), round(self.step.encoder_cache_bytes)
        return {
            "process": self.process_bytes,
            "weights": self.weights_bytes,
            "kv_cache": self.kv_bytes,
            "draft_weights": self.draft_weights_bytes,
            "draft_kv_cache": self.draft_kv_bytes,
            "draft_step": self.draft_step_bytes,
            "step": phase,
            "encoder_cache": cache,
            "pictures": self.peak_bytes - phase - cache,
            "graphs": self.graph_bytes,
            "communication": self.communication_bytes,
            "disk_cache": self.disk_cache_bytes,
            "loading": max(0, self.loading_bytes - self._working_bytes),
        }

    def __str__(self) -> str:
        def gib(count: float) -> str:
            return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"

        process = f"process {gib(self.process_bytes)} + " if self.process_bytes else ""
        graphs = f" + decode graphs {gib(self.graph_bytes)}" if self.graph_bytes else ""
        buffers = f" + communication {gib(self.communication_bytes)}" if self.communication_bytes else ""
        buffers += f" + cache on disk {gib(self.disk_cache_bytes)}" if self.disk_cache_bytes else ""
        draft = ""
        if self.draft_weights_bytes:
            draft = (
                f" + draft model {gib(self.draft_weights_bytes)}, its KV cache {gib(self.draft_kv_bytes)}, its steps "
                f"{gib(self.draft_step_bytes)}"
            )
        return (
            f"memory per rank, estimated: {process}weights {gib(self.weights_bytes)} + KV cache {gib(self.kv_bytes)} "
            f"({self.num_blocks} blocks) + peak of a step {gib(self.peak_bytes)}{draft}{graphs}{buffers} "
            f"= {gib(self.total_bytes)} of {gib(self.budget_bytes)} allowed"
        )


def weights_bytes(recipe: Recipe, shapes: ModelShapes, stored: StoredSizes | None = None) -> int:
    """Weights of one rank in the recipe's dtype (resolved, not auto) and degrees.

    `stored`: of the quantized folder, whose linears have each a type of its own; None: all of the recipe's.
    """
    size = FLOAT_BYTES[recipe.model.dtype]
    tp, kv_tp = recipe.attn_tp_size, min(recipe.attn_tp_size, shapes.num_kv_heads)
    vision_tp = tp if recipe.parallel.vision_parallel == "tp" else 1
    replicated = shapes.replicated_vision_parameters * size  # float everywhere

    def vision_bytes(whole: float) -> float:
        return replicated + (whole - replicated) / vision_tp

    if stored is not None:
        ranks = {KV: kv_tp, ATTENTION: tp, MLP: tp, EXPERTS: recipe.parallel.world_size, VOCABULARY: tp, WHOLE: 1}
        ranks = dict.fromkeys(ranks, 1) if stored.is_part else ranks
        held = sum(stored.bytes(place, size) / degree for place, degree in ranks.items())
        return round(held + vision_bytes(stored.bytes(VISION, size)))
    linear_size = weight_bytes(recipe.model.quantization, recipe.model.dtype)
    whole = shapes.replicated_attention_parameters
    attention = (shapes.attention_parameters - shapes.kv_parameters - whole) / tp + shapes.kv_parameters / kv_tp + whole
    linears = shapes.num_layers * attention + shapes.mlp_parameters / tp
    linears += shapes.expert_parameters / recipe.parallel.world_size
    table = shapes.vocab_size * shapes.hidden_size
    vocabulary = shapes.vocabulary_parameters * size
    if takes_int8_head(recipe, shapes.vocab_size):  # a tied one's table counts as well: it goes when all is loaded
        vocabulary = table * size + table * linear_size + shapes.vocab_size * SCALE_BYTES
    plain = shapes.router_parameters + shapes.norm_parameters
    return round(linears * linear_size + plain * size + vocabulary / tp + vision_bytes(shapes.vision_parameters * size))


def kv_block_bytes(recipe: Recipe, shapes: ModelShapes, compute_bytes: int | None = None) -> int:
    """Keys and values of one block on one rank, all layers. `compute_bytes`: see estimate."""
    heads = max(1, shapes.num_kv_heads // recipe.attn_tp_size)
    size = 1 if recipe.model.kv_cache_dtype == "int8" else compute_bytes or FLOAT_BYTES[recipe.model.dtype]
    return recipe.scheduler.block_size * 2 * shapes.num_layers * heads * shapes.head_dim * size


def loading_bytes(recipe: Recipe, shapes: ModelShapes, copies_head: bool = True) -> int:
    """The largest weight once more: it stands in both layouts for a moment, all experts of a layer together.

    `copies_head`: see estimate.
    """
    tp = recipe.attn_tp_size
    mlp = 2 * shapes.hidden_size * shapes.intermediate_size
    experts = shapes.expert_parameters / shapes.num_layers / recipe.parallel.world_size
    size, head_size, head = FLOAT_BYTES[recipe.model.dtype], 0.0, shapes.vocab_size * shapes.hidden_size
    if takes_int8_head(recipe, shapes.vocab_size):
        head_size = weight_bytes(recipe.model.quantization, recipe.model.dtype)
    elif copies_head or not shapes.tied_embeddings:
        head_size = size
    return round(max(head * head_size / tp, mlp * size / tp, experts * size))


def estimate(
    recipe: Recipe,
    shapes: ModelShapes,
    free_bytes: int,
    compute_bytes: int | None = None,
    *,
    picture_tokens: int | None = None,
    process_bytes: int = 0,
    copies_head: bool = True,
    stored: StoredSizes | None = None,
    draft: Draft | None = None,
) -> MemoryEstimate:
    """The memory of one rank that may take `memory_fraction` of `free_bytes`. `recipe` is resolved: no auto, no null.

    `compute_bytes`: of a number of the activations and of the KV cache, where the device computes in another type than
    that of the weights. `picture_tokens`: of the largest picture; None: as large as a prompt can be.
    `process_bytes`: what the process has of this memory now, not part of `free_bytes`; 0 where its own memory is
    another than the device's. `copies_head`: whether a tied output head is made a copy of the embedding.
    `stored`: see weights_bytes. `draft`: the recipe's draft model.
    KV blocks: what the recipe names, else what max_num_seqs requests of max_model_len use, as far as the memory goes.
    Raises UserError when weights, peak and one request of full length do not fit.
    """
    found = account(
        recipe,
        shapes,
        free_bytes,
        compute_bytes,
        picture_tokens=picture_tokens,
        process_bytes=process_bytes,
        copies_head=copies_head,
        stored=stored,
        draft=draft,
    )
    if not found.fits:
        weights_alone = found.process_bytes + found.all_weights_bytes > found.budget_bytes
        raise UserError(f"{shapes.name} does not fit: {found}. {advice(recipe, weights_alone)}")
    return found


def account(
    recipe: Recipe,
    shapes: ModelShapes,
    free_bytes: int,
    compute_bytes: int | None = None,
    *,
    picture_tokens: int | None = None,
    process_bytes: int = 0,
    copies_head: bool = True,
    stored: StoredSizes | None = None,
    draft: Draft | None = None,
    num_blocks: int | None = None,
    held_bytes: int | None = None,
) -> MemoryEstimate:
    """What `estimate` counts, whether it fits or not. `num_blocks`: of a cache that is asked about; None: its own.

    `held_bytes`: of a rank's weights where these are known better than by the recipe's word; None: weights_bytes.
    """
    scheduler = recipe.scheduler
    budget = int(free_bytes * scheduler.memory_fraction) + process_bytes
    weights = weights_bytes(recipe, shapes, stored) if held_bytes is None else held_bytes
    block = kv_block_bytes(recipe, shapes, compute_bytes)
    step = peak_of(recipe, shapes, picture_tokens, compute_bytes)
    peak = step.total_bytes
    process = max(process_bytes, TORCH_BYTES) + LIBRARY_BYTES if process_bytes else 0
    blocks_of_one = -(-scheduler.max_model_len // scheduler.block_size)
    pixels = pixel_bytes(recipe, shapes, scheduler.block_size)  # of the pictures whose tokens a block holds
    graphs, buffers = _graph_and_buffer_bytes(recipe, shapes, block, compute_bytes)
    loading = loading_bytes(recipe, shapes, copies_head)
    draft_weights = draft_block = draft_step = 0
    if draft is not None:
        alone = draft.recipe.model_copy(update={"scheduler": scheduler})
        draft_weights = weights_bytes(alone, draft.shapes, draft.stored)
        draft_block = kv_block_bytes(alone, draft.shapes, compute_bytes)
        draft_step = draft_step_bytes(alone, draft.shapes, step, picture_tokens, compute_bytes)
        graphs += _graph_and_buffer_bytes(alone, draft.shapes, draft_block, compute_bytes)[0]
        loading = max(loading, loading_bytes(alone, draft.shapes, copies_head))
    block_bytes = block + draft_block
    named = num_blocks or named_blocks(recipe, block_bytes, blocks_of_one)
    disk_cache = disk_cache_bytes(recipe, (named or scheduler.max_num_seqs * blocks_of_one) * block)
    taken = process + weights + draft_weights + peak + draft_step + graphs + buffers + disk_cache
    affordable = (budget - taken) // (block_bytes + pixels)
    num_blocks = named or min(scheduler.max_num_seqs * blocks_of_one, max(affordable, blocks_of_one))
    peak += min(num_blocks, scheduler.max_num_seqs * blocks_of_one) * pixels
    return MemoryEstimate(
        weights, num_blocks * block, peak, budget, num_blocks, block_bytes, process, loading, graphs, buffers, step,
        draft_weights, num_blocks * draft_block, draft_step, disk_cache,
    )  # fmt: skip


def _graph_and_buffer_bytes(
    recipe: Recipe, shapes: ModelShapes, block_bytes: int, compute_bytes: int | None
) -> tuple[int, int]:
    """What an NPU's decode graphs and communicators take; elsewhere neither has memory of its own."""
    if recipe.model.device != "npu":
        return 0, 0
    own_mb = environment().get("HCCL_BUFFSIZE", "")
    buffers = buffer_bytes(recipe.parallel.world_size, recipe.attn_tp_size, int(own_mb) if own_mb.isdigit() else None)
    return graph_bytes(recipe, shapes, compute_bytes) + padding_blocks(recipe) * block_bytes, buffers


def disk_cache_bytes(recipe: Recipe, kv_bytes: int) -> int:
    """Of the device's memory what a prefix cache on disk takes for entries on their way, beside so large a KV cache."""
    if recipe.scheduler.prefix_cache_path is None:
        return 0
    queued, staged = min(QUEUED_BYTES, kv_bytes), min(STAGED_BYTES, kv_bytes)
    return queued if recipe.model.device == "npu" else queued + staged


def named_blocks(recipe: Recipe, block_bytes: int, blocks_of_one: int) -> int | None:
    """What the recipe names, in blocks or in GB; None where it leaves it open.

    UserError for a size in GB that holds no request of max_model_len.
    """
    scheduler = recipe.scheduler
    if scheduler.kv_cache_gb is None:
        return scheduler.num_blocks
    num_blocks = int(scheduler.kv_cache_gb * GIB) // block_bytes
    if num_blocks < blocks_of_one:
        raise UserError(
            f"scheduler_config.kv_cache_gb: {scheduler.kv_cache_gb:g} GB are {num_blocks} blocks, and one request of "
            f"max_model_len {scheduler.max_model_len} takes {blocks_of_one}: give at least "
            f"{blocks_of_one * block_bytes / GIB:.2f} GB, or lower scheduler_config.max_model_len"
        )
    return num_blocks


def advice(recipe: Recipe, weights_alone: bool) -> str:
    """What to change in a recipe that does not fit."""
    if weights_alone:
        narrower = "model_config.dtype: bfloat16, " if recipe.model.dtype == "float32" else ""
        smaller = (
            "a smaller draft model, or none (speculative_config), " if recipe.speculative.method == "draft" else ""
        )
        return (
            f"The weights alone are too many: use {narrower}{smaller}a smaller model, a quantized checkpoint or more "
            "ranks."
        )
    knobs = "scheduler_config.max_model_len, encoder_cache_tokens, max_num_batched_tokens or max_num_seqs"
    if recipe.scheduler.kv_cache_gb:
        knobs = f"scheduler_config.kv_cache_gb ({recipe.scheduler.kv_cache_gb:g}), or {knobs}"
    if recipe.scheduler.num_blocks:
        knobs = f"scheduler_config.num_blocks ({recipe.scheduler.num_blocks}), or {knobs}"
    smaller = "take a smaller speculative_config.model_path, or " if recipe.speculative.method == "draft" else ""
    return f"Lower {knobs}, or data_config.max_pixels, or {smaller}free memory."
