"""Requests from any thread, prepared by threads beside the engine and answered by one that steps it.

A submitted question waits until the engine has room for it, is prepared (media read, decoded, resized), queued and
answered. At most `max_ahead` requests more than can run are prepared or queued at a time: pixels take memory. Whoever
drives the loop calls `turn` again and again, or lets a thread do so: `start`.
Invariants: every handle ends, with a completion or a failure, and says so once; a request's failure is its own. Only
the driving thread touches the engine.
Knows no HTTP and no files: how a prompt is made is the submitter's.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from executor.engine.engine import Engine, Question
from executor.engine.outputs import Collector, Completion, Output
from executor.engine.prepare import Preparers
from executor.errors import UserError
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)

MAX_AHEAD = 2  # prompts kept ready beyond those being answered
NUM_PREPARERS = 1
SHARED_WAIT_S = 0.005  # between empty steps, where other replicas need this one's
MAX_FAULTS = 3  # steps that fail one after another until a thread gives the engine up

Event = Output | Completion | Exception
"""What a handle tells: outputs, and in the end the completion, or what kept the request from being answered."""


class QueueFull(RuntimeError):
    """As many requests are unfinished as are allowed."""


class Handle:
    """A submitted request. `on_event` is called with every Event, in the driving thread; it must not raise.

    Without `on_event` events are kept for `outputs` and `result`, which wait for them.
    """

    def __init__(
        self,
        loop: "EngineLoop",
        make: Callable[[], Question | tuple[Question, SamplingParams]],
        params: SamplingParams,
        on_event: Callable[[Event], None] | None,
        deadline_s: float | None,
    ) -> None:
        self.params = params
        self.prompt: Prompt | None = None  # once it is prepared
        self.prepare_s = 0.0
        self.completion: Completion | None = None
        self.failure: Exception | None = None
        self.refusal: Exception | None = None  # what its preparation raised
        self.request_id: str | None = None  # of the engine, once it is queued there
        self.deadline_s = deadline_s  # of time.monotonic
        self.is_aborted = False
        self._loop = loop
        self._make = make
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._on_event = on_event or self._events.put

    @property
    def ended(self) -> bool:
        return self.completion is not None or self.failure is not None

    def abort(self) -> None:
        """From any thread: everything of it is freed within a step, and it fails with RuntimeError."""
        self.is_aborted = True
        self._loop.wake()

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

    def prepare(self, build: Callable[[Question], Prompt]) -> None:
        """Make its prompt; in a thread of the pool. What goes wrong is this request's."""
        started = time.monotonic()
        try:
            made = self._make()
            if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], SamplingParams):
                made, self.params = made
            self._loop.engine.check(self.params)
            self.prompt = build(made)
        except Exception as error:  # handed to whoever waits for it, as a future does
            self.refusal = error
        self.prepare_s = time.monotonic() - started
        self._loop.prepared(self)

    def finish(self, end: Completion | Exception) -> None:
        self.completion, self.failure = (None, end) if isinstance(end, Exception) else (end, None)
        self.tell(end)

    def tell(self, event: Event) -> None:
        self._on_event(event)


