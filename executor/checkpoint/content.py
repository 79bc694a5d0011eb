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

logger = logging.getLogger(__name__)

MAX_THREADS = 4
SETTLED_S = 2.0  # a file that changed less long ago may change again within the resolution of its times


def content_digest(folder: Path, weights: Sequence[Path], memory: Path) -> str:
    """Hex digest of a checkpoint: its `weights` and the JSON files of `folder`. `memory`: JSON file of digests, made
    and kept up to date here. Raises OSError for a file that cannot be read."""
    files = sorted({*weights, *folder.glob("*.json")})
    started = time.monotonic()
    with _alone(memory), ThreadPoolExecutor(MAX_THREADS) as threads:
        known = _remembered(memory)
        found = list(threads.map(lambda file: _file_digest(file, known), files))
        new = {str(file): entry for file, (_, _, entry) in zip(files, found, strict=True) if entry}
        if new:
            _remember(memory, known | new)
    num_bytes = sum(count for _, count, _ in found)
    if num_bytes:
        seconds = time.monotonic() - started
        logger.info("%s: read %.2f GB to know the checkpoint by, %.1f s", folder, num_bytes / 1e9, seconds)
    whole = hashlib.sha256()
    for file, (digest, _, _) in zip(files, found, strict=True):
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()


@contextmanager
def _alone(memory: Path) -> Iterator[None]:
    """One process at a time: replicas that start together read a checkpoint once. Not where files have no locks."""
    with open(memory.with_suffix(".lock"), "ab", opener=_private) as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
    try:
        tree = json.loads(memory.read_text(encoding="utf-8"))
        return {name: entry for name, entry in tree.items() if len(entry) == 6 and isinstance(entry[-1], str)}
    except (OSError, ValueError, AttributeError, TypeError):  # not there, or damaged: files are read again
        return {}


def _remember(memory: Path, entries: dict[str, list]) -> None:
    temporary = memory.with_name(f".tmp-{os.getpid()}-{memory.name}")
    with suppress(OSError):  # then it is read again next time
        with open(temporary, "w", encoding="utf-8", opener=_private) as file:
            json.dump(entries, file)
        os.replace(temporary, memory)
