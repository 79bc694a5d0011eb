"""Whether a job goes on, as one of its members sees it: a node's launcher, or a rank that another launcher has started.

Both ask the same watch; they differ in whom they watch, and in what they do about a fault: a launcher ends its ranks, a
rank ends itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from executor.launch.heartbeat import LOST_S, STARTUP_S, Fault, Heartbeat, node_beat, rank_beat


@dataclass(frozen=True)
class Watched:
    """A member that beats, and from when on its silence is a fault."""

    key: str
    limit_s: float
    fault: Callable[[], Fault]
    patience_s: float | None = None
    """More time for the first beat; None: it may come at any time."""
    has_ended: Callable[[], bool] = lambda: False
    """Whether it has a reason to be silent."""


def watched_rank(rank: int, limit_s: float, fault: Callable[[], Fault], has_ended: Callable[[], bool]) -> Watched:
    """A rank: its silence for `limit_s` (hang_timeout_s) is a hang."""
    return Watched(rank_beat(rank), limit_s, fault, STARTUP_S, has_ended)


def watched_node(node: int, fault: Callable[[], Fault]) -> Watched:
    """Another node's launcher: it is typed by hand, and lost a few seconds after its last beat."""
    return Watched(node_beat(node), LOST_S, fault)


class Watch:
    """Reads the signs of life that `heart` gathers. `lost` makes the fault of a store that is gone, for the reason it
    gets; `stuck_s` is how long the store may leave a question unanswered."""

    def __init__(
        self, heart: Heartbeat, lost: Callable[[str], Fault], watched: Iterable[Watched] = (), stuck_s: float = inf
    ) -> None:
        self._heart, self._lost, self._stuck_s = heart, lost, stuck_s
        self._watched: list[Watched] = []
        self.add(watched)

    def add(self, watched: Iterable[Watched]) -> None:
        """Watch these as well, from now on."""
        watched = list(watched)
        self._watched += watched
        self._heart.watch(member.key for member in watched)

    def look(self) -> Fault | None:
        """Why the job must end: a fault that somebody has posted, a lost store, or the first member that is silent."""
        heart = self._heart
        if heart.fault:
            return heart.fault
        if heart.broken:
            return self._lost(heart.broken)
        if heart.stuck_s > self._stuck_s:
            return self._lost(f"no answer for {heart.stuck_s:.0f} s")
        for member in self._watched:
            if heart.silence_s(member.key, member.patience_s) > member.limit_s and not member.has_ended():
                return member.fault()
        return None
