"""Threads that prepare prompts, so that reading media holds no running answer up.

Each kind of work has a lane, threads of its own: a text never waits behind a picture. Decoders and resizing release
Python's lock, each thread computes with a single core, and those that decode give way to the engine's where cores are
few. Knows nothing of prompts.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal

import torch

SWITCH_S = 0.0005
"""How long a thread may keep Python's lock while another waits for it; ten times as long otherwise. A model step takes
the lock back after each of its operations."""

Lane = Literal["text", "grammar", "media"]
LANES: dict[Lane, int] = {"text": 1, "grammar": 1, "media": 2}
"""Threads of each lane. Two for media: one long video does not hold every picture up."""
NICENESS = 10  # of the media lane's threads
STOP_S = 2.0
NAME = "prepare: "  # of a thread; see executor.__main__.end


class Preparers:
    """Threads of `lanes` that run what their lane is given, in its order. What a task raises is its own affair."""

    def __init__(self, lanes: Mapping[Lane, int] = LANES) -> None:
        self._tasks: dict[Lane, SimpleQueue[Callable[[], None] | None]] = {lane: SimpleQueue() for lane in lanes}
        self._num_threads = dict(lanes)
        all_cores = torch.get_num_threads()
        ready = threading.Barrier(sum(lanes.values()) + 1)
        # Daemons: a long video does not keep a process from ending.
        self.threads = [
            threading.Thread(target=self._work, args=(lane, ready), name=f"{NAME}{lane} {number}", daemon=True)
            for lane, count in lanes.items()
            for number in range(count)
        ]
        for thread in self.threads:
            thread.start()
        ready.wait()
        self._switch_s = sys.getswitchinterval()
        atexit.register(self.stop)
        sys.setswitchinterval(min(SWITCH_S, self._switch_s))
        torch.set_num_threads(all_cores)  # what a thread sets for itself is also what later threads begin with

    def submit(self, lane: Lane, task: Callable[[], None]) -> None:
        self._tasks[lane].put(task)

    def stop(self) -> None:
        """Ends the threads after the task each is at; what is queued is not begun. Waits `STOP_S` at most.

        A thread that comes back from C++ while the interpreter is being taken down aborts the process.
        """
        for lane, tasks in self._tasks.items():
            with suppress(Empty):
                while True:
                    tasks.get_nowait()
            for _ in range(self._num_threads[lane]):
                tasks.put(None)
        limit_s = time.monotonic() + STOP_S
        for thread in self.threads:
            thread.join(max(0.0, limit_s - time.monotonic()))
        sys.setswitchinterval(self._switch_s)
        atexit.unregister(self.stop)

    def _work(self, lane: Lane, ready: threading.Barrier) -> None:
        torch.get_num_threads()  # a thread's first parallel operation takes what was last set anywhere: be done with it
        torch.set_num_threads(1)
        if lane == "media" and sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        tasks = self._tasks[lane]
        ready.wait()
        while (task := tasks.get()) is not None:
            task()
            del task  # it may be the last that holds a picture, an engine, a model
