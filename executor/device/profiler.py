"""torch's own profiler, for a device whose work is done when a call returns."""

import logging
from pathlib import Path
from typing import Any

import torch

from executor.host.env import set_where_unset

logger = logging.getLogger(__name__)


class TorchProfiler:
    """Records what all threads of this process do on the CPU. `start`, `stop`, `write`: once, in one thread."""

    def __init__(self) -> None:
        set_where_unset({"KINETO_LOG_LEVEL": "99"})  # else it writes its own begin and end to stderr
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=_all_threads()
        )

    def start(self) -> None:
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()

    def write(self, file: Path) -> bool:
        """Chrome's trace format, as JSON."""
        self._profile.export_chrome_trace(str(file))
        return True


def _all_threads() -> Any:
    """Without it media, which are decoded in other threads, are not in the trace. torch has it from 2.8 on."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        logger.warning("torch %s records one thread only: the stage media is not in the trace", torch.__version__)
        return None
