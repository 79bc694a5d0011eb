"""A recipe's data set answered, by all ranks of a job or all jobs of a cluster; what becomes of the answers is a Work.

Requests are prepared a few at a time while others are being answered, so thousands of videos are never in memory.
A request that cannot be answered has its error in its row; the others are answered. With a results_path rows are saved
as they come, and an interrupted run goes on from them. Knows `generate` and `eval` only as two works.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TextIO

from dataset.sample import Dataset
from executor.commands.generate.loop import answer_all
from executor.commands.generate.printer import Printer
from executor.commands.generate.results import ResultsFile, check_place, settings_of
from executor.commands.generate.rows import Row, check_drawing
from executor.commands.generate.taking import Taking
from executor.engine.params import check_params
from executor.engine.speculation.counts import SpeculationCounts
from executor.host.env import environment, rank_place
from executor.prompt.chat import check_template_kwargs
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """All rows of a data set, in its order. `before`: the indices of those that an earlier run had answered."""

    outputs: list[Row]
    before: frozenset[int]
    seconds: float  # that answering the others took, without the start of the engine
    speculation: SpeculationCounts  # of drafts for them, as far as this job's first replica made them

    @property
    def num_failed(self) -> int:
        return sum(row["error"] is not None for row in self.outputs)

    @property
    def status(self) -> int:
        """The command's exit status."""
        return 2 if self.num_failed else 0


class Filled(NamedTuple):
    """How the missing rows came about: since when, in monotonic seconds, and with which drafts."""

    started_s: float
    speculation: SpeculationCounts


class Work(Protocol):
    """What a command does with the answers."""

    command: str

    def dataset(self, recipe: Recipe) -> Dataset:
        """What is asked. Called by every rank that takes requests, which must see the same."""

    def finish(self, row: Row, dataset: Dataset) -> Row:
        """The row as it is saved: of a new answer to a sample of `dataset`, or of one that an earlier run has saved."""

    def printer(self, total: int, out: TextIO, already: frozenset[int]) -> Printer | None:
        """What prints rows as they come; None: nothing does."""

    def progress(self) -> str:
        """A few words beside the progress bar."""

    def report(self, recipe: Recipe, answers: Answers, out: TextIO) -> Row:
        """The JSON document of a settled recipe, once all is answered; prints what people see beside it."""


def run_work(work: Work, recipe: Recipe, build: Callable[..., Any] | None, out: TextIO) -> tuple[Row, int]:
    """Answer everything `recipe` asks; returns the JSON document and the exit status.

    `build` makes the engine (executor.commands.build.engine_of). Raises UserError for what keeps all from starting.
    """
    place = rank_place()
    if recipe.num_jobs(work.command) > 1:
        from executor.commands.generate.cluster import run_cluster

        return run_cluster(work, recipe, out)
    if place.rank or "RECIPE_FRONT" in environment():
        _assist(work, prepare(recipe, place.local_world_size), build)
        return {"command": work.command}, 0
    check_data(recipe)
    dataset = work.dataset(recipe)
    prepared = prepare(recipe, place.local_world_size)
    params = _checked_params(prepared)

    def fill(rows: dict[int, Row], results: ResultsFile | None) -> Filled:
        return _answer_missing(work, prepared, params, dataset, rows, results, build, out)

    return answered(work, prepared.recipe, dataset, out, fill)


def check_data(recipe: Recipe) -> None:
    """UserError where what is written cannot be, before anything is read."""
    if recipe.data.results_path:
        with suppress(OSError):  # said when the file is opened
            check_place(recipe.data.results_path)
    check_drawing(recipe)


def answered(
    work: Work,
    recipe: Recipe,
    dataset: Dataset,
    out: TextIO,
    fill: Callable[[dict[int, Row], ResultsFile | None], Filled | None],
) -> tuple[Row, int]:
    """The JSON document and the exit status of a settled recipe, when `fill` has answered what was not answered before.

    `fill` gets the rows that there are and the file that rows go to. It is called for nothing where other ranks wait
    for this one.
    """
    opened = nullcontext()
    if recipe.data.results_path:
        opened = ResultsFile(recipe.data.results_path, settings_of(recipe), dataset)
    with opened as results:
        saved = results.answered() if results else {}
        rows = {index: work.finish(row, dataset) for index, row in saved.items() if index < len(dataset)}
        before = frozenset(rows)
        if rows:
            logger.info("%d of %d answers are in %s already", len(rows), len(dataset), recipe.data.results_path)
        filled = Filled(time.monotonic(), SpeculationCounts())
        if len(rows) < len(dataset) or recipe.parallel.world_size > 1:  # the other ranks wait for this one
            try:
                filled = fill(rows, results) or filled
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_what_is_saved(rows, len(dataset), recipe.data.results_path)) from None
        if results:
            results.sort(rows)
    seconds = time.monotonic() - filled.started_s
    answers = Answers([rows[index] for index in sorted(rows)], before, seconds, filled.speculation)
    return work.report(recipe, answers, out), answers.status


def _what_is_saved(rows: dict[int, Row], total: int, path: str | None) -> str:
    """For someone who has pressed Ctrl-C."""
    if path is None:
        return (
            f"{len(rows)} of {total} requests were answered, and nothing is saved; --set data_config.results_path=FILE "
            "saves answers as they come, and goes on from there"
        )
    return f"{len(rows)} of {total} answers are in {path}; the same command goes on from there"


def _answer_missing(
    work: Work,
    prepared: Prepared,
    params: SamplingParams,
    dataset: Dataset,
    rows: dict[int, Row],
    results: ResultsFile | None,
    build: Callable[..., Any] | None,
    out: TextIO,
) -> Filled:
    """Fill `rows` with an answer (or an error) for every sample that has none, printing and saving each; since the
    engine was ready."""
    from executor.commands.build import open_rank  # loads torch: only when there is work for it
    from executor.commands.generate.spread import Spread

    device, parallel = open_rank(prepared)
    spread = Spread(parallel, dataset)
    if not spread.start([index for index in range(len(dataset)) if index not in rows]):
        parallel.disconnect()
        return Filled(time.monotonic(), SpeculationCounts())
    engine = _build(prepared, device, parallel, build)
    ready = time.monotonic()
    with Taking(work, dataset, rows, results, out) as take:
        answer_all(engine, prepared.recipe, params, spread, take)
        while not take.is_complete:  # the last ones of other replicas
            spread.receive(take)
            spread.wait()
    parallel.disconnect()
    return Filled(ready, engine.speculation)


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


def _assist(work: Work, prepared: Prepared, build: Callable[..., Any] | None) -> None:
    """What a rank does that has no results of its own: answer for its replica, or follow the rank that does."""
    from executor.commands.build import open_rank
    from executor.commands.generate.spread import Spread

    recipe, params = prepared.recipe, _checked_params(prepared)
    device, parallel = open_rank(prepared)
    dataset = work.dataset(recipe) if parallel.leads else None
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
