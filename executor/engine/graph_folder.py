"""Where compiled decode graphs are kept from run to run, and which of them go.

A folder for each key (what a graph depends on), a folder for each rank in it. A process holds a shared lock on its
key's folder for as long as it lives; whoever comes later removes all but the newest few, and never one that is locked.
Knows nothing of graphs.
"""

import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

KEPT = 4  # folders of other keys
_LOCK = "in_use.lock"


class GraphFolder:
    """This rank's folder below `root`, claimed until the process ends or `release` is called."""

    def __init__(self, root: Path, key: str, rank: int) -> None:
        self._lock = _claim(root / key)
        self.path = root / key / f"rank_{rank:02d}"
        self.path.mkdir(exist_ok=True)
        remove_old(root, key)

    def release(self) -> None:
        self._lock.close()


def _claim(folder: Path) -> TextIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "a")  # noqa: SIM115 - open for as long as the process lives
        fcntl.flock(lock, fcntl.LOCK_SH)
        # Somebody may have removed the folder between the two calls.
        if (folder / _LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / _LOCK)):
            os.utime(folder)
            return lock
        lock.close()


def remove_old(root: Path, key: str, kept: int = KEPT) -> list[Path]:
    """Remove the folders below `root` that nobody uses, but `key`'s and the `kept` used last; returns them."""
    others = [folder for folder in root.iterdir() if folder.name != key and (folder / _LOCK).exists()]
    removed = []
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)[kept:]:
        try:
            with open(folder / _LOCK, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        except (BlockingIOError, FileNotFoundError):  # in use, or another rank was faster
            continue
        removed.append(folder)
    if removed:
        logger.info("%s: removed %d old folders of compiled graphs, kept the %d newest", root, len(removed), kept)
    return removed
