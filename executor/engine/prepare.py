"""Threads that prepare prompts, so that reading media holds no running answer up.

Decoders and resizing release Python's lock, and each thread computes with a single core: with a core to spare the
engine's own go on at their pace. Knows nothing of prompts.
"""

import atexit
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch

SWITCH_S = 0.0005
"""How long a thread may keep Python's lock while another waits for it; ten times as long otherwise. A model step takes
the lock back after each of its operations."""

STOP_S = 2.0
NAME = "prepare: "  # of a thread; see executor.__main__.end


class Preparers:
    """`num_threads` threads that run what they are given, in its order. What a task raises is the task's own affair."""

    def __init__(self, num_threads: int) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        all_cores = torch.get_num_threads()
        ready = threading.Barrier(num_threads + 1)
        # Daemons: a long video does not keep a process from ending.
        self.threads = [
            threading.Thread(target=self._work, args=(ready,), name=f"{NAME}{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()
        ready.wait()
        self._switch_s = sys.getswitchinterval()
        atexit.register(self.stop)
        sys.setswitchinterval(min(SWITCH_S, self._switch_s))
        torch.set_num_threads(all_cores)  # what a thread sets for itself is also what later threads begin with

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def stop(self) -> None:
        """Ends the threads after the task each is at; what is queued is not begun. Waits `STOP_S` at most.

        A thread that comes back from C++ while the interpreter is being taken down aborts the process.
        """
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self.threads:
            self._tasks.put(None)
        limit_s = time.monotonic() + STOP_S
        for thread in self.threads:
            thread.join(max(0.0, limit_s - time.monotonic()))
        sys.setswitchinterval(self._switch_s)
        atexit.unregister(self.stop)

    def _work(self, ready: threading.Barrier) -> None:
        torch.get_num_threads()  # a thread's first parallel operation takes what was last set anywhere: be done with it
        torch.set_num_threads(1)
        ready.wait()
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it may be the last that holds a picture, an engine, a model
