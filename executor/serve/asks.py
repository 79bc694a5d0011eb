"""What is asked of an engine's front door, and what comes back: plain data, which other processes may be sent.

Knows no HTTP and no engine. An `Ask` holds texts, addresses and numbers; media are read where it is answered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from executor.engine.disk_cache.stats import DiskCacheStats
from executor.engine.speculation.counts import SpeculationCounts
from executor.engine.stages import StageTimes
from executor.engine.totals import Totals
from executor.schedule.request import SamplingParams


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, as clients write it."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    media_options: Mapping[str, Any] = field(default_factory=dict)  # mm_processor_kwargs; media_io_kwargs beside them


@dataclass(frozen=True)
class TextPrompt:
    """Text without a template; each placeholder in it takes the next of `media`, parts of a message."""

    text: str
    media: Sequence[Mapping[str, Any]] = ()
    media_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids as they stand."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class Ask:
    """One request: a prompt, and how its `params.n` answers are chosen."""

    id: str
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    params: SamplingParams
    timeout_s: float | None = None
    fits_exactly: bool = False  # refuse a prompt that leaves no room for params.max_new_tokens; else they are fewer
    prompt_field: str = "messages"  # of the request's body, for errors
    limit_field: str = "max_tokens"


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A chosen token's logprob, and the best candidates with theirs: (token id, natural logarithm)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # of the token among all, 1 for the best; of a prompt's tokens only


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one answer. The last one of an answer has a finish_reason."""

    index: int  # which of the `n` answers
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: tuple[TokenInfo, ...] = ()
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # where finish_reason is "error"
    prompt_logprobs: tuple[TokenInfo | None, ...] | None = None  # with the first delta, where asked for
    is_own_fault: bool = False  # the error is of what the request asks for


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a request that was answered. Times in seconds."""

    num_prompt_tokens: int
    num_vision_tokens: int
    num_cached_tokens: int
    num_output_tokens: int  # of all answers
    prepare_s: float
    ttft_s: float  # from the moment that the engine took it in
    tpot_s: float
    e2e_s: float
    finish_reasons: tuple[str, ...]


FailureKind = Literal["refused", "unreachable", "late", "aborted", "lost", "fault"]


@dataclass(frozen=True, slots=True)
class Failure:
    """The last event of a request that was not answered.

    refused: its own mistake. unreachable: a medium's address answered with a mistake. late: its time was over.
    aborted: somebody wished it. lost: whoever answered it has died, and another may answer it. fault: ours, or the
    engine's end.
    """

    kind: FailureKind
    message: str
    param: str | None = None  # the part of the request that is wrong, as in "messages[0].content[1]"


Event = Delta | Done | Failure


@dataclass(frozen=True, slots=True)
class EngineStats(Totals):
    """What an engine holds now and has done since its start; those of several engines add up."""

    num_running: int = 0
    num_waiting: int = 0  # being prepared, or queued
    num_blocks: int = 0  # of the KV cache
    num_used_blocks: int = 0
    num_preemptions: int = 0
    num_encoder_queries: int = 0
    num_encoder_hits: int = 0
    num_store_queries: int = 0  # tokens of prompts that no block in memory held
    num_store_hits: int = 0  # and those that the cache on disk held
    disk_cache: DiskCacheStats = DiskCacheStats()
    stages: StageTimes = StageTimes()
    speculation: SpeculationCounts = field(default_factory=SpeculationCounts)
