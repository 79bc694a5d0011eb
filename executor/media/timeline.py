"""When each frame of a video is shown, and which frame is on the screen at a given time. Arithmetic only."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Timeline:
    """Frames in display order. `times_s` ascends from 0; any spacing is allowed."""

    times_s: np.ndarray  # float64 [N], N >= 1
    last_frame_s: float  # how long the last frame stays; 0 when the file does not say
    nominal_rate: float | None  # frames per second by the file's header, believed only where the time stamps agree

    @property
    def num_frames(self) -> int:
        return len(self.times_s)

    @property
    def duration_s(self) -> float:
        last = self.last_frame_s
        if last <= 0 and self.nominal_rate:
            last = 1 / self.nominal_rate
        if last <= 0:
            last = float(np.median(np.diff(self.times_s))) if self.num_frames > 1 else 1.0
        return float(self.times_s[-1]) + last

    @cached_property
    def frame_rate(self) -> float:
        """Frames per second: the nominal rate where it is true, else the mean."""
        if self.nominal_rate and self._is_constant_at(self.nominal_rate):
            return self.nominal_rate
        return self.num_frames / self.duration_s

    @cached_property
    def is_constant(self) -> bool:
        return self._is_constant_at(self.frame_rate)

    def frames_at(self, indices: list[int]) -> list[int]:
        """Frames to look at for `indices` of a video of the same length, count and constant `frame_rate`.

        At a constant rate the indices themselves; at a variable one the frame on the screen at each index's time:
        evenly spaced moments, and a frame that stays long is seen more than once.
        """
        if self.is_constant:
            return list(indices)
        moments_s = np.array(indices, dtype=np.float64) / self.frame_rate
        return (np.searchsorted(self.times_s, moments_s, side="right") - 1).tolist()

    def _is_constant_at(self, rate: float) -> bool:
        """Whether every frame is within half a frame of where `rate` puts it: containers round time stamps."""
        return bool((np.abs(self.times_s * rate - np.arange(self.num_frames)) < 0.5).all())
