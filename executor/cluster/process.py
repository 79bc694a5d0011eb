"""One job of a cluster: a process of this project on this node, its files, and how it has ended.

A process of its own, because Ray's worker has imported and set what a rank must not have, and because a device's fault
then ends the job and not the one who starts it again. It ends with who has started it (`die_with_parent`), Ray's
worker or `bench`.
Invariant: `start` is called by that process's main thread, with which the kernel ends the job.
Knows no Ray.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from executor.host.env import REPO_ROOT, environment

TAIL_BYTES = 4096
TAIL_LINES = 15
POLL_S = 0.05
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
"""Variables of whoever started Ray's node, which are not this job's."""


@dataclass(frozen=True)
class End:
    """How a job has ended. `status` None: its node or Ray's worker is gone. `words`: why, in a line."""

    status: int | None
    words: str
    tail: tuple[str, ...] = ()


class JobProcess:
    """`python -m executor RECIPE COMMAND`, once it is started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._log = self._out = Path()

    def start(self, recipe: str, command: str, variables: Mapping[str, str], folder: str, name: str) -> str:
        """`recipe` is its YAML; files lie in `folder` of this node as `name`.*. Returns the path of the log."""
        place = Path(folder).absolute()
        place.mkdir(parents=True, exist_ok=True)
        self._log, self._out = place / f"{name}.log", place / f"{name}.out"
        config = place / f"{name}.yaml"
        config.write_text(recipe, encoding="utf-8")
        inherited = {key: value for key, value in environment().items() if key not in LAUNCHERS}
        added = {"RECIPE_PARENT": str(os.getpid()), "RECIPE_NODES": "", "PYTHONPATH": str(REPO_ROOT)}
        with self._log.open("wb") as log, self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "executor", str(config), command],
                env=inherited | added | dict(variables), stdin=subprocess.DEVNULL, stdout=out, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return str(self._log)

    def end(self) -> End | None:
        """None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        tail = tuple(_last(self._log).splitlines()[-TAIL_LINES:])
        if status < 0:
            return End(status, f"was killed by signal {-status}; its log: {self._log}", tail)
        words = "ended without a word"
        with contextlib.suppress(ValueError, IndexError, AttributeError):
            words = json.loads(_last(self._out).splitlines()[-1]).get("error") or words
        return End(status, words if status == 2 else f"{words}; its log: {self._log}", tail)

    @property
    def pid(self) -> int:
        """Of the started job."""
        return self._process.pid

    def interrupt(self) -> None:
        """Ask it to end, by SIGTERM."""
        self._process.terminate()

    def stop(self, patience_s: float) -> None:
        """Wait for its end, and make an end of it and all that it has started after `patience_s`."""
        if self._process is None:
            return
        limit_s = time.monotonic() + patience_s
        while self._process.poll() is None and time.monotonic() < limit_s:
            time.sleep(POLL_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _last(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").rstrip()
    except OSError:
        return ""
