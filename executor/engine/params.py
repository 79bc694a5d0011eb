"""Which sampling parameters can be served: asked before a request, or a weight, is taken in."""

import math
import random
from dataclasses import replace
from typing import Any

from executor.errors import UserError
from executor.schedule.request import SamplingParams

MAX_LOGPROBS = 20  # as the OpenAI protocol has it
MAX_ANSWERS = 128  # likewise: `n` answers are as many requests
MAX_BIAS = 100.0  # likewise
MAX_BAD_WORDS, MAX_BAD_CHARACTERS = 1024, 1 << 16  # of a request: they are tokenized in the engine's thread


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises UserError for the first parameter that is out of its range."""
    if not isinstance(params, SamplingParams):
        raise UserError(f"params are {type_of(params)}; allowed: a SamplingParams(...) of executor.schedule.request")
    whole, number = (int,), (int, float)
    rules = [
        ("max_new_tokens", whole, 1, math.inf, "a whole number of 1 or more"),
        ("min_new_tokens", whole, 0, params.max_new_tokens, "a whole number from 0 to max_new_tokens"),
        ("temperature", number, 0, math.inf, "0 (greedy) or more"),
        ("top_k", whole, 0, math.inf, "a whole number: 0 (all tokens) or more"),
        ("top_p", number, math.ulp(0.0), 1, "more than 0, at most 1 (all tokens)"),
        ("min_p", number, 0, 1, "from 0 to 1"),
        ("repetition_penalty", number, 1e-6, 1e6, "from 0.000001 to 1000000; 1 is none"),  # float32 scores stay finite
        ("presence_penalty", number, -2, 2, "from -2 to 2; 0 is none"),
        ("frequency_penalty", number, -2, 2, "from -2 to 2; 0 is none"),
        ("n", whole, 1, MAX_ANSWERS, f"a whole number from 1 to {MAX_ANSWERS}"),
    ]
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            rules.append((name, whole, 0, MAX_LOGPROBS, f"none, or a whole number from 0 to {MAX_LOGPROBS}"))
    if params.seed is not None:
        rules.append(("seed", whole, 0, math.inf, "a whole number of 0 or more, or none for another one each time"))
    for name, types, minimum, maximum, allowed in rules:
        value = getattr(params, name)
        is_number = isinstance(value, types) and not isinstance(value, bool)
        # Infinity is a bound here and never a value.
        if not is_number or not minimum <= value <= maximum or (isinstance(value, float) and math.isinf(value)):
            raise UserError(f"generation_config.{name} is {value!r}; allowed: {allowed}")
    for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
        if not isinstance(getattr(params, name), bool):
            raise UserError(f"generation_config.{name} is {getattr(params, name)!r}; allowed: true or false")
    for name in ("stop", "bad_words"):
        _check_texts(name, getattr(params, name))
    if len(params.bad_words) > MAX_BAD_WORDS or sum(map(len, params.bad_words)) > MAX_BAD_CHARACTERS:
        raise UserError(
            f"generation_config.bad_words has {len(params.bad_words)} texts of {sum(map(len, params.bad_words))} "
            f"characters; allowed: {MAX_BAD_WORDS} texts of {MAX_BAD_CHARACTERS} characters together"
        )
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    if params.allowed_token_ids is not None:
        _check_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
        if not params.allowed_token_ids:
            raise UserError(
                "generation_config.allowed_token_ids is empty; allowed: one token id or more, or none for all"
            )
    _check_bias(params.logit_bias, vocab_size)


def _check_texts(name: str, values: Any) -> None:
    if not isinstance(values, tuple):
        raise UserError(f"generation_config.{name} is {values!r}; allowed: a string or a list of strings")
    for text in values:
        if not isinstance(text, str) or not text:
            raise UserError(f"generation_config.{name} holds {text!r}; allowed: strings that are not empty")


def _check_ids(name: str, values: Any, vocab_size: int) -> None:
    if not isinstance(values, tuple):
        raise UserError(f"generation_config.{name} is {values!r}; allowed: a token id or a list of ids")
    for token_id in values:
        if not _is_token(token_id, vocab_size):
            raise UserError(
                f"generation_config.{name} holds {token_id!r}; allowed: token ids from 0 to {vocab_size - 1}"
            )


def _check_bias(pairs: Any, vocab_size: int) -> None:
    words = f"token ids from 0 to {vocab_size - 1}, each once, with numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}"
    if not isinstance(pairs, tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(f"generation_config.logit_bias is {pairs!r}; allowed: {words}")
    for token_id, value in pairs:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not _is_token(token_id, vocab_size) or not is_number or not -MAX_BIAS <= value <= MAX_BIAS:
            raise UserError(f"generation_config.logit_bias holds {token_id!r}: {value!r}; allowed: {words}")
    if len({token_id for token_id, _ in pairs}) < len(pairs):
        raise UserError(f"generation_config.logit_bias names a token twice; allowed: {words}")


def _is_token(token_id: Any, vocab_size: int) -> bool:
    return isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < vocab_size


def type_of(value: Any) -> str:
    """What a value that is of the wrong type is, for messages: "of type dict: {'n': 1}"."""
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"of type {type(value).__name__}: {str(value)[:60]}"


def with_seed(params: SamplingParams) -> SamplingParams:
    """Parameters with a seed: theirs, or one drawn for this request, with which its answer can be had again."""
    if params.seed is not None:
        return params
    return replace(params, seed=random.SystemRandom().getrandbits(62) if params.temperature else 0)