class EngineLoop:
    """Drives an engine that is its caller's. Use it as a context manager: what is unfinished at the end is aborted."""

    def __init__(
        self,
        engine: Engine,
        *,
        num_preparers: int = NUM_PREPARERS,
        max_ahead: int = MAX_AHEAD,
        max_unfinished: int | None = None,
    ) -> None:
        self.engine = engine
        self._max_taken = engine.scheduler.max_num_seqs + max_ahead
        self._max_unfinished = max_unfinished
        self._preparers = Preparers(num_preparers)
        self._lock = threading.Lock()  # of the two sets below
        self._waiting: deque[Handle] = deque()
        self._unfinished: set[Handle] = set()
        self._prepared: deque[Handle] = deque()
        self._num_taken = 0  # being prepared, or in the engine
        self._running: dict[str, Handle] = {}
        self._collector = Collector()
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._num_faults = 0  # steps that failed since one did not
        self.fault: Exception | None = None  # what has ended the thread

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(
        self,
        question: Question | Callable[[], Question | tuple[Question, SamplingParams]],
        params: SamplingParams,
        *,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
    ) -> Handle:
        """Hand in a question, or what makes one, or one and its parameters, in a preparing thread; from any thread.

        `timeout_s`: it fails with TimeoutError when it is not answered by then. Raises QueueFull, and RuntimeError
        when the loop has ended.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        handle = Handle(self, question if callable(question) else lambda: question, params, on_event, deadline_s)
        with self._lock:
            if self._is_stopping or self.fault is not None:
                raise RuntimeError(f"the engine takes no requests any more: {self.fault or 'it is being stopped'}")
            if self._max_unfinished is not None and len(self._unfinished) >= self._max_unfinished:
                raise QueueFull(f"{self._max_unfinished} requests are unfinished, which is as many as are allowed")
            self._unfinished.add(handle)
            self._waiting.append(handle)
        self.wake()
        return handle

    def wake(self) -> None:
        """There is something new for the driving thread."""
        self._awake.set()

    def prepared(self, handle: Handle) -> None:
        self._prepared.append(handle)
        self.wake()

    def turn(self, wait_s: float = 1.0) -> list[Handle]:
        """Take in what is new and run one step, or wait up to `wait_s` for something to do. In one thread only.

        Returns the handles that have ended. Raises what a step raises that is no single request's fault.
        """
        self._awake.clear()
        ended = [*self._drop(), *self._queue_prepared()]
        self._start_preparing()
        if self.engine.has_work:
            ended += self._deliver(self.engine.step())
            self._num_faults = 0
        elif not ended and self.engine.replica.in_step:
            self._awake.wait(min(wait_s, SHARED_WAIT_S))
            self.engine.step()
        elif not ended:
            self._awake.wait(wait_s)
        return ended

    def start(self) -> "EngineLoop":
        """Drive it in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a step that is cut off by the interpreter's end aborts the process
        return self

    def stop(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Take nothing new, answer what is unfinished (`drain`) or abort it, and end all threads.

        `timeout_s`: what is not answered by then is aborted.
        """
        with self._lock:
            self._is_stopping = True
        limit_s = None if timeout_s is None else time.monotonic() + timeout_s
        while drain and self._unfinished and (limit_s is None or time.monotonic() < limit_s):
            if self._thread is None:
                self.turn(0.05)
            elif not self._thread.is_alive():
                break
            else:
                time.sleep(0.01)
        for handle in list(self._unfinished):
            handle.abort()
        if self._thread is not None:
            self._thread.join()
        self._end()
        atexit.unregister(self.stop)

    def __enter__(self) -> "EngineLoop":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _drive(self) -> None:
        while not (self._is_stopping and not self._unfinished):
            try:
                self.turn(0.2)
            except Exception as error:  # the thread's end would leave everybody waiting
                self._num_faults += 1
                logger.exception("a step of the engine failed")
                for request_id, handle in list(self._running.items()):
                    self.engine.abort(request_id)
                    self._end_handle(handle, RuntimeError(f"the step failed: {type(error).__name__}: {error}"))
                if self._num_faults == MAX_FAULTS:
                    self.fault = error
                    break
        self._end()

    def _end(self) -> None:
        """Abort what is left, and let the preparing threads go."""
        for request_id in list(self._running):
            self.engine.abort(request_id)
        for handle in list(self._unfinished):
            self._end_handle(handle, RuntimeError(f"the engine was stopped: {self.fault or 'aborted'}"))
        self._preparers.stop()

    def _drop(self) -> list[Handle]:
        """End what was aborted or has waited too long."""
        now_s, ended = time.monotonic(), []
        for handle in list(self._unfinished):
            is_late = handle.deadline_s is not None and now_s >= handle.deadline_s
            if not handle.is_aborted and not is_late:
                continue
            if handle.request_id is not None:
                self.engine.abort(handle.request_id)
            reason = RuntimeError("the request was aborted")
            if is_late:
                reason = TimeoutError("the request was not answered in the time that it had")
            ended.append(self._end_handle(handle, reason))
        return ended

    def _start_preparing(self) -> None:
        with self._lock:
            while self._waiting and self._num_taken < self._max_taken:
                handle = self._waiting.popleft()
                if not handle.ended:
                    self._num_taken += 1
                    self._preparers.submit(lambda handle=handle: handle.prepare(self.engine.prompt))

    def _queue_prepared(self) -> list[Handle]:
        ended = []
        while self._prepared:
            handle = self._prepared.popleft()
            if handle not in self._unfinished:  # aborted meanwhile
                self._num_taken -= 1
                continue
            refusal = handle.refusal
            try:
                if refusal is None:
                    handle.request_id = self.engine.add(handle.prompt, handle.params)
            except UserError as error:
                refusal = error
            if refusal is not None:
                self._num_taken -= 1
                ended.append(self._end_handle(handle, refusal))
                continue
            self._running[handle.request_id] = handle
            self._collector.expect(handle.request_id, handle.params.n)
        return ended

    def _deliver(self, outputs: list[Output]) -> list[Handle]:
        """Outputs to their handles."""
        ended = []
        for output in outputs:
            handle = self._running[output.request_id]
            handle.tell(output)
            completion = self._collector.take(output)
            if completion is not None:
                ended.append(self._end_handle(handle, completion))
        return ended

    def _end_handle(self, handle: Handle, end: Completion | Exception) -> Handle:
        if self._running.pop(handle.request_id, None) is not None:
            self._num_taken -= 1
            self._collector.forget(handle.request_id)
        with self._lock:
            self._unfinished.discard(handle)
        handle.finish(end)
        return handle
