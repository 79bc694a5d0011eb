"""Requests from any thread, prepared by threads beside the engine and answered by one that steps it.

A submitted question waits in its lane until the engine has room for it, is prepared (media read, decoded, resized),
queued and answered. Whoever drives the loop calls `turn` again and again, or lets a thread do so: `start`. What a turn
costs beside its step does not grow with the number of requests that wait.
Invariants: every handle ends, with a completion or a failure, and says so once; a request's failure is its own. Only
the driving thread touches the engine. A thread of the loop's leaves
texts and events to a second one, which makes them while the model computes; in `turn` alone they are made at once.
Knows no HTTP and no files: how a prompt is made is the submitter's.
"""

import atexit
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from executor.engine.engine import Engine, Question
from executor.engine.handle import Event, Handle, Made
from executor.engine.lanes import Lanes
from executor.engine.outputs import Collector
from executor.engine.prepare import Lane, Preparers
from executor.engine.teller import Teller
from executor.engine.writing import Piece
from executor.errors import UserError
from executor.schedule.request import Prompt, SamplingParams

logger = logging.getLogger(__name__)

MAX_AHEAD = 2  # prompts kept ready beyond those being answered
SHARED_WAIT_S = 0.005  # between empty steps, where other replicas need this one's
MAX_STALE = 1000  # deadlines that are kept of requests that have ended, beyond those of unfinished ones
MAX_FAULTS = 3  # steps that fail one after another until a thread gives the engine up


class QueueFull(RuntimeError):
    """As many requests are unfinished as are allowed."""


class Stopped(RuntimeError):
    """The request was not answered because the loop was stopped."""


