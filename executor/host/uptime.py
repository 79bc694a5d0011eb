"""How long this process has been there. Standard library only."""

import os
import time
from pathlib import Path


def process_age_s() -> float | None:
    """Seconds since this process was started (a shell that became it counts); None where the system does not say.

    /proc/self/stat has the start in clock ticks since the machine's (proc(5), field 22); a tick is 10 ms as a rule.
    """
    try:
        text = Path("/proc/self/stat").read_text()
        ticks = int(text.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
