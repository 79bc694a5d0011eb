"""For how many rows of how many tokens a recipe has decode graphs. Knows the recipe only; graphs are made in
executor/engine/graphs.py.

A step of few tokens takes as long as reading the weights, however few they are; with more tokens its time grows with
them. So of graphs that verify drafts small ones are made in one length only, and larger ones in shorter lengths too:
there padding would cost. The bounds are where predictions of dense models on A2 and A3 bend (docs/speculative.md).
"""

from collections.abc import Sequence

from executor.recipe.schema import Recipe
from executor.schedule.plan import GraphShape

FREE_TOKENS = 32
"""Up to so many tokens a step is taken to cost the same: no graph of fewer is made beside one of its rows."""
VERIFY_TOKENS = 128
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


def verify_shapes(recipe: Recipe, sizes: Sequence[int]) -> tuple[GraphShape, ...]:
    """Graphs that verify drafts, of these batch sizes. None where no drafts are made, and over an int8 cache, whose
    attention in graphs takes one token a row: there steps with drafts run eagerly."""
    most = most_inputs(recipe)
    if most == 1 or recipe.model.kv_cache_dtype == "int8":
        return ()
    shapes = (GraphShape(size, q_len) for size in sizes for q_len in batch_sizes(most)[1:])
    return tuple(
        shape
        for shape in shapes
        if shape.num_tokens <= VERIFY_TOKENS and (shape.q_len == most or shape.num_tokens >= FREE_TOKENS)
    )


def graph_shapes(recipe: Recipe) -> tuple[GraphShape, ...]:
    """All decode graphs of a recipe: those of one token a row, and those that verify drafts."""
    sizes = graph_sizes(recipe)
    return (*(GraphShape(size, 1) for size in sizes), *verify_shapes(recipe, sizes))


def decode_tokens(recipe: Recipe) -> int:
    """The most tokens of a decode step of one replica, with those that a graph is padded by."""
    most = recipe.scheduler.max_num_seqs * most_inputs(recipe)
    return max((most, *(shape.num_tokens for shape in graph_shapes(recipe))))


def spare_blocks(shapes: Sequence[GraphShape], block_size: int) -> int:
    """Blocks behind the scheduler's own that padding tokens write to."""
    return -(-max((shape.num_tokens for shape in shapes), default=0) // block_size)
