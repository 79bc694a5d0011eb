"""Signs of life over the job's store, and the one fault that ends a job.

Every rank beats, watched by its node's launcher (under another launcher: by rank 0); every launcher beats, watched by
the others. The first `Fault` lies under one key that everyone reads with each beat. A thread of Python: a rank that
computes for hours beats, and so does one that waits in a collective for ever; what no longer beats is a process that
is stopped, whose machine is gone, or that holds the interpreter's lock.
"""

from __future__ import annotations

import enum
import json
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store

from executor.launch.store import BROKEN, first_line, soon

BEAT_S = 0.5
LOST_S = 6.0
"""A launcher that is silent for so long is gone, or its network is. With what ending takes (processes.GRACE_S,
job.FAREWELL_S) everything is over within 10 s."""
STARTUP_S = 60.0
"""More patience with a rank's first sign of life: Python and torch are read from disk before it."""
POST_S = 1.0
FAULT = "fault"
_SECONDARY = (signal.SIGTERM, signal.SIGABRT)  # how ranks end that were told to, or that lost a peer


class Kind(enum.IntEnum):
    """Of faults that are noticed together the smallest is the cause, and the others follow from it."""

    KILLED = 0
    """A rank by a signal from outside, or the launcher."""
    MISTAKE = 1
    """The user's."""
    RAISED = 2
    """A rank, the first of its job to do so; or it ended without a word."""
    FOLLOWED = 3
    """A rank that raised after another, or that was told to end."""


@dataclass(frozen=True)
class Fault:
    """Why the job ends. `status` is the exit status of every launcher (the signalled one's is `own_status`)."""

    summary: str
    status: int = 1
    rank: int | None = None
    log: str | None = None
    """The failing rank's log, a path on its node."""
    tail: tuple[str, ...] = ()
    """The last lines of that log."""
    kind: Kind = Kind.RAISED
    own_status: int | None = None
    lost_node: int | None = None
    """The node that gives no sign of life, which nobody waits for."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fault:
        fields = json.loads(text)
        return cls(**{**fields, "tail": tuple(fields["tail"]), "kind": Kind(fields["kind"]), "own_status": None})


def fault_of_exit(
    rank: int, name: str, code: int, outcome: dict[str, Any] | None, log: str, tail: Iterable[str]
) -> Fault:
    """The fault of a rank, called `name`, that has ended: `code` is Popen's (-9: by signal 9), `outcome` what it
    has left in the store (rank.outcome_of).

    A rank that reports a UserError makes the job's status 2, and its words are the whole message.
    """
    if code < 0:
        killer = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "; if nobody did that, the machine ran out of memory (see dmesg)" if killer == "SIGKILL" else ""
        kind = Kind.FOLLOWED if -code in _SECONDARY else Kind.KILLED
        return Fault(f"{name} was killed by {killer}{hint}", 1, rank, log, tuple(tail), kind)
    words = (outcome or {}).get("error")
    if code == 2 and words:
        return Fault(words, 2, rank, log, kind=Kind.MISTAKE)
    reason = f"failed: {words}" if words else f"ended with exit status {code} and no word"
    kind = Kind.FOLLOWED if words and not outcome.get("is_first") else Kind.RAISED
    return Fault(f"{name} {reason}", 1, rank, log, tuple(tail), kind)


def hang_of(name: str, timeout_s: int) -> str:
    return f"{name} hangs: no sign of life for {timeout_s} s (parallel_config.hang_timeout_s)"


def post(store: Store, fault: Fault) -> Fault:
    """Make `fault` the job's, unless it has one; returns the job's. A store that does not answer is not waited for."""
    first = soon(lambda: Fault.from_json(store.compare_set(FAULT, "", fault.to_json())), POST_S)
    return fault if first is None or first.summary == fault.summary else first


def rank_beat(rank: int) -> str:
    """The key of a rank's signs of life."""
    return f"beat/rank/{rank}"


def node_beat(node: int) -> str:
    """The key of a launcher's signs of life."""
    return f"beat/node/{node}"


class _Awake:
    """A clock that counts a pause of this process (Ctrl-Z, a suspended machine) as one second at most. During a pause
    no beat is read, so the time that it took must not count as the silence of others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds, self._at = 0.0, time.monotonic()

    def __call__(self) -> float:
        """Seconds; to be asked more often than once in one."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._at, 1.0)
            self._at = now
            return self._seconds


class Heartbeat(threading.Thread):
    """Beats for one launcher or rank, and notes the beats of those it watches; what is done about it is its owner's
    business. `store` is a connection for this thread alone, `key` that of its beats, `watched` the keys it reads.

    `fault` is the job's when there is one, `broken` the reason when the store is gone.
    """

    def __init__(self, store: Store, key: str, watched: Iterable[str] = ()) -> None:
        super().__init__(name="store: heartbeat", daemon=True)
        self._store, self._key = store, key
        self._watched = list(watched)
        self._awake = _Awake()
        self._began = self._round_at = self._awake()
        self._last: dict[str, tuple[bytes, float]] = {}  # a watched key: its value, and when that was new
        self._stopped = threading.Event()
        self.fault: Fault | None = None
        self.broken: str | None = None

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=POST_S)

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def stuck_s(self) -> float:
        """How long the store has not answered."""
        return self._awake() - self._round_at

    def watch(self, keys: Iterable[str]) -> None:
        """Read these beats as well, from now on."""
        self._began = self._awake()
        self._watched = [*self._watched, *keys]

    def has_seen(self, key: str) -> bool:
        """Whether a watched key was ever there."""
        return key in self._last

    def silence_s(self, key: str, patience_s: float | None = None) -> float:
        """Seconds since the last beat of a watched key. Before the first: since the watch began, less `patience_s`;
        0 without it, for those who may come at any time."""
        if key in self._last:
            return self._awake() - self._last[key][1]
        return 0.0 if patience_s is None else self._awake() - self._began - patience_s

    def run(self) -> None:
        count = 0
        try:
            while not self._stopped.is_set():
                count += 1
                self._store.set(self._key, str(count))
                for key in self._watched:
                    if self._store.check([key]):
                        value = self._store.get(key)
                        if self._last.get(key, (None,))[0] != value:
                            self._last[key] = (value, self._awake())
                if self.fault is None and self._store.check([FAULT]):
                    self.fault = Fault.from_json(self._store.get(FAULT))
                self._round_at = self._awake()
                self._stopped.wait(BEAT_S)
        except BROKEN as error:
            if not self._stopped.is_set():
                self.broken = first_line(error)
