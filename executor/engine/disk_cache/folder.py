"""A folder of entries that outlive the process: bytes by name, each whole and checked, or not there.

`root/prefix-KEY/NAME`: KEY names all that the bytes depend on besides what NAME names. An entry is a header (magic,
length, SHA-256 over key, name and bytes) and the bytes. It is written to a temporary file beside its place and renamed,
so that a reader sees all of it or none, whoever else writes and removes; what a power cut or a bad disk leaves of it
the digest finds, hence nothing is synced. The root has at most `capacity_bytes` of entries, over all keys: the least
recently used go first, and each process looks at its start and after writing a small share of that. Nothing else below
the root is touched. Folders are 0700 and files 0600, since entries tell what was asked.

SHA-256, because CPUs have instructions for it: 1.4 GB/s a core where BLAKE2b has 0.5, and a tenth of what computing
the bytes takes. Knows nothing of blocks, pictures or tensors. Any thread may call; `write` and `trim` one at a time.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from executor.errors import UserError
from executor.host import locks
from executor.host.locks import private_file
from executor.recipe.disk_cache import ENTRIES, TRIM_LOCK, root_of, unusable

logger = logging.getLogger(__name__)

MAGIC = b"QVLCACH1"
_HEADER = struct.Struct("<8sQ32s16x")
HEADER_BYTES = _HEADER.size
LOOK_SHARE = 0.05  # of the capacity, written by this process between two looks at the root
KEPT_SHARE = 0.9  # of the capacity, left by a trim
STALE_S = 3600.0  # temporary files older than that are of a process that has died
_TEMPORARY = ".tmp-"
_FOLDER_NAME = re.compile(rf"{ENTRIES}[0-9a-f]+")
_NAME = re.compile(r"[0-9a-f]+\.[a-z]+")

Bytes = bytes | bytearray | memoryview


class _Found(NamedTuple):
    stamp_ns: int
    num_bytes: int
    path: str


def make_root(path: str | Path) -> Path:
    """The root, made where it is not there. UserError, which names the recipe's key, if it cannot be used."""
    root = root_of(path)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        trial = root / f"{_TEMPORARY}{secrets.token_hex(8)}"
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        trial.unlink()
    except OSError as error:
        raise UserError(unusable(root, str(error.strerror or error))) from error
    return root


