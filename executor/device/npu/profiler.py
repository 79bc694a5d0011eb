"""torch_npu's profiler: what the host launches, and when the chip computes it.

Its `start` and `stop` raise nothing: it writes to stderr why it could not, and there is no trace then. It records the
thread that starts it; other threads (media) are not in the trace.
Beside the trace it leaves its own folder NAME_..._ascend_pt, which MindStudio Insight opens: the kernels' times as
tables among it.
"""

import contextlib
import logging
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from torch_npu import profiler

logger = logging.getLogger(__name__)

TRACE = "ASCEND_PROFILER_OUTPUT/trace_view.json"


class NpuProfiler:
    def __init__(self, folder: Path, name: str, *, on_chip: bool) -> None:
        """on_chip: False on an emulated chip, which has nothing to record but the host."""
        activity = profiler.ProfilerActivity
        self._folder, self._name = folder, name
        self._before = self._traces()
        with _off_stdout():
            self._profile = profiler.profile(
                activities=[activity.CPU, activity.NPU] if on_chip else [activity.CPU],
                on_trace_ready=profiler.tensorboard_trace_handler(str(folder), worker_name=name),
            )

    def start(self) -> None:
        with _off_stdout():
            self._profile.start()

    def stop(self) -> None:
        """Also reads what was recorded, which takes seconds."""
        with _off_stdout():
            self._profile.stop()

    def write(self, file: Path) -> bool:
        """Whether there is a trace, which then stands in `file`."""
        found = self._traces() - self._before
        if not found:
            logger.warning("torch_npu's profiler has written no trace below %s; its lines above say why", self._folder)
            return False
        shutil.copyfile(max(found), file)
        return True

    def _traces(self) -> set[Path]:
        return set(self._folder.glob(f"{self._name}_*/{TRACE}"))


def _off_stdout() -> AbstractContextManager:
    """What it prints is no result: to stderr."""
    return contextlib.redirect_stdout(sys.stderr)
