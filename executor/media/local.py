"""Files that requests of strangers may name: those below one folder, and nothing else.

Invariant: what is judged is what was opened. The path is resolved (links, `..`) and must lie below the folder; the file
is opened once, and where the kernel says that it lies must be below the folder as well, so that nothing exchanged in
between is read. A hard link cannot be told from its file.
"""

import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from executor.errors import UserError

FOLDER_KEY = "server_config.allowed_local_media_path"
_FILE_URL = re.compile(r"file:(?://([^/]*))?(/.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Folder:
    """The folder `root` (a real path) and what is below it."""

    root: str

    @classmethod
    def at(cls, path: str) -> "Folder":
        """Raises UserError where there is none."""
        real = os.path.realpath(os.path.expanduser(path))
        if not os.path.isdir(real):
            raise UserError(f"{FOLDER_KEY}: {path}: no such folder; name the one that requests may read from")
        return cls(real)

    def holds(self, real_path: str) -> bool:
        return real_path.startswith(self.root.rstrip("/") + "/")

    def find(self, name: str) -> str:
        """The real path of a file that is named by an absolute path, a path relative to the folder, or a file: URL.

        Opens nothing. Raises UserError for what lies elsewhere, whether it is there or not, and for what is missing.
        """
        outside = False
        for path in _spellings(name):
            try:
                real = os.path.realpath(os.path.join(self.root, path))
            except (OSError, ValueError) as error:  # a zero byte, half a character
                raise UserError(f"{_short(name)}: not a path ({error})") from error
            if real == self.root:
                raise UserError(f"{_short(name)}: is the folder itself that {FOLDER_KEY} allows; name a file in it")
            if not self.holds(real):
                outside = True
            elif os.path.exists(real):
                return real
        if outside:
            raise _outside(name)
        raise UserError(f"{_short(name)}: no such file in the folder that {FOLDER_KEY} allows")

    def open(self, name: str) -> BinaryIO:
        """A regular file, open for reading. Errors as `find`."""
        real = self.find(name)
        try:
            # Not waiting for a pipe's writer; a link that took the file's place meanwhile is not followed.
            number = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{_short(name)}: cannot be read ({error.strerror})") from error
        file = os.fdopen(number, "rb") if stat.S_ISREG(os.fstat(number).st_mode) else None
        if file is None:
            is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
            os.close(number)
            kind = "a folder; name a file in it, or list its frames" if is_folder else "no regular file"
            raise UserError(f"{_short(name)}: is {kind}")
        if not self.holds(os.readlink(opened_path(file))):
            file.close()
            raise _outside(name)
        return file


def opened_path(file: BinaryIO) -> Path:
    """A path by which others open the very file that is open here, for as long as it is."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _spellings(name: str) -> Iterator[str]:
    """A path as it stands; of a file: URL also with %20 and the like read."""
    if name[:5].lower() != "file:":
        yield name
        return
    parts = _FILE_URL.fullmatch(name)
    if parts is None or (parts[1] or "localhost").lower() != "localhost":
        raise UserError(f"{_short(name)}: a file: URL names an absolute path of this machine: file:///folder/file")
    yield parts[2]
    if "%" in parts[2]:
        yield urllib.parse.unquote(parts[2])


def _outside(name: str) -> UserError:
    return UserError(
        f"{_short(name)}: lies outside of the folder that {FOLDER_KEY} allows; name a file below it, or send the media "
        "as a base64 data: URL"
    )


def _short(name: str, length: int = 120) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."
