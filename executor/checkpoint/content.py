"""Which checkpoint a folder holds, by its bytes: two with equal shapes, sizes and dates are never taken for one.

SHA-256 of every file of weights and every JSON file beside them. Gigabytes take seconds, so a file's digest is
remembered, for as long as the file system says that the file has not changed: device, inode, size and both times; the
time of its last change (ctime) no program sets. A folder that is copied or mounted anew is read again.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from executor.host.locks import private_file

logger = logging.getLogger(__name__)

MAX_THREADS = 4
PATIENCE_S = 60.0  # for a process that reads a checkpoint
TURN_S = 0.1  # between two looks at its lock
SETTLED_S = 2.0  # a file that changed less long ago may change again within the resolution of its times


def content_digest(folder: Path, weights: Sequence[Path], memory: Path) -> str:
    """Hex digest of a checkpoint: its `weights` and the JSON files of `folder`. `memory`: JSON file of digests, made
    and kept up to date here, with a lock beside it. Nobody is waited for where it has all of them.

    Raises OSError for a file that cannot be read, and for a memory or lock that is no regular file.
    """
    files = sorted({*weights, *folder.glob("*.json")})
    digests = _known_digests(files, memory) or _read_digests(folder, files, memory)
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()


def _known_digests(files: Sequence[Path], memory: Path) -> list[str] | None:
    """Of all files, or None where one is not remembered."""
    known = _remembered(memory)
    entries = [known.get(str(file)) for file in files]
    if all(entry and entry[:-1] == _state(file) for file, entry in zip(files, entries, strict=True)):
        return [entry[-1] for entry in entries]
    return None


def _read_digests(folder: Path, files: Sequence[Path], memory: Path) -> list[str]:
    """Of all files; what is not remembered is read, and remembered."""
    with _alone(memory), ThreadPoolExecutor(MAX_THREADS) as threads:
        started = time.monotonic()
        known = _remembered(memory)
        found = list(threads.map(lambda file: _file_digest(file, known), files))
        new = {str(file): entry for file, (_, _, entry) in zip(files, found, strict=True) if entry}
        if new:
            _remember(memory, known | new)
    num_bytes = sum(count for _, count, _ in found)
    if num_bytes:
        seconds = time.monotonic() - started
        logger.info("%s: read %.2f GB to know the checkpoint by, %.1f s", folder, num_bytes / 1e9, seconds)
    return [digest for digest, _, _ in found]


@contextmanager
def _alone(memory: Path) -> Iterator[None]:
    """One process at a time: replicas that start together read a checkpoint once. Not where files have no locks, nor
    behind a process that keeps the lock for longer than PATIENCE_S."""
    with open(memory.with_suffix(".lock"), "ab", opener=private_file) as lock:
        with suppress(OSError):
            _wait_for(lock)
        yield


def _wait_for(lock: IO[bytes]) -> None:
    started, has_told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        if time.monotonic() - started >= PATIENCE_S:
            return logger.warning("%s: it is still held; the checkpoint is read here as well", lock.name)
        if not has_told:
            has_told = True
            logger.info(
                "%s: another process has it, and may be reading this checkpoint; waiting for it, %.0f s at most",
                lock.name, PATIENCE_S,
            )  # fmt: skip
        time.sleep(TURN_S)


def _file_digest(file: Path, known: dict[str, list]) -> tuple[str, int, list | None]:
    """A file's digest, the bytes that were read for it, and what to remember of it."""
    before = _state(file)
    entry = known.get(str(file))
    if entry is not None and entry[:-1] == before:
        return entry[-1], 0, None
    is_settled = time.time() - os.stat(file).st_ctime > SETTLED_S
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    is_settled = is_settled and _state(file) == before
    return digest, os.stat(file).st_size, [*before, digest] if is_settled else None


def _state(file: Path) -> list[int]:
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remembered(memory: Path) -> dict[str, list]:
    """What there is. OSError for what is no regular file, or may not be read."""
    try:
        with open(memory, encoding="utf-8", opener=private_file) as file:
            tree = json.load(file)
        return {name: entry for name, entry in tree.items() if len(entry) == 6 and isinstance(entry[-1], str)}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):  # not there, or damaged: files are read again
        return {}


def _remember(memory: Path, entries: dict[str, list]) -> None:
    temporary = memory.with_name(f".tmp-{os.getpid()}-{memory.name}")
    with suppress(OSError):  # then it is read again next time
        with open(temporary, "w", encoding="utf-8", opener=private_file) as file:
            json.dump(entries, file)
        os.replace(temporary, memory)
