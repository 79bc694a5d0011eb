"""Who answers an `Ask`: this process's engine here, others behind the same four names.

A backend's `ask` returns a Feed at once or raises QueueFull; what goes wrong later is the feed's Failure.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from executor.engine.disk_cache.stats import DiskCacheStats
from executor.engine.engine import Question
from executor.engine.handle import Event as LoopEvent
from executor.engine.handle import Handle
from executor.engine.logprobs import TokenLogprobs
from executor.engine.loop import EngineLoop, Stopped
from executor.engine.outputs import Completion, Output
from executor.engine.prepare import Lane
from executor.errors import UserError
from executor.media.fetch import Unreachable
from executor.schedule.request import Prompt, is_own_fault
from executor.schedule.scheduler import no_room
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, EngineStats, Event, Failure, TextPrompt, TokenInfo
from executor.serve.feed import Crossing, Feed


class Backend(Protocol):
    """Answers requests. All of it is called in the event loop's thread."""

    @property
    def num_unfinished(self) -> int:
        """Requests that it has and has not answered."""

    @property
    def fault(self) -> str | None:
        """Why it answers nothing any more."""

    def stats(self) -> EngineStats:
        """Of all its engines."""

    def ask(self, ask: Ask) -> Feed:
        """Raises executor.engine.loop.QueueFull, and RuntimeError when it has ended."""


class _EngineFeed(Feed):
    """Takes a handle's events as they are: what they are in plain data is found out beside the engine's thread."""

    handle: Handle

    def push(self, event: LoopEvent | Event) -> None:
        super().push(event if isinstance(event, Delta | Done | Failure) else plain_event(event, self.handle))


class EngineBackend:
    """The engine of this process, driven by `loop`'s thread."""

    def __init__(self, loop: EngineLoop, event_loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._crossing = Crossing(event_loop)

    @property
    def num_unfinished(self) -> int:
        return self.loop.num_unfinished

    @property
    def fault(self) -> str | None:
        return None if self.loop.fault is None else str(self.loop.fault)

    def stats(self) -> EngineStats:
        scheduler, clock = self.loop.engine.scheduler, self.loop.engine.runner.clock
        num_running = scheduler.num_running
        queries, hits = scheduler.encoder_queries
        disk_cache = self.loop.engine.runner.disk_cache
        return EngineStats(
            num_running=num_running,
            num_waiting=max(0, self.num_unfinished - num_running),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_blocks - scheduler.pool.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_encoder_queries=queries,
            num_encoder_hits=hits,
            num_store_queries=scheduler.num_store_queries,
            num_store_hits=scheduler.num_store_hits,
            disk_cache=DiskCacheStats() if disk_cache is None else disk_cache.stats(),
            stages=clock.times(),
            speculation=self.loop.engine.speculation,
        )

    def ask(self, ask: Ask) -> Feed:
        feed = _EngineFeed()
        feed.handle = self.loop.submit(
            partial(self._make, ask), ask.params, lane=lane_of(ask), on_event=partial(self._crossing.put, feed),
            timeout_s=ask.timeout_s,
        )  # fmt: skip
        feed.abort = feed.handle.abort
        return feed

    def _make(self, ask: Ask) -> Question:
        """Runs in a preparing thread."""
        engine = self.loop.engine
        prompt = build_prompt(engine.processor, ask)
        room_tokens = engine.scheduler.max_model_len - len(prompt.token_ids)
        wanted_tokens = ask.params.max_new_tokens if ask.fits_exactly else ask.params.min_new_tokens
        if room_tokens <= 0:
            raise no_room(prompt, engine.scheduler.max_model_len, ask.prompt_field)
        if wanted_tokens > room_tokens:
            raise UserError(
                f"this model's maximum context length is {engine.scheduler.max_model_len} tokens, requested "
                f"{len(prompt.token_ids) + wanted_tokens}: {len(prompt.token_ids)} of the prompt and "
                f"{'' if ask.fits_exactly else 'at least '}{wanted_tokens} of the answer; shorten the prompt or ask "
                "for fewer tokens",
                where=ask.limit_field if ask.fits_exactly else "min_tokens",
            )
        return prompt


def lane_of(ask: Ask) -> Lane:
    """What its preparation takes: media are whatever a message holds beside text."""
    prompt = ask.prompt
    if isinstance(prompt, TextPrompt) and prompt.media:
        return "media"
    if isinstance(prompt, ChatPrompt):
        contents = [message.get("content") for message in prompt.messages if isinstance(message, Mapping)]
        parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
        if any(isinstance(part, Mapping) and part.get("type", "text" if "text" in part else None) != "text"
               for part in parts):  # fmt: skip
            return "media"
    return "text" if ask.params.grammar is None else "grammar"


def build_prompt(processor: Any, ask: Ask) -> Prompt:
    """The prompt of an ask. Raises UserError."""
    prompt = ask.prompt
    if isinstance(prompt, ChatPrompt):
        return processor.build(
            prompt.messages,
            tools=prompt.tools or None,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            chat_template_kwargs=prompt.template_kwargs or None,
            media_options=prompt.media_options or None,
        )
    if isinstance(prompt, TextPrompt):
        return processor.build_text(prompt.text, prompt.media, media_options=prompt.media_options or None)
    return processor.build_tokens(prompt.token_ids)


def _token_info(x: TokenLogprobs) -> TokenInfo:
    return TokenInfo(x.token_id, x.logprob, x.top, x.rank)


def plain_event(event: LoopEvent, handle: Handle) -> Event:
    """What a handle tells, as plain data; maybe later than it was told, when more has become of the request."""
    if isinstance(event, Output):
        request = event.request
        return Delta(
            index=event.index,
            text=event.text_delta,
            token_ids=event.token_ids,
            num_prompt_tokens=len(request.prompt.token_ids),
            num_cached_tokens=request.num_cached_tokens,
            logprobs=tuple(map(_token_info, event.logprobs)),
            finish_reason=event.finish_reason and event.finish_reason.value,
            stop_reason=request.stop_reason if event.finished else None,
            error=event.error if event.finished else None,
            is_own_fault=event.finished and event.error is not None and is_own_fault(event.error),
            prompt_logprobs=event.prompt_logprobs and tuple(x and _token_info(x) for x in event.prompt_logprobs),
        )
    if isinstance(event, Completion):
        return Done(
            num_prompt_tokens=event.prompt_tokens,
            num_vision_tokens=event.vision_tokens,
            num_cached_tokens=event.cached_tokens,
            num_output_tokens=event.completion_tokens,
            prepare_s=handle.prepare_s,
            ttft_s=event.ttft_s,
            tpot_s=event.tpot_s,
            e2e_s=event.e2e_s,
            finish_reasons=tuple(reason.value for reason in event.finish_reasons),
        )
    if isinstance(event, UserError):
        kind = "unreachable" if isinstance(event, Unreachable) else "refused"
        return Failure(kind, str(event), event.where)
    if isinstance(event, TimeoutError):
        return Failure("late", str(event))
    if isinstance(event, Stopped):
        return Failure("lost", str(event))
    if handle.is_aborted:
        return Failure("aborted", str(event))
    return Failure("fault", f"{type(event).__name__}: {event}")
