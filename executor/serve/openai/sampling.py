"""Request fields that say how tokens are chosen: their types, and which parameter of the engine each one sets.

All endpoints that complete text share them: a request model inherits `SamplingFields`, and `params_of` reads it.
Nothing is dropped silently: a field that is not served and would change the answer is refused (`UNSERVED`), one that
nobody knows is named in the log, once.
Knows no grammar and no prompt; what an endpoint adds to the parameters it hands to `params_of`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from executor.errors import nearest
from executor.schedule.request import SamplingParams
from executor.serve.bodies import in_json
from executor.serve.errors import ApiError
from executor.serve.service import Service

logger = logging.getLogger(__name__)

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 4096
MAX_TEXTS, MAX_TOKEN_IDS = 1024, 1 << 18  # of a list in a request
MAX_UNKNOWN, MAX_NAMES = 100, 500  # unknown fields: of a request, and named in the log


def _whole(value: Any) -> Any:
    """10.0 is 10: some languages know one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
# Lists end at their first fault, and at a length that no honest request has.
Texts = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_TEXTS)]
TokenIds = Annotated[list[Whole], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]
Bias = Annotated[dict[str, Number], Field(max_length=MAX_TOKEN_IDS)]


class SamplingFields(BaseModel):
    """What a request may say of its tokens. null: as the recipe and the checkpoint have it."""

    model_config = ConfigDict(extra="allow")

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    seed: Whole | None = None
    stop: Text | Texts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Bias | None = None
    bad_words: Texts | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: Whole | None = None
    do_sample: Flag | None = None
    stream: Flag | None = None
    model: Text | None = None
    user: Text | None = None


class FormFields(SamplingFields):
    """What a request may say of its answer's form besides: read by executor.serve.structured."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Text | None = None
    guided_choice: list[Any] | None = None
    guided_grammar: Text | None = None


def form_fields(body: BaseModel) -> dict[str, Any]:
    """A request's fields as they came, for what reads the form of the answer."""
    return {**body.__dict__, **(body.model_extra or {})}


def _same(value: Any) -> Any:
    return value


def _stop(value: str | list[str]) -> tuple[str, ...]:
    """Every token's text is searched for all of them."""
    stops = (value,) if isinstance(value, str) else tuple(value)
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise ApiError(
            400, f"stop has {len(stops)} texts of {sum(map(len, stops))} characters; allowed: {MAX_STOPS} texts of "
            f"{MAX_STOP_CHARACTERS} characters together", param="stop",
        )  # fmt: skip
    return stops


OVERRIDES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("temperature", _same),
    "top_p": ("top_p", _same),
    "top_k": ("top_k", _same),
    "min_p": ("min_p", _same),
    "n": ("n", _same),
    "max_tokens": ("max_new_tokens", _same),
    "min_tokens": ("min_new_tokens", _same),
    "seed": ("seed", _same),
    "stop": ("stop", _stop),
    "stop_token_ids": ("stop_token_ids", tuple),
    "include_stop_str_in_output": ("include_stop_str_in_output", _same),
    "ignore_eos": ("ignore_eos", _same),
    "skip_special_tokens": ("skip_special_tokens", _same),
    "frequency_penalty": ("frequency_penalty", _same),
    "presence_penalty": ("presence_penalty", _same),
    "repetition_penalty": ("repetition_penalty", _same),
    "logit_bias": ("logit_bias", _same),
    "bad_words": ("bad_words", tuple),
    "allowed_token_ids": ("allowed_token_ids", tuple),
    "prompt_logprobs": ("prompt_logprobs", _same),
    "do_sample": ("do_sample", _same),
}
"""Request field -> the field of SamplingParams (or do_sample) that it sets, and how its value is read."""

REQUEST_NAMES = {parameter: field for field, (parameter, _) in OVERRIDES.items()}

Unserved = tuple[tuple[Any, ...], str]

