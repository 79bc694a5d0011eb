"""From a sample to a request: its sampling parameters settled and checked, its prompt built.

The one barrier around odd data: whatever preparing a sample raises becomes that row's error, and no other row hears of
it. May run in any thread: nothing is kept between calls.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dataset.sample import Sample
from executor.commands.generate.rows import Asked
from executor.engine.params import check_params
from executor.errors import ODD_DATA_ERRORS, UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)


def ask(engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample) -> Asked:
    """Read a sample's media and make its prompt. `params` are the recipe's, for rows that set none themselves.

    Raises UserError for whatever keeps the sample from being asked, and nothing else.
    """
    if sample.error:
        raise UserError(sample.error)
    started = time.monotonic()
    params = row_params(engine, recipe, params, sample)
    prompt = row_prompt(engine.processor, recipe, sample)
    return Asked(index, sample, params, prompt, time.monotonic() - started)


def row_params(engine: Any, recipe: Recipe, params: SamplingParams, sample: Sample) -> SamplingParams:
    """How a sample is answered: as `params`, the recipe's, say, or as it says itself. UserError, and nothing else."""
    if not sample.generation:
        return params
    with _odd_data(sample):
        of_row = sampling_params(recipe.generation, engine.processor.generation_config, sample.generation)
        check_params(of_row, engine.vocab_size)
        return of_row


def row_prompt(processor: Any, recipe: Recipe, sample: Sample) -> Prompt:
    """A sample's prompt, its media read. UserError, and nothing else."""
    with _odd_data(sample):
        messages = list(sample.messages)
        if recipe.data.system_prompt and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
        template_kwargs = {**recipe.data.chat_template_kwargs, **sample.template_kwargs}
        return processor.build(messages, tools=sample.tools or None, chat_template_kwargs=template_kwargs or None)


@contextmanager
def _odd_data(sample: Sample) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ODD_DATA_ERRORS as error:
        logger.debug("%s", sample.id, exc_info=True)
        reason = str(error) or "no reason given"
        raise UserError(f"the row cannot be prepared ({type(error).__name__}: {reason})") from error
