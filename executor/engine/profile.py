"""A profile of an engine's first steps: a Chrome trace with the stages and the model's parts as named spans.

Begins with the engine's first use after what was held back, ends after `num_steps` or when the engine is let go, and
is written then, by the thread of the steps. Bounded: a trace of thousands of steps opens in no viewer.
Knows no device: `Ops.profiler` gives what records.
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import record_function

from executor.device.ops import Ops
from executor.engine.parts import parts
from executor.engine.stages import StageClock

logger = logging.getLogger(__name__)


class Profile:
    """Of one rank. `name`: of the file, which comes to stand in `folder` as NAME.json."""

    def __init__(
        self, device: Ops, model: nn.Module, clock: StageClock, *, folder: Path, name: str, num_steps: int
    ) -> None:
        self._device, self._model, self._clock = device, model, clock
        self._folder, self._name, self._num_steps = folder, name, num_steps
        self.is_held = False  # while steps are a warm-up, which is left out
        self._num_done = 0
        self._profiler: Any = None  # while it records
        self._has_ended = False
        self._hooks: list[Any] = []
        self._open: list[AbstractContextManager] = []  # spans of parts, one inside the other

    def begin(self) -> None:
        """Before a step, outside all stages: record from here on, or no more; by the thread of the steps."""
        if self._num_done == self._num_steps:
            self.end()
        if self._profiler is not None or self.is_held or self._has_ended:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # no reason to answer nothing
            logger.warning("no profile: %s cannot be made (%s)", self._folder, error.strerror)
            self._has_ended = True
            return
        self._profiler = self._device.profiler(self._folder, self._name)
        self._profiler.start()
        self._clock.span = record_function
        for name, part in parts(self._model).items():
            self._hooks.append(part.register_forward_pre_hook(self._enter(name)))
            self._hooks.append(part.register_forward_hook(self._leave, always_call=True))

    def after_step(self) -> None:
        if self._profiler is not None:
            self._num_done += 1

    def end(self) -> None:
        """Write what there is; by the thread of the steps. Nothing is recorded from here on."""
        self._has_ended = True
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._clock.span = None
        for hook in self._hooks:
            hook.remove()
        self._open.clear()
        profiler.stop()
        if not self._num_done:
            return
        file = self._folder / f"{self._name}.json"
        try:
            is_written = profiler.write(file)
        except (OSError, RuntimeError) as error:  # torch raises the latter
            logger.warning("the profile cannot be written to %s: %s", file, error)
            return
        if is_written:
            logger.info(
                "the profile of %d steps is in %s; open it in https://ui.perfetto.dev or chrome://tracing "
                "(docs/profiling.md)",
                self._num_done,
                file,
            )

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            span = record_function(name)
            span.__enter__()
            self._open.append(span)

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)
