"""For how many rows of how many tokens a recipe has decode graphs. Knows the recipe only; graphs are made in
executor/engine/graphs.py.
"""

from collections.abc import Sequence

from executor.recipe.schema import Recipe
from executor.schedule.plan import GraphShape

VERIFY_TOKENS = 512
"""Tokens of the largest graph that verifies drafts. Beyond, products take longer than launching them one by one."""


def batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and `most`."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)


def graph_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Batch sizes of the decode graphs of a recipe; none where decode steps run eagerly."""
    if recipe.model.exe_mode == "eager":
        return ()
    return recipe.scheduler.graph_batch_sizes or batch_sizes(recipe.scheduler.max_num_seqs)


def most_inputs(recipe: Recipe) -> int:
    """Tokens that a decode step computes of one request at most: its last one, and drafts."""
    return 1 + (recipe.speculative.num_speculative_tokens if recipe.speculative.method else 0)


def verify_lengths(recipe: Recipe) -> tuple[int, ...]:
    """Tokens of a row of the graphs that verify drafts, ascending; none where no drafts are made, or where steps with
    drafts run eagerly: over an int8 cache, whose attention in graphs takes one token a row."""
    most = most_inputs(recipe)
    if most == 1 or recipe.model.exe_mode == "eager" or recipe.model.kv_cache_dtype == "int8":
        return ()
    return (most,)


def graph_shapes(recipe: Recipe) -> tuple[GraphShape, ...]:
    """All decode graphs of a recipe: of one token a row, and of each length that drafts are verified in."""
    sizes = graph_sizes(recipe)
    shapes = [GraphShape(size, q_len) for q_len in (1, *verify_lengths(recipe)) for size in sizes]
    return tuple(shape for shape in shapes if shape.q_len == 1 or shape.num_tokens <= VERIFY_TOKENS)


def decode_tokens(recipe: Recipe) -> int:
    """The most tokens of a decode step of one replica, with those that a graph is padded by."""
    most = recipe.scheduler.max_num_seqs * most_inputs(recipe)
    return max((most, *(shape.num_tokens for shape in graph_shapes(recipe))))


def spare_blocks(shapes: Sequence[GraphShape], block_size: int) -> int:
    """Blocks behind the scheduler's own that padding tokens write to."""
    return -(-max((shape.num_tokens for shape in shapes), default=0) // block_size)
