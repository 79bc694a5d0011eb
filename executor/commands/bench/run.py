"""The `bench` command: which mode measures, and what can be refused before anything is loaded."""

import logging
import sys
from typing import Any, TextIO

from executor.errors import UserError
from executor.recipe.schema import Recipe
from executor.recipe.unused import warn_of_unused_by_bench

logger = logging.getLogger(__name__)


def run(recipe: Recipe, out: TextIO | None = None) -> tuple[dict[str, Any], int]:
    """Measure as `recipe.bench` says; the JSON document and the exit status. Raises UserError for what cannot be."""
    check(recipe)
    if recipe.bench.mode == "serve":
        from executor.commands.bench.serve import measure

        return measure(recipe, out or sys.stdout)
    from executor.commands.bench.offline import measure  # loads torch

    return measure(recipe, out or sys.stdout)


def check(recipe: Recipe) -> None:
    """UserError for settings that say nothing, or cannot be."""
    bench, generation = recipe.bench, recipe.generation
    warn_of_unused_by_bench(bench)
    if recipe.model.profile:
        is_elsewhere = bench.mode == "serve" and bench.base_url is not None
        words = "does nothing to a server elsewhere" if is_elsewhere else "costs time: these figures are no speeds"
        logger.warning("model_config.profile: recording %s", words)
    if (generation.n or 1) > 1:
        raise UserError(f"generation_config.n is {generation.n}: bench measures one answer of a request; set it to 1")
    if bench.mode == "latency":
        num_replicas = recipe.parallel.world_size // recipe.attn_tp_size
        largest = -(-max(bench.batch_sizes) // max(1, num_replicas))
        if largest > recipe.scheduler.max_num_seqs:
            raise UserError(
                f"bench_config.batch_sizes: a batch of {max(bench.batch_sizes)} never runs together while "
                f"scheduler_config.max_num_seqs is {recipe.scheduler.max_num_seqs}; add --max-num-seqs {largest}"
            )
