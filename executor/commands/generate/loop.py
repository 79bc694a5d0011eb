"""The loop around the engine: keeps it fed with samples, and hands rows on as they are finished."""

from collections.abc import Callable
from functools import partial
from typing import Any

from dataset.sample import Sample
from executor.commands.generate.ask import ask
from executor.commands.generate.rows import Asked, Row, answered_row, failed_row
from executor.errors import UserError
from executor.recipe.schema import Recipe
from executor.schedule.request import Prompt, SamplingParams

WAIT_S = 0.05  # for a prompt to be prepared, before looking for rows of other replicas


def answer_all(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any, take: Callable[[Row], None]) -> None:
    """Answer all samples that this replica takes, and let its other ranks go. `take` gets rows as they are finished,
    not in order, those that other replicas have sent among them.

    `spread.samples()` gives None where there is nothing to take at the moment, and there may be later.
    Samples that cannot be answered yield a row with `error` set. `params` are for rows that set none themselves.
    """
    from executor.engine.loop import MAX_AHEAD, EngineLoop

    max_held = min(recipe.scheduler.max_num_seqs + MAX_AHEAD, spread.max_held)
    samples, unfinished, exhausted = spread.samples(), {}, False
    over = object()
    asked: dict[int, Asked] = {}
    with EngineLoop(engine) as loop:
        while unfinished or not exhausted:
            while not exhausted and len(unfinished) < max_held:
                taken = next(samples, over)
                exhausted = taken is over
                if exhausted or taken is None:
                    break
                index, sample = taken
                make = partial(_make, asked, engine, recipe, params, index, sample)
                unfinished[loop.submit(make, params)] = index, sample
            for handle in loop.turn(WAIT_S) if unfinished or not exhausted else ():
                index, sample = unfinished.pop(handle)
                error = _error(handle)
                question = asked.pop(index, None)
                if error is not None:
                    take(failed_row(index, sample, error))
                else:
                    take(answered_row(question, handle.completion, engine, recipe))
            spread.receive(take)
    for _ in engine.assist():
        spread.receive(take)
    engine.dismiss()


def _make(
    asked: dict[int, Asked], engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample
) -> tuple[Prompt, SamplingParams]:
    """Runs in a preparing thread."""
    asked[index] = ask(engine, recipe, params, index, sample)
    return asked[index].prompt, asked[index].params


def _error(handle: Any) -> str | None:
    """Why a sample has no answer. Raises what `ask` does not count as the sample's fault: a defect of ours."""
    if handle.failure is None:
        return handle.completion.error
    if isinstance(handle.failure, UserError):
        return str(handle.failure)
    raise handle.failure
