"""A file that one process at a time has: locked by flock, which ends with the process, however it ends."""

import errno
import fcntl
import logging
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