class EngineLoop:
    """Drives an engine that is its caller's. Use it as a context manager: what is unfinished at the end is aborted."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_ahead: int = MAX_AHEAD,
        max_unfinished: int | None = None,
    ) -> None:
        self.engine = engine
        self._max_unfinished = max_unfinished
        self._preparers = Preparers()
        self._lock = threading.Lock()  # of the four below
        self._lanes = Lanes(engine.scheduler.max_num_seqs + max_ahead, max_ahead)
        self._unfinished: set[Handle] = set()
        self._deadlines: list[tuple[float, int]] = []  # a heap: (when, number of a request); those that ended too
        self._timed: dict[int, Handle] = {}  # unfinished ones with a deadline
        self._numbers = itertools.count()
        self._aborted: deque[Handle] = deque()
        self._prepared: deque[Handle] = deque()
        self._running: dict[str, Handle] = {}
        self._teller = Teller()
        self._collector = Collector()  # the teller's, but for what it expects
        self._awake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_stopping = False  # takes no new requests
        self._is_aborting = False  # and answers those it has no more
        self._num_faults = 0  # steps that failed since one did not
        self.fault: Exception | None = None  # what has ended the thread

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(
        self,
        question: Question | Callable[[], Made],
        params: SamplingParams,
        *,
        lane: Lane | None = None,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
    ) -> Handle:
        """Hand in a question, or what makes one, or one and its parameters, in a preparing thread; from any thread.

        `lane`: what making it takes; None: nothing for a prompt or a text, media for whatever else.
        `timeout_s`: it fails with TimeoutError when it is not answered by then. Raises QueueFull, and RuntimeError
        when the loop has ended.
        """
        handle = Handle(
            question if callable(question) else lambda: question,
            params,
            lane or ("text" if isinstance(question, Prompt | str) else "media"),
            on_event=on_event,
            on_abort=self._note_abort,
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
        )
        with self._lock:
            if self._is_stopping or self.fault is not None:
                raise RuntimeError(f"the engine takes no requests any more: {self.fault or 'it is being stopped'}")
            if self._max_unfinished is not None and len(self._unfinished) >= self._max_unfinished:
                raise QueueFull(f"{self._max_unfinished} requests are unfinished, which is as many as are allowed")
            self._unfinished.add(handle)
            self._lanes.add(handle)
            if handle.deadline_s is not None:
                number = next(self._numbers)
                heapq.heappush(self._deadlines, (handle.deadline_s, number))
                self._timed[number] = handle
                handle.number = number
        self.wake()
        return handle

    def wake(self) -> None:
        """There is something new for the driving thread."""
        self._awake.set()

    def _note_abort(self, handle: Handle) -> None:
        self._aborted.append(handle)
        self.wake()

    def _prepare(self, handle: Handle) -> None:
        """In a preparing thread."""
        handle.prepare(self.engine.prompt, self.engine.check, self.engine.fetch)
        with self._lock:
            self._lanes.prepared(handle)
        self._prepared.append(handle)
        self.wake()
        self._start_preparing()  # the step that runs now may be a long one

    def turn(self, wait_s: float = 1.0) -> list[Handle]:
        """Take in what is new and run one step, or wait up to `wait_s` for something to do. In one thread only.

        Returns the handles that have ended. Raises what a step raises that is no single request's fault.
        """
        self._awake.clear()
        self._teller.check()
        self.engine.runner.begin_profile()
        with self.engine.runner.clock.stage("host"):
            ended = [*self._drop(), *self._queue_prepared()]
            self._start_preparing()
            is_idle = not self._running and not ended
            if self._running:
                ended += self._hand_out(self.engine.advance())
                self._num_faults = 0
        if is_idle:
            self._wait(wait_s)
        if not self._running:
            self._teller.release()
        return ended

    def _wait(self, most_s: float) -> None:
        """Until there is something new; other replicas that need this one are helped between."""
        if self.engine.replica.in_step:
            self._awake.wait(min(self._patience_s(most_s), SHARED_WAIT_S))
            self.engine.step()
        else:
            self._awake.wait(self._patience_s(most_s))

    def _patience_s(self, most_s: float) -> float:
        """At most until the next deadline."""
        with self._lock:
            if not self._deadlines:
                return most_s
            return max(0.0, min(most_s, self._deadlines[0][0] - time.monotonic()))

    def start(self) -> "EngineLoop":
        """Drive it in a thread of its own until `stop`."""
        self._teller.start()
        self.engine.runner.meanwhile = self._teller.release
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a step that is cut off by the interpreter's end aborts the process
        return self

    def stop(self, *, drain: bool = False, timeout_s: float | None = None, patience_s: float | None = None) -> bool:
        """Take nothing new, answer what is unfinished (`drain`) or abort it, and end all threads.

        `timeout_s`: what is not answered by then is aborted. `patience_s`: how long a step that is under way may take;
        False where it goes on then: the engine must be left alone, and ends with the process.
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
        self._is_aborting = True
        self.wake()
        if self._thread is not None:
            self._thread.join(patience_s)
        atexit.unregister(self.stop)
        if self._thread is not None and self._thread.is_alive():
            return False
        self._end()
        return True

    def __enter__(self) -> "EngineLoop":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _drive(self) -> None:
        try:
            while not (self._is_aborting or (self._is_stopping and not self._unfinished)):
                try:
                    self.turn(0.2)
                except Exception as error:  # the thread's end would leave everybody waiting
                    self._num_faults += 1
                    logger.exception("a step of the engine failed")
                    # Other ranks of the same step may be anywhere in it.
                    if not self.engine.replica.is_alone:
                        self.fault = error
                        break
                    for handle in list(self._running.values()):
                        self._end_handle(handle, RuntimeError(f"the step failed: {type(error).__name__}: {error}"))
                    if self._num_faults == MAX_FAULTS:
                        self.fault = error
                        break
        finally:
            if not self._is_stopping and self.fault is None:
                self.fault = RuntimeError("its thread has ended")
            self._end()

    def _end(self) -> None:
        """Abort what is left, and let the preparing threads go. By the thread of the steps, or after it."""
        self.engine.runner.end_profile()
        with self._lock:
            self._is_stopping = True
            left = list(self._unfinished)
        for handle in left:
            words = f"the engine has ended: {self.fault}" if self.fault else "the engine is being stopped"
            self._end_handle(handle, Stopped(f"the request was aborted: {words}"))
        self._teller.stop()
        self.engine.runner.meanwhile = None
        self._preparers.stop()

    def _drop(self) -> list[Handle]:
        """End what was aborted or has waited too long."""
        ended = []
        while self._aborted:
            handle = self._aborted.popleft()
            if handle in self._unfinished:
                ended.append(self._end_handle(handle, RuntimeError("the request was aborted")))
        now_s, late = time.monotonic(), []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] <= now_s:
                handle = self._timed.get(heapq.heappop(self._deadlines)[1])
                if handle is not None:
                    late.append(handle)
            if len(self._deadlines) > 2 * len(self._timed) + MAX_STALE:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._timed]
                heapq.heapify(self._deadlines)
        for handle in late:
            reason = TimeoutError("the request was not answered in the time that it had")
            ended.append(self._end_handle(handle, reason))
        return ended

    def _start_preparing(self) -> None:
        with self._lock:
            for handle in self._lanes.take():
                self._preparers.submit(handle.lane, lambda handle=handle: self._prepare(handle))

    def _queue_prepared(self) -> list[Handle]:
        ended = []
        while self._prepared:
            handle = self._prepared.popleft()
            if handle not in self._unfinished:  # aborted meanwhile
                self._release(handle)
                continue
            refusal = handle.refusal
            try:
                if refusal is None:
                    handle.request_id = self.engine.add(handle.prompt, handle.params)
            except UserError as error:
                refusal = error
            if refusal is not None:
                self._release(handle)
                ended.append(self._end_handle(handle, refusal))
                continue
            self._running[handle.request_id] = handle
            handle.num_running = handle.params.n
            self._collector.expect(handle.request_id, handle.params.n)
        return ended

    def _hand_out(self, pieces: list[Piece]) -> list[Handle]:
        """Pieces to their handles, beside the next step. Returns the handles that end with these."""
        told, ended = [(self._running[piece.answer.parent_id], piece) for piece in pieces], []
        for handle, piece in told:
            if handle.pixel_bytes:
                with self._lock:
                    self._lanes.begun(handle)
            if piece.finish_reason is not None:
                handle.num_running -= 1
                if not handle.num_running:
                    self._leave(handle)
                    ended.append(handle)
        self._teller.put(partial(self._tell, told))
        return ended

    def _tell(self, told: list[tuple[Handle, Piece]]) -> None:
        """By the teller: the texts of pieces, and the completions that these complete."""
        try:
            for handle, piece in told:
                output = piece.written()
                handle.tell(output)
                completion = self._collector.take(output)
                if completion is not None:
                    handle.finish(completion)
        except Exception as error:
            for handle, _ in told:  # some have ended for the engine, which will not name them again
                self._finish(handle, RuntimeError(f"the step failed: {type(error).__name__}: {error}"))
            raise

    def _end_handle(self, handle: Handle, end: Exception) -> Handle:
        """The request is not answered, or no further."""
        if handle.request_id in self._running:
            self.engine.abort(handle.request_id)
        self._leave(handle)
        self._teller.put(partial(self._finish, handle, end))
        return handle

    def _finish(self, handle: Handle, end: Exception) -> None:
        """By the teller."""
        if handle.request_id is not None:
            self._collector.forget(handle.request_id)
        if not handle.ended:
            handle.finish(end)

    def _leave(self, handle: Handle) -> None:
        """The engine has done with it."""
        if self._running.pop(handle.request_id, None) is not None:
            self._release(handle)
        with self._lock:
            self._unfinished.discard(handle)
            self._lanes.discard(handle)
            self._timed.pop(handle.number, None)

    def _release(self, handle: Handle) -> None:
        with self._lock:
            self._lanes.release(handle)