class EntryFolder:
    """The entries of one key, in hex, below a root that is there. Names are hex with a suffix: `0a1b.kv`."""

    def __init__(self, root: Path, key: str, capacity_bytes: int) -> None:
        self.root = root
        self.key = key
        self.path = root / f"{ENTRIES}{key}"
        self.capacity_bytes = capacity_bytes
        self.total_bytes = 0  # of all keys, as of the last look and what this process has written since
        self.num_damaged = 0
        self._written_bytes = 0  # since the last look
        self.names: set[str] = set()  # this key's, as far as this process knows
        self.blocked: set[str] = set()  # those that something else has, which is left alone
        self._make()
        self.trim()

    def read(self, name: str, into: memoryview) -> bool:
        """Fill `into` with the bytes of an entry; False where it is not there, of another length, or damaged.

        A damaged one is removed, with a warning.
        """
        if not self.has(name):
            return False
        path = self.path / name
        try:
            with open(path, "rb", buffering=0, opener=private_file) as file:
                header = file.read(HEADER_BYTES)
                fault = self._fault(name, file, header, into)
        except FileNotFoundError:
            self.names.discard(name)
            return False
        except OSError as error:
            fault = str(error.strerror or error)
        if fault is None:
            self.names.add(name)
            return True
        self.num_damaged += 1
        try:
            self.remove(name)
        except OSError as error:
            reason = error.strerror or error
            logger.warning("%s: %s; it is computed again, and cannot be removed (%s)", path, fault, reason)
        else:
            logger.warning("%s: %s; it is removed, and computed again", path, fault)
        return False

    def _fault(self, name: str, file: object, header: bytes, into: memoryview) -> str | None:
        if len(header) < HEADER_BYTES:
            return f"truncated, {len(header)} bytes"
        magic, num_bytes, digest = _HEADER.unpack(header)
        if magic != MAGIC:
            return "not an entry of this cache"
        if num_bytes != into.nbytes:
            return f"an entry of {num_bytes} bytes instead of {into.nbytes}"
        count = 0
        while count < into.nbytes:
            got = file.readinto(into[count:])
            if not got:
                return f"truncated, {count} of {into.nbytes} bytes"
            count += got
        if file.read(1):
            return "too long"
        return None if self._digest(name, into) == digest else "its bytes do not match its digest"

    def has(self, name: str) -> bool:
        """Whether there is such an entry now, good or bad, whoever wrote it. What is no regular file is none, and is
        told once."""
        try:
            found = os.lstat(self.path / name)
        except OSError:
            found = None
        is_entry = found is not None and stat.S_ISREG(found.st_mode)
        (self.names.add if is_entry else self.names.discard)(name)
        if found is None or is_entry:
            self.blocked.discard(name)
        elif name not in self.blocked:
            self.blocked.add(name)
            logger.warning(
                "%s: no regular file; it is left alone, and what belongs there is not kept", self.path / name
            )
        return is_entry

    def write(self, name: str, content: Bytes, stamp_ns: int | None = None) -> None:
        """Put an entry there, in place of one that is. `stamp_ns`: as `touch`. OSError leaves nothing behind."""
        content = memoryview(content).cast("B")
        header = _HEADER.pack(MAGIC, content.nbytes, self._digest(name, content))
        temporary = self.path / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            file = self._create(temporary)
            try:
                _write_all(file, header, content)
                if stamp_ns is not None:
                    os.utime(file, ns=(stamp_ns, stamp_ns))
            finally:
                os.close(file)
            os.replace(temporary, self.path / name)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self.names.add(name)
        num_bytes = HEADER_BYTES + content.nbytes
        self.total_bytes += num_bytes
        self._written_bytes += num_bytes
        if self.total_bytes > self.capacity_bytes or self._written_bytes > LOOK_SHARE * self.capacity_bytes:
            self.trim()

    def touch(self, name: str, stamp_ns: int) -> None:
        """An entry counts as last used at this time (`time.time_ns`)."""
        try:
            os.utime(self.path / name, ns=(stamp_ns, stamp_ns))
        except FileNotFoundError:
            self.names.discard(name)
        except OSError:  # a folder that may only be read
            return

    def remove(self, name: str) -> None:
        """OSError where it cannot be; one that is not there is removed."""
        self.names.discard(name)
        with suppress(FileNotFoundError):
            os.unlink(self.path / name)

    def trim(self) -> None:
        """Look at the root anew, and remove the least recently used entries where it has too many."""
        self.names = self._look()
        if self.total_bytes <= self.capacity_bytes:
            return
        with open(self.root / TRIM_LOCK, "ab", opener=private_file) as lock:
            if not locks.take(lock):  # another process is at it
                return
            found = sorted(self._entries())
            total = sum(entry.num_bytes for entry in found)
            for entry in found:
                if total <= KEPT_SHARE * self.capacity_bytes:
                    break
                with suppress(OSError):
                    os.unlink(entry.path)
                total -= entry.num_bytes
                if os.path.dirname(entry.path) == str(self.path):
                    self.names.discard(os.path.basename(entry.path))
            self.total_bytes = total
            self._remove_empty()

    def _look(self) -> set[str]:
        names, total = set(), 0
        for entry in self._entries():
            total += entry.num_bytes
            if os.path.dirname(entry.path) == str(self.path):
                names.add(os.path.basename(entry.path))
        self.total_bytes, self._written_bytes = total, 0
        return names

    def _entries(self) -> Iterator[_Found]:
        """All entries below the root; temporary files that nobody will finish are removed meanwhile."""
        for folder in self.root.iterdir():
            if not _FOLDER_NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            with suppress(FileNotFoundError), os.scandir(folder) as files:
                for file in files:
                    with suppress(FileNotFoundError):  # somebody else trims
                        status = file.stat(follow_symlinks=False)
                        if not stat.S_ISREG(status.st_mode):
                            continue
                        if _NAME.fullmatch(file.name):
                            yield _Found(status.st_mtime_ns, status.st_size, file.path)
                        elif file.name.startswith(_TEMPORARY) and time.time() - status.st_mtime > STALE_S:
                            os.unlink(file.path)

    def _remove_empty(self) -> None:
        for folder in self.root.iterdir():
            if folder != self.path and _FOLDER_NAME.fullmatch(folder.name):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()

    def _make(self) -> None:
        """The folder, and the root where that has gone, too. PermissionError for a folder of somebody else, who could
        put into it what this process would read."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        found = os.lstat(self.path)
        if stat.S_ISLNK(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a link; put a folder there, or remove it", str(self.path))
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path))
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "a folder of another user", str(self.path))
        if stat.S_IMODE(found.st_mode) != 0o700:
            os.chmod(self.path, 0o700)

    def _create(self, path: Path) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody has removed the folder
            self._make()
            return os.open(path, flags, 0o600)

    def _digest(self, name: str, content: memoryview) -> bytes:
        state = hashlib.sha256(f"{self.key}/{name}\n{content.nbytes}\n".encode())
        state.update(content)
        return state.digest()


def _write_all(file: int, *parts: Bytes) -> None:
    for part in parts:
        view = memoryview(part)
        while view.nbytes:
            count = os.write(file, view)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view = view[count:]