UNSERVED: dict[str, Unserved] = {
    "audio": ((), "these models do not speak"),
    "batch_size": ((1,), "requests are batched by the engine"),
    "best_of": ((1,), "ask for n answers"),
    "cache_salt": ((), "prompts of all clients share one prefix cache: enable_prefix_caching of the recipe"),
    "chat_template": ((), "the checkpoint's is used"),
    "documents": (([],), "write them into the messages"),
    "early_stopping": ((False,), "beams are not searched"),
    "ebnf": ((), "use structured_outputs.grammar"),
    "echo": ((False,), "join prompt and answer yourself"),
    "frequency_penalty_decay": ((), ""),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": (([],), "use tools"),
    "guided_whitespace_pattern": ((), ""),
    "kv_transfer_params": (({},), ""),
    "length_penalty": ((1, 1.0), "beams are not searched"),
    "logits_processors": (([],), ""),
    "logprob_token_ids": (([],), "use top_logprobs"),
    "lora_path": ((), "one model is served"),
    "mirostat": ((0,), ""),
    "modalities": ((["text"],), "these models answer in text"),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty or frequency_penalty"),
    "num_beams": ((1,), "beams are not searched"),
    "reasoning_effort": ((), "use chat_template_kwargs, where the checkpoint's template knows thinking"),
    "regex": ((), "use structured_outputs.regex"),
    "return_token_ids": ((False,), "use logprobs, whose entries follow the tokens"),
    "return_tokens_as_token_ids": ((False,), ""),
    "thinking_token_budget": ((), "max_tokens bounds reasoning and answer together"),
    "top_a": ((0, 0.0), ""),
    "top_n_tokens": ((0,), "use top_logprobs"),
    "truncate": ((), "prompts are never cut; shorten it"),
    "truncate_prompt_tokens": ((-1,), "prompts are never cut; shorten it"),
    "truncation": (("disabled",), "prompts are never cut; shorten it"),
    "typical_p": ((1, 1.0), "use top_p or min_p"),
    "use_beam_search": ((False,), "beams are not searched; ask for n answers"),
    "verbosity": (("medium",), "say it in the messages"),
    "vllm_xargs": (({},), ""),
    "watermark": ((False,), ""),
    "web_search_options": ((), "nothing is searched here"),
}  # fmt: skip
"""Fields that other servers know and that would change the answer -> the values that change nothing, and advice."""

HARMLESS = frozenset((
    "add_special_tokens", "detokenize", "metadata", "prediction", "priority", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "spaces_between_special_tokens",
    "store",
))  # fmt: skip
"""Fields that change no answer here, whatever they say; taken without a word."""


def params_of(
    service: Service,
    body: SamplingFields,
    *,
    more: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> SamplingParams:
    """The parameters of a request. `more`: fields of SamplingParams that the endpoint sets itself; they outrank.

    `names`: {parameter: request field} for messages, where the endpoint calls one otherwise. Without max_tokens the
    answer may go on to the end of the context, or to the recipe's max_new_tokens.
    Raises ApiError 400 for what is not served or out of range; `param` names the request's field.
    """
    refuse_unserved(body)
    overrides = {
        parameter: read(value)
        for field, (parameter, read) in OVERRIDES.items()
        if (value := getattr(body, field)) is not None
    }
    overrides.update({name: value for name, value in (more or {}).items() if value is not None})
    if "max_new_tokens" not in overrides and service.recipe.generation.max_new_tokens is None:
        overrides["max_new_tokens"] = service.max_model_len
    return service.params(overrides, names={**REQUEST_NAMES, **(names or {})})


def refuse_unserved(body: BaseModel) -> None:
    """Raises ApiError 400 for a field that would change the answer; names others that nobody knows in the log."""
    more = body.model_extra or {}
    if len(more) > MAX_UNKNOWN:
        raise ApiError(400, f"the request has {len(more)} fields that nobody knows; allowed: {MAX_UNKNOWN} at most")
    for name, value in more.items():
        if name in UNSERVED:
            neutral, advice = UNSERVED[name]
            if value is not None and not any(value == each and type(value) is type(each) for each in neutral):
                allowed = " or ".join(["null", *map(in_json, neutral)])
                raise ApiError(
                    400, f"{name} is {in_json(value)}, which is not supported; allowed: {allowed}"
                    f"{'; ' if advice else ''}{advice}", param=name, code="unsupported_parameter",
                )  # fmt: skip
        elif name not in HARMLESS and name not in _named and len(_named) < MAX_NAMES:
            _named.add(name)
            hint = nearest(name[:80], type(body).model_fields)
            logger.warning(
                "requests have the unknown field %r%s: it is ignored, as it changes no answer", name[:80], hint
            )


_named: set[str] = set()  # unknown fields that the log has
