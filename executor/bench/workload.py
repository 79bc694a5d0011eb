"""What a benchmark asks: which requests each run has, of what kind, and how their answers end."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dataset.random import ANSWER_TOKENS
from dataset.sample import Dataset
from executor.bench.results import Load
from executor.recipe.schema import Recipe

DRAWN = ("random", "tiny_world")  # data sets that the recipe's keys decide, request by request


@dataclass(frozen=True)
class PlannedRun:
    """The requests `places` of the data set, all at once. Warm-ups do not count."""

    load: Load
    places: tuple[int, ...]
    is_warmup: bool


def planned_runs(recipe: Recipe, num_samples: int) -> Iterator[PlannedRun]:
    """All runs in their order. A batch that is larger than the data set begins it again.

    Every load once, then every load again: repetitions lie far apart, so that what slows the machine down for a while
    shows as their spread, not as a difference of two loads.
    """
    bench = recipe.bench
    if bench.mode == "latency":
        loads = [(Load(batch_size=size), size) for size in dict.fromkeys(bench.batch_sizes)]
    else:
        loads = [(Load(), num_samples)]
    for number in range(bench.warmups + bench.repetitions):
        for load, size in loads:
            yield PlannedRun(load, tuple(place % num_samples for place in range(size)), number < bench.warmups)


def with_fixed_lengths(recipe: Recipe) -> Recipe:
    """The recipe, with answers of ANSWER_TOKENS tokens that no end token ends, where it does not say how long they are
    and how they end, and with as many drawn requests as its largest batch has."""
    own = {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    lengths = {key: value for key, value in own.items() if getattr(recipe.generation, key) is None}
    changes: dict[str, dict[str, Any]] = {"generation": lengths} if lengths else {}
    if recipe.bench.mode == "latency" and recipe.data.dataset in DRAWN and recipe.data.limit is None:
        changes["data"] = {"limit": max(recipe.bench.batch_sizes)}
    return recipe.replace(**changes) if changes else recipe


def workload(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What decides how much work the requests are, in plain values: equal for benchmarks that may be compared."""
    data, generation = recipe.data, recipe.generation
    return {
        "requests": len(dataset),
        "digest": requests_digest(recipe, dataset),
        "max_new_tokens": generation.max_new_tokens,
        "ignore_eos": generation.ignore_eos,
        "temperature": generation.temperature,
        "system_prompt": data.system_prompt is not None,
        **{name: getattr(data, name) for name in ("min_pixels", "max_pixels", "fps", "max_frames", "video_max_pixels")},
        "enable_prefix_caching": recipe.scheduler.enable_prefix_caching,
    }


def requests_digest(recipe: Recipe, dataset: Dataset) -> str:
    """A name for what is asked. Drawn requests are not drawn for it: the keys that decide them stand for them."""
    data = recipe.data
    if data.dataset in DRAWN and data.prompt is None and not data.media:
        keys = sorted(name for name in type(data).model_fields if name.startswith("random_"))
        said = repr([len(dataset), data.dataset, *(getattr(data, name) for name in keys)])
        return hashlib.sha256(said.encode()).hexdigest()[:16]
    return dataset.digest()[:16]
