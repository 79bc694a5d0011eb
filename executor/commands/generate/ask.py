"""From a sample to a request: its prompt built, its sampling parameters settled and checked.

The one barrier around odd data: whatever preparing a sample raises becomes that row's error, and no other row hears of
it. May run in any thread: nothing is kept between calls.
"""

import logging
import time
from dataclasses import replace
from typing import Any

from dataset.sample import Sample
from executor.commands.generate.rows import Asked
from executor.engine.params import check_params
from executor.errors import ODD_DATA_ERRORS, UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import Recipe
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)


def ask(engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample) -> Asked:
    """Read a sample's media and make its prompt. `params` are the recipe's, for rows that set none themselves.

    Raises UserError for whatever keeps the sample from being asked, and nothing else.
    """
    try:
        return _ask(engine, recipe, params, index, sample)
    except UserError:
        raise
    except ODD_DATA_ERRORS as error:
        logger.debug("%s", sample.id, exc_info=True)
        reason = str(error) or "no reason given"
        raise UserError(f"the row cannot be prepared ({type(error).__name__}: {reason})") from error


def _ask(engine: Any, recipe: Recipe, params: SamplingParams, index: int, sample: Sample) -> Asked:
    from executor.engine.engine import random_seed

    if sample.error:
        raise UserError(sample.error)
    started = time.monotonic()
    processor = engine.processor
    if sample.generation:
        params = sampling_params(recipe.generation, processor.generation_config, sample.generation)
        check_params(params, engine.vocab_size)
    messages = list(sample.messages)
    if recipe.data.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    template_kwargs = {**recipe.data.chat_template_kwargs, **sample.template_kwargs}
    prompt = processor.build(messages, tools=sample.tools or None, chat_template_kwargs=template_kwargs or None)
    if params.temperature and recipe.generation.seed is None and "seed" not in sample.generation:
        params = replace(params, seed=random_seed())
    return Asked(index, sample, params, prompt, time.monotonic() - started)
