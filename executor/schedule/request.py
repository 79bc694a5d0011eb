"""What travels from the processor through the scheduler to the runner: prompts, media, requests.

Knows nothing of torch, tokenizers or models; `MediaItem.pixels` is opaque here.
Legend: T prompt tokens, F frames, C channels (3), H/W pixels after the resize.
"""

import enum
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

# How Qwen's checkpoints mark the parts of an answer; each is a token that their tokenizers do not call special.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
THINK_BEGIN, THINK_END = "<think>", "</think>"

GRAMMAR_ENDS = "its grammar cannot be followed any further"
NO_SCORE_LEFT = "leave no finite score"


def is_own_fault(error: str) -> bool:
    """Whether a request cannot go on because of what it asks for, and would not elsewhere either."""
    return error.startswith(GRAMMAR_ENDS) or NO_SCORE_LEFT in error


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: `source` in the language that `kind` names. Checked when the request is prepared.

    json_schema: a schema's JSON text. regex: a regular expression. choice: a JSON list of texts. ebnf: a grammar in
    GBNF with the rule `root`, or in Lark with `start`. calls: calls of tools in Qwen's form, `{"tools": [{"name",
    "parameters": schema or null}], "parallel": whether several may follow each other, "else": the JSON text of a schema
    for an answer without calls, where such may be}`.
    """

    kind: Literal["json_schema", "regex", "choice", "ebnf", "calls"]
    source: str
    after: str | None = None  # text is free until this token has come: the end of the reasoning
    is_lazy: bool = False  # of calls: text is free but for the calls that it makes
    asked_by: str = field(default="", compare=False)  # for messages: the field of a request

    def __post_init__(self) -> None:
        assert self.kind == "calls" or not self.is_lazy, "only calls can be lazy"


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. Defaults are greedy and without penalties.

    `seed` None: another one for each request, drawn when the engine takes it in. A `Request`'s is a number: the noise
    of a token is a hash of (seed, position, candidate), so the answer is the same alone or in any batch.
    `stop`, `stop_token_ids` and `bad_words` may be given as one string, one id, or any list of them, `logit_bias` as a
    mapping.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the checkpoint's EOS list is kept by the engine, not here
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its score), before the penalties
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[str, ...] = ()  # texts that an answer may not hold
    grammar: Grammar | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None  # as `logprobs`, of the prompt's tokens

    def __post_init__(self) -> None:
        for name, single in (("stop", str), ("stop_token_ids", int), ("bad_words", str)):
            value = getattr(self, name)
            if isinstance(value, single):
                value = (value,)
            elif isinstance(value, list | set | frozenset):
                value = tuple(value)
            object.__setattr__(self, name, value)
        if isinstance(self.allowed_token_ids, list | set | frozenset):
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, dict):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))

    @property
    def adjusts_scores(self) -> bool:
        """Whether anything is done to the model's scores before a token is chosen."""
        return bool(
            self.needs_history
            or self.min_new_tokens
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
            or self.grammar is not None
        )

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must know which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, eq=False)
class MediaItem:
    """One picture or video, decoded and resized, as the vision encoder takes it."""

    kind: Literal["image", "video"]
    digest: bytes  # of the resized pixels and their grid: equal digests have equal embeddings
    pixels: Any  # uint8 tensor [F, C, H, W], F even for a video, 1 for a picture
    grid_thw: tuple[int, int, int]  # in patches (time, height, width)
    num_tokens: int  # embeddings it yields: t * h * w / merge**2
    source: str = ""  # for messages: a path, a URL, "base64"
    seconds_per_grid: float = 0.0  # video: seconds from one temporal patch to the next
    timestamps_s: tuple[float, ...] = ()  # video: of every sampled frame, before the repeat to an even count
    original_hw: tuple[int, int] = (0, 0)  # height and width before the resize, upright
    warnings: tuple[str, ...] = ()  # what is not there of a damaged file

    @property
    def resized_hw(self) -> tuple[int, int]:
        """Height and width that the model sees; of a video: of each frame."""
        return tuple(self.pixels.shape[-2:])


@dataclass(frozen=True)
class Span:
    """A run of placeholder tokens in the prompt, filled with embeddings `offset...` of `media[media_index]`."""

    start: int
    num_tokens: int
    media_index: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt ready for the engine. Position of generated token i is `len(token_ids) + i + position_delta`."""

    token_ids: list[int]
    positions: np.ndarray  # int64 [3, T]: M-RoPE (time, height, width)
    position_delta: int
    media: tuple[MediaItem, ...] = ()
    spans: tuple[Span, ...] = ()  # ascending by start, disjoint
    text: str = ""  # what was tokenized

    @property
    def num_vision_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # `Request.error` says why


@dataclass(eq=False)
class Request:
    """One sequence being answered: its prompt, its state in the scheduler, its times (monotonic seconds)."""

    id: str
    prompt: Prompt
    params: SamplingParams
    arrival_s: float = field(default_factory=time.monotonic)

    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)  # of the prompt's tokens so far; the first has None
    bad_words: Any = None  # executor.engine.bad_words.BadWords of params.bad_words, set by the engine
    matcher: Any = None  # executor.engine.matcher.Matcher of params.grammar, likewise
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string
    error: str | None = None  # why it could not be answered to its end

    # Owned by the scheduler.
    num_computed_tokens: int = 0  # of prompt + output, whose keys and values are in `block_ids`
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when first admitted
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    first_token_s: float | None = None
    finish_s: float | None = None

    def __post_init__(self) -> None:
        if self.params.seed is None:  # the engine has drawn one for whoever wants another each time
            self.params = replace(self.params, seed=0)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs.append(None)

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """Whether some of its prompt's logprobs are wanted and not known yet: then all of it must be computed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.output_token_ids)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt followed by output."""
        num_prompt = len(self.prompt.token_ids)
        if end <= num_prompt:
            return self.prompt.token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt.token_ids[start:] + self.output_token_ids[: end - num_prompt]
