"""A file that one process at a time has: locked by flock, which ends with the process, however it ends."""

import errno
import fcntl
import logging
import os
import stat
from typing import IO

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def take(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; False where another has it. OSError where the system refuses to say.

    A file system without locks counts as free, with a warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; start no second run with it", file.name)
    return True


def private_file(path: str, flags: int) -> int:
    """`opener` of `open`: a regular file, which is made for its owner alone.

    OSError for anything else that has the name; a link is not followed, and a pipe is not waited for.
    """
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "no regular file", path)
