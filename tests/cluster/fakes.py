"""A cluster whose jobs are threads of the test's process."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from executor.cluster.process import End


@dataclass
class FakeJob:
    """Runs until its body ends, `die` is called, or its node vanishes."""

    number: int
    variables: Mapping[str, str]
    log: str = "the log of a thread"
    ended: End | None = None
    is_gone: bool = False
    dying: threading.Event = field(default_factory=threading.Event)  # its body looks at it

    def end(self) -> End | None:
        if self.is_gone:
            raise OSError("the node is gone")
        return self.ended

    def die(self, words: str = "was killed by signal 9", status: int = -9) -> None:
        self.ended = End(status, words, ("a last line",))
        self.dying.set()

    def stop(self, patience_s: float) -> None:
        self.dying.set()


class FakeCluster:
    """`body` is what a job does; `jobs` are all that were started."""

    address = "127.0.0.1"

    def __init__(self, body: Callable[[FakeJob], None] = lambda job: None) -> None:
        self._body = body
        self.jobs: list[FakeJob] = []
        self.refusal: str | None = None
        self.started = threading.Semaphore(0)

    def start(self, number: int, command: str, variables: Mapping[str, str]) -> FakeJob:
        if self.refusal is not None:
            raise OSError(self.refusal)
        job = FakeJob(number, variables)
        self.jobs.append(job)
        threading.Thread(target=self._body, args=(job,), daemon=True).start()
        self.started.release()
        return job

    def abandon(self) -> None:
        self.refusal = "nothing is started any more"

    def latest(self, number: int) -> FakeJob:
        return [job for job in self.jobs if job.number == number][-1]
