"""The `generate` command: answer a recipe's questions and print them.

Requests are prepared a few at a time while others are being answered, so thousands of videos are never in memory.
A request that cannot be answered has its error in its row; the others are answered, and the exit status is 2.
"""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Dataset
from executor.commands.generate.loop import answer_all
from executor.commands.generate.printer import print_summary
from executor.commands.generate.results import ResultsFile, check_place, settings_of
from executor.commands.generate.rows import Row, check_drawing
from executor.commands.generate.taking import Taking
from executor.engine.params import check_params
from executor.host.env import environment, rank_place
from executor.prompt.chat import check_template_kwargs
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)


def run(recipe: Recipe, build: Callable[..., Any] | None = None, out: TextIO | None = None) -> tuple[Row, int]:
    """Answer everything `recipe` asks; returns the JSON document and the exit status.

    `build` makes the engine (executor.commands.build.engine_of). Raises UserError for what keeps all from starting.
    """
    out = out or sys.stdout
    place = rank_place()
    if recipe.num_jobs("generate") > 1:
        from executor.commands.generate.cluster import run_cluster

        return run_cluster(recipe, out)
    if place.rank or "RECIPE_FRONT" in environment():
        _assist(prepare(recipe, place.local_world_size), build)
        return {"command": "generate"}, 0
    check_data(recipe)
    dataset = load_dataset(recipe.data, recipe)
    prepared = prepare(recipe, place.local_world_size)
    params = _checked_params(prepared)

    def fill(rows: dict[int, Row], results: ResultsFile | None) -> float:
        return _answer_missing(prepared, params, dataset, rows, results, build, out)

    return answered(prepared.recipe, dataset, out, fill)


def check_data(recipe: Recipe) -> None:
    """UserError where what is written cannot be, before anything is read."""
    if recipe.data.results_path:
        with suppress(OSError):  # said when the file is opened
            check_place(recipe.data.results_path)
    check_drawing(recipe)


def answered(
    recipe: Recipe,
    dataset: Dataset,
    out: TextIO,
    fill: Callable[[dict[int, Row], ResultsFile | None], float | None],
) -> tuple[Row, int]:
    """The JSON document and the exit status of a settled recipe, when `fill` has answered what was not answered before.

    `fill` gets the rows that there are and the file that rows go to; it may return when it began to answer, in
    monotonic seconds. It is called for nothing where other ranks wait for this one.
    """
    opened = nullcontext()
    if recipe.data.results_path:
        opened = ResultsFile(recipe.data.results_path, settings_of(recipe), dataset)
    with opened as results:
        rows = results.answered() if results else {}
        rows = {index: row for index, row in rows.items() if index < len(dataset)}
        before = frozenset(rows)
        if rows:
            logger.info("%d of %d answers are in %s already", len(rows), len(dataset), recipe.data.results_path)
        started = time.monotonic()
        if len(rows) < len(dataset) or recipe.parallel.world_size > 1:  # the other ranks wait for this one
            try:
                started = fill(rows, results) or started
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_what_is_saved(rows, len(dataset), recipe.data.results_path)) from None
        if results:
            results.sort()
    outputs = [rows[index] for index in sorted(rows)]
    num_failed = sum(row["error"] is not None for row in outputs)
    print_summary(outputs, before, time.monotonic() - started, out)
    document = {
        "command": "generate",
        "model": recipe.model.model_path,
        "device": recipe.model.device,
        "exe_mode": recipe.model.exe_mode,
        "outputs": outputs,
    }
    return document, 2 if num_failed else 0


def _what_is_saved(rows: dict[int, Row], total: int, path: str | None) -> str:
    """For someone who has pressed Ctrl-C."""
    if path is None:
        return (
            f"{len(rows)} of {total} requests were answered, and nothing is saved; --set data_config.results_path=FILE "
            "saves answers as they come, and goes on from there"
        )
    return f"{len(rows)} of {total} answers are in {path}; the same command goes on from there"


def _answer_missing(
    prepared: Prepared,
    params: SamplingParams,
    dataset: Dataset,
    rows: dict[int, Row],
    results: ResultsFile | None,
    build: Callable[..., Any] | None,
    out: TextIO,
) -> float:
    """Fill `rows` with an answer (or an error) for every sample that has none, printing and saving each.

    Returns when the engine was ready, in monotonic seconds.
    """
    from executor.commands.build import open_rank  # loads torch: only when there is work for it
    from executor.commands.generate.spread import Spread

    device, parallel = open_rank(prepared)
    spread = Spread(parallel, dataset)
    if not spread.start([index for index in range(len(dataset)) if index not in rows]):
        parallel.disconnect()
        return time.monotonic()
    engine = _build(prepared, device, parallel, build)
    ready = time.monotonic()
    with Taking(len(dataset), rows, results, out) as take:
        answer_all(engine, prepared.recipe, params, spread, take)
        while not take.is_complete:  # the last ones of other replicas
            spread.receive(take)
            spread.wait()
    parallel.disconnect()
    return ready


def _checked_params(prepared: Prepared) -> SamplingParams:
    """The recipe's parameters, refused before weights are read where they cannot be served."""
    params = sampling_params(prepared.recipe.generation, prepared.generation_config)
    check_params(params, prepared.shapes.vocab_size)
    check_template_kwargs(prepared.recipe.data.chat_template_kwargs)
    return params


def _build(prepared: Prepared, device: Any, parallel: Any, build: Callable[..., Any] | None) -> Any:
    if build is None:
        from executor.commands.build import engine_of as build
    return build(prepared, device, parallel)


def _assist(prepared: Prepared, build: Callable[..., Any] | None) -> None:
    """What a rank does that has no results of its own: answer for its replica, or follow the rank that does."""
    from executor.commands.build import open_rank
    from executor.commands.generate.spread import Spread

    recipe, params = prepared.recipe, _checked_params(prepared)
    device, parallel = open_rank(prepared)
    dataset = load_dataset(recipe.data, recipe) if parallel.leads else None
    variables = environment()
    if "RECIPE_FRONT" in variables:
        from executor.commands.generate.front import FrontSpread
        from executor.engine.loop import MAX_AHEAD

        spread = FrontSpread(parallel, dataset, recipe, recipe.scheduler.max_num_seqs + MAX_AHEAD, variables)
    else:
        spread = Spread(parallel, dataset)
    if spread.start():
        engine = _build(prepared, device, parallel, build)
        if parallel.leads:
            answer_all(engine, recipe, params, spread, spread.send)
        else:
            engine.follow()
    parallel.disconnect()
