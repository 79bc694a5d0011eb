"""The loop around the engine: keeps it fed with samples, and hands rows on as they are finished."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from dataset.sample import Sample
from executor.commands.generate.rows import Asked, Row, answered_row, failed_row
from executor.errors import UserError
from executor.recipe.schema import Recipe
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)

WAIT_S = 0.05  # for a prompt to be prepared, before looking for rows of other replicas


def answer_all(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any, take: Callable[[Row], None]) -> None:
    """Answer all samples that this replica takes, and close the engine. `take` gets rows as they are finished, not in
    order, those that other replicas have sent among them.

    Samples that cannot be answered yield a row with `error` set.
    """
    from executor.engine.loop import MAX_AHEAD, EngineLoop
    from executor.engine.params import with_seed

    max_held = min(recipe.scheduler.max_num_seqs + MAX_AHEAD, spread.max_held)
    samples, asked, exhausted = spread.samples(), {}, False
    with EngineLoop(engine) as loop:
        while asked or not exhausted:
            while not exhausted and len(asked) < max_held:
                index, sample = next(samples, (None, None))
                if sample is None:
                    exhausted = True
                elif sample.error:
                    take(failed_row(index, sample, sample.error))
                else:
                    make = partial(_prompt, engine, recipe, sample)
                    asked[loop.submit(make, with_seed(params))] = index, sample
            for handle in loop.turn(WAIT_S) if asked else ():
                take(_row(handle, *asked.pop(handle), engine, recipe))
            spread.receive(take)
    for _ in engine.assist():
        spread.receive(take)
    engine.close()


def _prompt(engine: Any, recipe: Recipe, sample: Sample) -> Prompt:
    """Read a sample's media and make its prompt. UserError for what cannot be asked."""
    messages = list(sample.messages)
    if recipe.data.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    return engine.processor.build(messages, chat_template_kwargs=recipe.data.chat_template_kwargs or None)


def _row(handle: Any, index: int, sample: Sample, engine: Any, recipe: Recipe) -> Row:
    """What became of a sample. Its own fault is its own row's, whatever that is."""
    failure, completion = handle.failure, handle.completion
    if failure is None and completion.error is not None:
        return failed_row(index, sample, completion.error)
    if failure is None:
        asked = Asked(index, sample, handle.params, handle.prompt, handle.prepare_s)
        return answered_row(asked, completion, engine, recipe)
    if isinstance(failure, UserError):
        return failed_row(index, sample, str(failure))
    logger.error("%s cannot be asked", sample.id, exc_info=failure)
    return failed_row(index, sample, f"{type(failure).__name__}: {failure}")
