"""For how many rows a recipe has decode graphs. Knows the recipe only; graphs are made in executor/engine/graphs.py."""

from collections.abc import Sequence

from executor.recipe.schema import Recipe


def batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and `most`."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)


def graph_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Batch sizes of the decode graphs of a recipe; none where decode steps run eagerly."""
    if recipe.model.exe_mode == "eager":
        return ()
    return recipe.scheduler.graph_batch_sizes or batch_sizes(recipe.scheduler.max_num_seqs)


def spare_blocks(sizes: Sequence[int], block_size: int) -> int:
    """Blocks behind the scheduler's own that padding rows write to."""
    return -(-max(sizes, default=0) // block_size)
