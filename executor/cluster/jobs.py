"""The jobs of a command on a cluster: each is started, watched, and started again when it ends before its time.

An end is a fault of the whole command until its owner says that they are up, and whenever a job's first start finds a
mistake of the user's (a node without the weights, say). Else it is that job's alone.
Knows no Ray (a `Cluster` starts jobs) and nothing of what jobs answer.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from executor.cluster.process import End
from executor.errors import UserError

logger = logging.getLogger(__name__)

LOOK_S = 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 60.0
"""A job that has lived for so long is started again without a pause."""
REMIND_S = 20.0


class Job(Protocol):
    """A job on some node. All of it may block, and raises OSError where the node is gone."""

    log: str

    def end(self) -> End | None:
        """None while it runs."""

    def stop(self, patience_s: float) -> None:
        """Make an end of it, after having waited for its own."""


class Cluster(Protocol):
    """Where jobs run."""

    def start(self, number: int, command: str, variables: Mapping[str, str]) -> Job:
        """Blocks until there is room for it, or `abandon` was called: OSError then."""

    def abandon(self) -> None:
        """Nothing is started any more."""


class Jobs:
    """`num_jobs` jobs of one command, numbered from 0. `on_end` hears, in some thread, of every end but the last."""

    def __init__(
        self,
        cluster: Cluster,
        num_jobs: int,
        command: str,
        variables: Mapping[str, str],
        on_end: Callable[[int, End], None],
    ) -> None:
        self._cluster, self._command, self._variables, self._on_end = cluster, command, variables, on_end
        self._stopping = threading.Event()
        self._patience_s = 0.0
        self.are_up = False  # set by the owner: from here on a job's death is no fault of the command
        self._fault: End | None = None
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"job {number}", daemon=True)
            for number in range(num_jobs)
        ]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raises what keeps the command from starting: UserError, or RuntimeError."""
        if self._fault is not None:
            if self._fault.status == 2:
                raise UserError(self._fault.words)
            raise RuntimeError("\n  | ".join((self._fault.words, *self._fault.tail)))

    def stop(self, patience_s: float) -> None:
        """Wait for their ends, which they have been asked for, and end what is still there after `patience_s`."""
        self._patience_s = patience_s
        self._stopping.set()
        self._cluster.abandon()
        for thread in self._threads:
            thread.join()

    def _keep(self, number: int) -> None:
        pause_s, is_first = FIRST_PAUSE_S, True
        while not self._stopping.is_set():
            started_s = time.monotonic()
            end = self._run(number)
            if self._stopping.is_set():
                return
            if not self.are_up or (is_first and end.status == 2):
                self._fault = self._fault or End(end.status, f"job {number}: {end.words}", end.tail)
                self._on_end(number, end)
                return
            logger.warning("job %d has ended and is started again: %s", number, "\n  | ".join((end.words, *end.tail)))
            self._on_end(number, end)
            is_first = False
            pause_s = FIRST_PAUSE_S if time.monotonic() - started_s > STEADY_S else min(LONGEST_PAUSE_S, 2 * pause_s)
            self._stopping.wait(pause_s)

    def _run(self, number: int) -> End:
        try:
            job = self._cluster.start(number, self._command, self._variables | {"RECIPE_REPLICA": str(number)})
            logger.info("job %d: its log is %s", number, job.log)
            while not self._stopping.wait(LOOK_S):
                if (end := job.end()) is not None:
                    return end
            job.stop(self._patience_s)
        except OSError as error:
            return End(None, str(error))
        return End(0, "was stopped")
