"""Keys of a recipe that say something to another choice than the one that is made: each is told, in one line."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from executor.recipe.schema import BenchSection, Recipe
from executor.recipe.section import Section

logger = logging.getLogger(__name__)

_METHODS = ("ngram", "lookahead", "draft")
# Key of a section -> the choices that read it.
OF_METHODS = {  # one that reads no model_path refuses it
    **dict.fromkeys(("num_speculative_tokens", "adaptive"), _METHODS),
    **dict.fromkeys(("ngram_min", "ngram_max"), ("ngram",)),
    **dict.fromkeys(("level", "window", "guess_set_size"), ("lookahead",)),
}
_OF_DISK_CACHE = {"prefix_cache_gb": ("prefix_cache_path",)}
_OF_BENCH_MODES = {
    "batch_sizes": ("latency",),
    **dict.fromkeys(("request_rates", "concurrencies", "burstiness", "base_url", "timeout_s"), ("serve",)),
}


def warn_of_unused(recipe: Recipe) -> None:
    """Of the sections that every command reads."""
    method, path = recipe.speculative.method, recipe.scheduler.prefix_cache_path
    chosen = "without a method" if method is None else f"with method {method}"
    _warn_of("speculative_config", recipe.speculative, OF_METHODS, method, chosen)
    choice = None if path is None else "prefix_cache_path"
    _warn_of("scheduler_config", recipe.scheduler, _OF_DISK_CACHE, choice, "without prefix_cache_path")


def warn_of_unused_by_bench(bench: BenchSection) -> None:
    _warn_of("bench_config", bench, _OF_BENCH_MODES, bench.mode, f"on bench {bench.mode}")


def _warn_of(
    section: str, settings: Section, readers: Mapping[str, Sequence[str]], choice: str | None, chosen: str
) -> None:
    """`choice`: the one that is made, `chosen` says it in words."""
    for key, names in readers.items():
        value = getattr(settings, key)
        if choice not in names and value != type(settings).model_fields[key].default:
            _warn(f"{section}.{key}: got {value}, which has no effect {chosen}; what reads it: {', '.join(names)}")


@cache
def _warn(message: str) -> None:
    """Once: a recipe is settled more than once, and `plan` settles many."""
    logger.warning("%s", message)
