"""`bench latency` and `bench throughput`: requests through the engine of this process, without HTTP.

Every run begins with empty caches. Rank 0 measures and reports; the first ranks of other replicas answer their share of
each run, and all others follow theirs.
"""

import logging
from functools import partial
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Dataset, Sample
from executor.bench.drive import Question, drive
from executor.bench.machine import machine, versions
from executor.bench.publish import now, publish, results_place
from executor.bench.replicas import Replicas
from executor.bench.results import Load, Point, Report, Run, Startup, recipe_tree
from executor.bench.workload import PlannedRun, planned_runs, requests_digest, with_fixed_lengths, workload
from executor.commands.build import engine_of, open_rank
from executor.commands.generate.ask import ask
from executor.engine.engine import Engine
from executor.engine.loop import EngineLoop
from executor.engine.params import check_params
from executor.host.env import rank_place
from executor.host.limits import peak_memory_bytes, restart_peak_memory
from executor.host.uptime import process_age_s
from executor.prompt.chat import check_template_kwargs
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)

TURN_S = 0.002  # for which a replica waits for a request before it looks for the others


def measure(recipe: Recipe, out: TextIO) -> tuple[dict[str, Any], int]:
    """On rank 0: everything that the recipe asks for, printed and saved; the JSON document and the exit status."""
    place, created = rank_place(), now()
    recipe = with_fixed_lengths(recipe)
    prepared = prepare(recipe, place.local_world_size)
    recipe, params = prepared.recipe, _checked_params(prepared)
    path = results_place(recipe, recipe.bench.mode, created) if not place.rank else None
    device, parallel = open_rank(prepared)
    dataset = load_dataset(recipe.data, recipe) if parallel.leads else None
    engine = engine_of(prepared, device, parallel)
    if not parallel.leads:
        engine.follow()
        parallel.disconnect()
        return {"command": "bench"}, 0
    with EngineLoop(engine) as loop:
        measuring = Measuring(recipe, params, dataset, loop, Replicas(parallel, partial(loop.turn, TURN_S)))
        interrupt = measuring.all_runs()
    for _ in engine.assist():
        pass
    engine.dismiss()
    parallel.disconnect()
    if place.rank:
        return {"command": "bench"}, 0
    report = Report(
        mode=recipe.bench.mode,
        dataset=recipe.data.dataset,
        created=created,
        recipe=recipe_tree(recipe),
        workload=workload(recipe, dataset),
        machine=machine(recipe),
        versions=versions(),
        points=tuple(Point(load, tuple(runs)) for load, runs in measuring.runs.items() if runs),
        startup=measuring.startup,
    )
    return publish(recipe, report, path, out)
