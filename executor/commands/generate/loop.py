"""The loop around the engine: takes samples, keeps the engine fed, yields rows as they are finished."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from dataset.sample import Sample
from executor.commands.generate.rows import Asked, Row, answered_row, failed_row
from executor.errors import UserError
from executor.recipe.schema import Recipe
from executor.schedule.request import SamplingParams

LOOK_AHEAD = 2  # prompts kept ready beyond those being answered
BUILD_SLICE_S = 0.05  # preparing prompts may hold running answers up for so long between two steps


def all_rows(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any, count: int) -> Iterator[Row]:
    """The rows of all replicas, `count` in all, as they are finished."""
    for row in own_rows(engine, recipe, params, spread):
        arrived = [*([] if row is None else [row]), *spread.received()]
        count -= len(arrived)
        yield from arrived
    while count:
        for row in spread.received():
            count -= 1
            yield row
        spread.wait()


def own_rows(engine: Any, recipe: Recipe, params: SamplingParams, spread: Any) -> Iterator[Row | None]:
    """This replica's rows, and None after each step."""
    yield from answer(engine, recipe, params, spread.mine(), spread.most)
    yield from engine.assist()
    engine.close()


def answer(
    engine: Any, recipe: Recipe, params: SamplingParams, samples: Iterable[tuple[int, Sample]], most: int
) -> Iterator[Row | None]:
    """Rows of all samples as they are finished, not in order, and None after each step.

    Bad samples yield a row with `error` set. At most `most` samples are taken at a time.
    """
    from executor.engine.outputs import Collector

    collector, waiting, pending = Collector(), iter(samples), {}
    most = min(recipe.scheduler.max_num_seqs + LOOK_AHEAD, most)
    exhausted = False
    while pending or not exhausted:
        slice_end = time.monotonic() + BUILD_SLICE_S
        while not exhausted and len(pending) < most and (not pending or time.monotonic() < slice_end):
            index, sample = next(waiting, (None, None))
            if sample is None:
                exhausted = True
                break
            try:
                asked = _ask(engine, recipe, params, index, sample)
                request_id = engine.add(asked.prompt, asked.params)
            except UserError as error:
                yield failed_row(index, sample, str(error))
                continue
            collector.expect(request_id, asked.params.n)
            pending[request_id] = asked
        if not pending:
            continue
        outputs = engine.step()
        assert outputs or engine.has_work, f"the engine lost {len(pending)} requests"
        for completion in collector.feed(outputs):
            asked = pending.pop(completion.request_id)
            yield answered_row(asked, completion, engine, recipe)
        yield None


def _ask(engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample) -> Asked:
    """Read a sample's media and make its prompt. UserError for what cannot be asked."""
    from executor.engine.params import with_seed

    if sample.error:
        raise UserError(sample.error)
    started = time.monotonic()
    messages = list(sample.messages)
    if recipe.data.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    prompt = engine.processor.build(messages, chat_template_kwargs=recipe.data.chat_template_kwargs or None)
    return Asked(index, sample, with_seed(params), prompt, time.monotonic() - started)
