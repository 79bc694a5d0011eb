"""The rank processes of this node and their logs: started, looked at, ended. Knows no store and no other node."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

GRACE_S = 1.0
"""Between SIGTERM and SIGKILL."""
TAIL_LINES = 15
TAIL_BYTES = 8192
_PR_SET_PDEATHSIG = 1
_STATES = {"T": "it is stopped, e.g. by SIGSTOP", "t": "a debugger holds it", "D": "it waits for a device or a disk"}


@dataclass(frozen=True)
class RankProcess:
    """One rank of this node. It has a session of its own, so it and all it starts are one process group, and the
    terminal's Ctrl-C goes to the launcher alone."""

    rank: int
    log: Path
    process: subprocess.Popen

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -9: ended by signal 9."""
        return self.process.poll()

    @property
    def state(self) -> str:
        """What the kernel says about a process that gives no sign of life; empty when that explains nothing."""
        with contextlib.suppress(OSError, IndexError):
            # The name before the state may hold blanks and brackets.
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            return _STATES.get(stat.rpartition(")")[2].split()[0], "")
        return ""

    def tail(self) -> tuple[str, ...]:
        """The last lines of its log, without the empty ones at its end."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ()
        return tuple(text.rstrip().splitlines()[-TAIL_LINES:])


def start_rank(rank: int, arguments: Iterable[str], variables: Mapping[str, str], folder: Path) -> RankProcess:
    """`python -m executor ARGUMENTS` with `variables` as its environment, stderr in its log.

    stdout is this process's own; only rank 0 writes to it (see rank.py). Must be called by the main thread: the kernel
    ends a rank with the thread that started it (die_with_parent).
    """
    log = folder / f"rank_{rank:02d}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "executor", *arguments],
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
    return RankProcess(rank, log, process)


def end_all(ranks: Iterable[RankProcess]) -> None:
    """End the ranks and everything they started: SIGTERM, and what is still there after GRACE_S by SIGKILL."""
    ranks = list(ranks)
    _signal(ranks, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(rank.exit_code is None for rank in ranks):
        time.sleep(0.02)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds in the kernel
            rank.process.wait(0.3)


def _signal(ranks: Iterable[RankProcess], number: int) -> None:
    for rank in ranks:  # of a rank that has ended what it started may still be there
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, number)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its launcher, process `parent`, is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os._exit(1)


class Follower:
    """Copies a log to the screen as it grows, whenever `copy` is called."""

    def __init__(self, path: Path, screen: TextIO | None = None) -> None:
        self._log = path.open("r", encoding="utf-8", errors="replace", newline="")
        self._screen = screen or sys.stderr

    def copy(self) -> None:
        text = self._log.read()
        if text:
            self._screen.write(text)
            self._screen.flush()
