"""`bench latency` and `bench throughput`: requests through the engine of this process, without HTTP.

Every run begins with empty caches. Rank 0 measures and reports; the first ranks of other replicas answer their share of
each run, and all others follow theirs.
"""

import logging
from functools import partial
from typing import Any, TextIO

from dataset.load import load_dataset
from executor.bench.machine import machine, versions
from executor.bench.publish import now, publish, results_place
from executor.bench.replicas import Replicas
from executor.bench.results import Report, recipe_tree
from executor.bench.workload import requests_digest, with_fixed_lengths, workload
from executor.commands.bench.measuring import Measuring
from executor.commands.build import engine_of, open_rank
from executor.engine.loop import EngineLoop
from executor.engine.params import check_params
from executor.host.env import rank_place
from executor.prompt.chat import check_template_kwargs
from executor.recipe.disk_cache import without_disk_cache
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)

TURN_S = 0.002  # for which a replica waits for a request before it looks for the others


def measure(recipe: Recipe, out: TextIO) -> tuple[dict[str, Any], int]:
    """Everything that the recipe asks for; rank 0 prints and saves it. Returns the JSON document and the exit status.

    After an interruption the runs that were whole are printed and saved, and KeyboardInterrupt says so.
    """
    place, created = rank_place(), now()
    recipe = with_fixed_lengths(recipe)
    if recipe.scheduler.prefix_cache_path is not None:
        logger.info("scheduler_config.prefix_cache_path is left out: every run is to begin with nothing")
        recipe = without_disk_cache(recipe)
    dataset = None if place.rank else load_dataset(recipe.data, recipe)
    prepared = prepare(recipe, place.local_world_size)
    recipe, params = prepared.recipe, _checked_params(prepared)
    path = None if place.rank else results_place(recipe, recipe.bench.mode, created)
    device, parallel = open_rank(prepared)
    if not parallel.leads:
        engine_of(prepared, device, parallel).follow()
        parallel.disconnect()
        return {"command": "bench"}, 0
    dataset = dataset or load_dataset(recipe.data, recipe)
    engine = engine_of(prepared, device, parallel)
    with EngineLoop(engine) as loop:
        replicas = Replicas(parallel, partial(loop.turn, TURN_S))
        replicas.agree(requests_digest(recipe, dataset))
        measuring = Measuring(recipe, params, dataset, loop, replicas)
        is_whole = _all_runs(measuring)
    if is_whole:
        for _ in engine.assist():
            pass
        engine.dismiss()
        parallel.disconnect()
    if place.rank:
        return {"command": "bench"}, 0
    if not measuring.runs:
        raise KeyboardInterrupt("before anything was measured")
    report = Report(
        mode=recipe.bench.mode,
        dataset=recipe.data.dataset,
        created=created,
        recipe=recipe_tree(recipe),
        workload=workload(recipe, dataset),
        machine=machine(recipe),
        versions=versions(),
        points=measuring.points(prepared.shapes),
        startup=measuring.startup,
    )
    document, status = publish(recipe, report, path, out)
    if not is_whole:
        raise KeyboardInterrupt(f"what was measured until then is in {path}")
    return document, status


def _all_runs(measuring: Measuring) -> bool:
    """Whether they came to their end."""
    try:
        measuring.all_runs()
    except KeyboardInterrupt:
        return False
    return True


def _checked_params(prepared: Prepared) -> SamplingParams:
    """The recipe's parameters, refused before weights are read where they cannot be served."""
    params = sampling_params(prepared.recipe.generation, prepared.generation_config)
    check_params(params, prepared.shapes.vocab_size)
    check_template_kwargs(prepared.recipe.data.chat_template_kwargs)
    return params
