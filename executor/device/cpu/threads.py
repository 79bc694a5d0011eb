"""Idle OpenMP threads sleep, whoever started this process and in whatever order it imported things.

OMP_WAIT_POLICY=PASSIVE says it, and is read once, when torch is loaded: the launcher sets it before. A Python program
that uses the engine has mostly loaded torch by then. A spinning thread takes a core from whoever else wants it, and a
small step then waits for that core: beside one other busy process a step took 2 to 4 times as long.
"""

import ctypes
import logging
import os
import threading

from executor.host.env import environment

logger = logging.getLogger(__name__)

_parked: threading.Thread | None = None


def let_idle_threads_sleep(num_threads: int) -> None:
    """Do at run time what OMP_WAIT_POLICY=PASSIVE does at load time, unless the user has set a policy.

    LLVM's and Intel's runtime have a call for it. GNU's spins 3 ms at the end of every parallel region, but hardly at
    all where it manages more threads than there are CPUs (gomp_throttled_spin_count_var): a second pool of threads,
    which never gets work, makes it so beside the `num_threads` that torch computes with. Logs a warning where the
    runtime is neither.
    """
    global _parked
    if (
        {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment().keys()
        or _parked is not None
        or num_threads == 1
    ):
        return
    library = _openmp()
    if library is not None and hasattr(library, "kmp_set_blocktime"):
        library.kmp_set_blocktime(0)
    elif library is not None and hasattr(library, "GOMP_parallel"):
        ready = threading.Event()
        _parked = threading.Thread(
            target=_crowd, args=(library, num_threads, ready), name="openmp: parked", daemon=True
        )
        _parked.start()
        ready.wait()
    else:
        logger.warning(
            "idle threads of this OpenMP runtime spin: beside other busy processes steps are slow. Set "
            "OMP_WAIT_POLICY=PASSIVE in the environment, or before torch is imported"
        )


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded into this process; None where there is none that is known."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        return None
    for name in ("libiomp5", "libomp", "libgomp"):  # in the first two GNU's calls are there as well
        for path in sorted(paths):
            if os.path.basename(path).startswith(name):
                return ctypes.CDLL(path)
    return None


def _crowd(library: ctypes.CDLL, num_threads: int, ready: threading.Event) -> None:
    """A pool that makes one thread more than there are CPUs, and this thread, which owns it, asleep for good."""
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    harmless = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p)  # each of the pool calls it once
    parallel(harmless, None, max(2, len(os.sched_getaffinity(0)) - num_threads + 2), 0)
    ready.set()
    threading.Event().wait()
