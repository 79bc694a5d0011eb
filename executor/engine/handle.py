"""A submitted request as its submitter sees it: what comes, how it ends, and how it is given up.

Knows neither the engine nor who drives it.
"""

import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from executor.engine.engine import Question
from executor.engine.outputs import Completion, Output
from executor.engine.prepare import Lane
from executor.schedule.request import Prompt, SamplingParams

Event = Output | Completion | Exception
"""What a handle tells: outputs, and in the end the completion, or what kept the request from being answered."""

Made = Question | tuple[Question, SamplingParams]


class Handle:
    """A submitted request. `on_event` is called with every Event, in one thread of the loop's; it must not raise.

    Without `on_event` events are kept for `outputs` and `result`, which wait for them.
    """

    def __init__(
        self,
        make: Callable[[], Made],
        params: SamplingParams,
        lane: Lane,
        *,
        on_event: Callable[[Event], None] | None,
        on_abort: Callable[["Handle"], None],
        deadline_s: float | None,
    ) -> None:
        self.params = params
        self.lane = lane
        self.prompt: Prompt | None = None  # once it is prepared
        self.pixel_bytes = 0  # of its media, from then on until it is begun
        self.prepare_s = 0.0
        self.completion: Completion | None = None
        self.failure: Exception | None = None
        self.refusal: Exception | None = None  # what its preparation raised
        self.request_id: str | None = None  # of the engine, once it is queued there
        self.deadline_s = deadline_s  # of time.monotonic
        self.number: int | None = None  # its loop's, where it has a deadline
        self.num_running = 0  # of its answers, those that the engine is at
        self.is_aborted = False
        self._make: Callable[[], Made] | None = make
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._on_event = on_event or self._events.put
        self._on_abort = on_abort

    @property
    def ended(self) -> bool:
        return self.completion is not None or self.failure is not None

    def abort(self) -> None:
        """From any thread: everything of it is freed within a step, and it fails with RuntimeError."""
        if not self.is_aborted and not self.ended:
            self.is_aborted = True
            self._on_abort(self)

    def outputs(self, timeout_s: float | None = None) -> Iterator[Output]:
        """Its outputs as they come. Raises what it failed with; TimeoutError when none comes for `timeout_s`."""
        while not isinstance(event := self._next(timeout_s), Completion):
            yield event

    def result(self, timeout_s: float | None = None) -> Completion:
        """Its completion; as `outputs`."""
        while not isinstance(event := self._next(timeout_s), Completion):
            pass
        return event

    def _next(self, timeout_s: float | None) -> Output | Completion:
        try:
            event = self._events.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"no output for {timeout_s} s") from None
        if isinstance(event, Exception):
            raise event
        return event

    def prepare(
        self,
        build: Callable[[Question], Prompt],
        check: Callable[[SamplingParams], None],
        fetch: Callable[[Prompt, SamplingParams], None],
    ) -> None:
        """Make its prompt, and fetch what is known of it; in a preparing thread. What goes wrong is the request's."""
        make = self._make
        if self.ended or make is None:  # given up before its turn
            return
        started = time.monotonic()
        try:
            made = make()
            if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], SamplingParams):
                made, self.params = made
            check(self.params)
            prompt = build(made)
            fetch(prompt, self.params)
            self.prompt = prompt
            self.pixel_bytes = sum(item.pixels.nbytes for item in self.prompt.media)
        except Exception as error:  # handed to whoever waits for it, as a future does
            self.refusal = error
        self._make = None  # it may hold a file's bytes
        self.prepare_s = time.monotonic() - started

    def finish(self, end: Completion | Exception) -> None:
        self.completion, self.failure = (None, end) if isinstance(end, Exception) else (end, None)
        self._make = None
        self.tell(end)

    def tell(self, event: Event) -> None:
        self._on_event(event)
