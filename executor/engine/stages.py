"""Where the time goes: the named stages of answering requests, and the host's seconds in each.

media     fetching, reading, decoding and resizing pictures and videos, in the threads that prepare prompts
vision    the encoder's passes over pictures and videos
prefill   the text model, in steps in which some prompt has more than one token
decode    the text model, in the other steps
sampling  from logits to tokens on the host
draft     making drafts of the next tokens: where they are looked up, or all that a draft model computes
host      what else the thread of the steps does: planning, gathering inputs, bookkeeping, texts and events

Stages of the steps' thread do not overlap: a stage inside another one takes its time from it, so that all but media add
up to what the steps took. Media, and texts that a thread makes beside the model, run meanwhile.
These are the host's times, and nothing waits for a device to measure them. A device that computes behind the host's
back (an NPU) goes on after a stage: its vision is what launching takes, and what the host waits for tokens is part of
prefill and decode there, none of sampling.
Knows no model, no plan and no profiler: whoever wants the stages as spans hands in what makes one.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

from executor.engine.totals import Totals

Stage = Literal["media", "vision", "prefill", "decode", "sampling", "draft", "host"]
STAGES: tuple[Stage, ...] = ("media", "vision", "prefill", "decode", "sampling", "draft", "host")

Span = Callable[[str], AbstractContextManager]
"""Makes what is entered for the time of a stage, by its name: torch.profiler.record_function."""


@dataclass(frozen=True, slots=True)
class StageTimes(Totals):
    """Seconds in each stage since the engine was made, and how many steps there were. See the module."""

    media_s: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sampling_s: float = 0.0
    draft_s: float = 0.0
    host_s: float = 0.0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0

    def by_stage(self) -> dict[Stage, float]:
        """Seconds of every stage, in the order of STAGES."""
        return {stage: getattr(self, f"{stage}_s") for stage in STAGES}


class StageClock:
    """Adds up the time of stages. `stage` is for the thread of the steps, `beside` for any other."""

    def __init__(self) -> None:
        self.span: Span | None = None  # while stages are to be spans of a profile
        self.num_prefill_steps = 0
        self.num_decode_steps = 0
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._since = 0.0  # when the innermost stage was entered, or come back to
        self._open: list[tuple[Stage, AbstractContextManager | None]] = []
        self._stages: dict[tuple[Stage, Stage], _Stage] = {}
        self._lock = threading.Lock()
        self._beside = dict.fromkeys(STAGES, 0.0)

    def stage(self, name: Stage, booked: Stage | None = None) -> "_Stage":
        """Entered for the time of a stage; what is entered inside it counts for itself.

        `booked`: the stage that the time belongs to, where it is another one; a span has `name`.
        """
        key = name, booked or name
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = _Stage(self, *key)
        return found

    @contextmanager
    def beside(self, name: Stage) -> Iterator[None]:
        """Entered for the time of a stage by any thread; no other stage loses the time."""
        span = None if self.span is None else self.span(name)
        started = time.perf_counter()
        try:
            if span is None:
                yield
            else:
                with span:
                    yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._beside[name] += seconds

    def times(self) -> StageTimes:
        """What has been added up; a stage that is open counts up to its last change."""
        seconds = {f"{stage}_s": self._seconds[stage] + self._beside[stage] for stage in STAGES}
        return StageTimes(**seconds, num_prefill_steps=self.num_prefill_steps, num_decode_steps=self.num_decode_steps)


class _Stage:
    """One of a clock's stages; may be entered again inside itself."""

    __slots__ = ("_booked", "_clock", "_name")

    def __init__(self, clock: StageClock, name: Stage, booked: Stage) -> None:
        self._clock, self._name, self._booked = clock, name, booked

    def __enter__(self) -> None:
        clock, now = self._clock, time.perf_counter()
        if clock._open:
            clock._seconds[clock._open[-1][0]] += now - clock._since
        span = None if clock.span is None else clock.span(self._name)
        clock._open.append((self._booked, span))
        clock._since = now
        if span is not None:
            span.__enter__()

    def __exit__(self, *exception: object) -> None:
        clock, now = self._clock, time.perf_counter()
        booked, span = clock._open.pop()
        clock._seconds[booked] += now - clock._since
        clock._since = now
        if span is not None:
            span.__exit__(*exception)
