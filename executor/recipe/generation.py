"""How a request's tokens are chosen, from the layers that may say so: request, recipe, checkpoint, greedy defaults."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from executor.errors import UserError
from executor.recipe.schema import GenerationSection
from executor.schedule.request import SamplingParams

logger = logging.getLogger(__name__)

# What generation_config.json may say that we take over. Its max_length counts the prompt too and is 20 by default
# in old files: an answer is bounded by max_new_tokens and the context alone.
_FROM_CHECKPOINT = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
                    "presence_penalty", "frequency_penalty")  # fmt: skip
_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))
# What means something only when sampling, and the values that mean nothing then either: -1 is vLLM's "all".
_NARROWING = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
_NO_SEED = -1  # as vLLM has it
_SEEDS = 1 << 64


def sampling_params(
    generation: GenerationSection, checkpoint: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> SamplingParams:
    """One request's parameters: `overrides` of the request, then the recipe, then generation_config.json, then greedy.

    `overrides` may hold any field of SamplingParams, and do_sample (false = greedy), as the recipe may; a request's own
    temperature outranks the recipe's do_sample. None anywhere means "not said".
    A checkpoint with do_sample false is greedy unless recipe or request set a temperature. Without a `seed` the engine
    draws another one for each request. Other forms that clients send are taken: logit_bias as an object with texts as
    keys, top_k -1 (all), seed -1 (none) and below.
    Raises UserError for an unknown name in `overrides`.
    """
    asked = {name: value for name, value in (overrides or {}).items() if value is not None}
    do_sample = asked.pop("do_sample", None if "temperature" in asked else generation.do_sample)
    unknown = sorted(set(asked) - _PARAMETERS)
    if unknown:
        raise UserError(f"unknown sampling parameter {', '.join(unknown)}; known: {', '.join(sorted(_PARAMETERS))}")
    said = {name: value for name, value in generation.model_dump().items() if value is not None and name in _PARAMETERS}
    said.update(asked)
    _take_other_forms(said)

    own = {name: checkpoint[name] for name in _FROM_CHECKPOINT if checkpoint.get(name) is not None}
    samples_by_itself = bool(checkpoint.get("do_sample"))
    own["temperature"] = own.get("temperature", 1.0) if samples_by_itself else 0.0
    chosen = own | said
    if do_sample is False:
        chosen["temperature"] = 0.0
    elif do_sample and not chosen["temperature"]:
        chosen["temperature"] = float(asked.get("temperature") or checkpoint.get("temperature") or 1.0)
    if not chosen["temperature"]:
        _warn_if_unused(said)
        chosen.update(top_k=0, top_p=1.0, min_p=0.0)
    return SamplingParams(**chosen)


def _take_other_forms(said: dict[str, Any]) -> None:
    """What clients of vLLM and OpenAI write otherwise, in place. What is none of it stays, to be refused."""
    if said.get("top_k") == -1:
        said["top_k"] = 0
    seed = said.get("seed")
    if seed == _NO_SEED:
        del said["seed"]
    elif isinstance(seed, int) and seed < 0:
        said["seed"] = seed % _SEEDS
    bias = said.get("logit_bias")
    if isinstance(bias, Mapping):
        said["logit_bias"] = tuple((_as_token_id(token_id), value) for token_id, value in bias.items())


def _as_token_id(key: Any) -> Any:
    """JSON has texts as keys."""
    is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
    return int(key) if is_number else key


def _warn_if_unused(said: Mapping[str, Any]) -> None:
    unused = ", ".join(name for name, neutral in _NARROWING.items() if said.get(name, neutral[0]) not in neutral)
    if unused:
        _warn(f"{unused} has no effect at temperature 0 (greedy)")


@cache
def _warn(message: str) -> None:
    """Once: rows of a data set may all say the same."""
    logger.warning("%s", message)
