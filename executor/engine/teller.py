"""Runs tasks beside the engine's thread while that is in the model: what a step does not wait for.

Two threads take Python's lock from each other, so tasks are held back until the model computes (`release`). They run in
the order in which they were put. Without a thread of its own each runs where it is put.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

Task = Callable[[], None]


class Teller:
    """One thread puts and releases; what a task raises is kept for it (`check`), and ends no other task."""

    def __init__(self) -> None:
        self._held: list[Task] = []
        self._tasks: SimpleQueue[list[Task] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="teller", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        if self._thread is None:
            task()
        else:
            self._held.append(task)

    def release(self) -> None:
        """What was put may run."""
        if self._held:
            held, self._held = self._held, []
            self._tasks.put(held)

    def check(self) -> None:
        """Raises what a task has raised since the last time."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def stop(self) -> None:
        """Returns when all that was put has run; later tasks run where they are put."""
        if self._thread is None:
            return
        self.release()
        self._tasks.put(None)
        self._thread.join()
        self._thread = None

    def _work(self) -> None:
        while (tasks := self._tasks.get()) is not None:
            for task in tasks:
                try:
                    task()
                except Exception as error:  # raised in the engine's thread by `check`
                    self._fault = error
            del tasks, task  # they may be the last that hold a request
