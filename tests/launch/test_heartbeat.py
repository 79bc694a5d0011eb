"""Signs of life, and which of several faults is the cause."""

import time

from torch.distributed import HashStore

from executor.launch.heartbeat import BEAT_S, LOST_S, POST_S, Fault, Heartbeat, Kind, fault_of_exit, post, rank_beat
from executor.launch.job import FAREWELL_S
from executor.launch.processes import GRACE_S


def exited(code, outcome=None, rank=1):
    return fault_of_exit(rank, f"rank {rank}", code, outcome, "rank_01.log", ("last line",))


def test_a_lost_node_is_over_within_10_s():
    assert LOST_S + 2 * BEAT_S + POST_S + GRACE_S < 10  # the ranks
    assert LOST_S + 2 * BEAT_S + GRACE_S + FAREWELL_S < 10  # the master, whose own store answers at once


def test_the_cause_is_told_from_what_follows():
    killed, raised = exited(-9), exited(1, {"error": "RuntimeError: Connection closed by peer"}, 0)
    first = exited(1, {"error": "RuntimeError: the disk is full", "is_first": True})
    mistake, ended, silent = exited(2, {"error": "mend this"}), exited(-15), exited(7)
    assert min((raised, ended, killed), key=lambda fault: fault.kind) is killed
    assert min((raised, ended, mistake), key=lambda fault: fault.kind) is mistake
    assert min((ended, raised, first), key=lambda fault: fault.kind) is first
    assert killed.summary.startswith("rank 1 was killed by SIGKILL; if nobody did that, the machine ran out of memory")
    assert (killed.status, killed.log, killed.tail) == (1, "rank_01.log", ("last line",))
    assert (mistake.status, mistake.summary) == (2, "mend this")
    assert raised.summary == "rank 0 failed: RuntimeError: Connection closed by peer"
    assert silent.summary == "rank 1 ended with exit status 7 and no word"
    assert exited(-64).summary == "rank 1 was killed by SIGRTMAX" and exited(-50).summary.endswith("signal 50")


def test_the_first_fault_is_the_jobs():
    store = HashStore()
    first, second = Fault("first", rank=3, tail=("a", "b"), own_status=130), Fault("second")
    assert post(store, first) == first
    assert post(store, second) == Fault("first", rank=3, tail=("a", "b"))
    assert post(store, second).kind is Kind.RAISED


def test_a_launcher_that_was_stopped_does_not_blame_the_others(monkeypatch):
    """Ctrl-Z and fg: hours later by the clock, a moment later by its own account."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    heart = Heartbeat(HashStore(), rank_beat(0), [rank_beat(1)])
    clock[0] += 0.5
    assert heart.stuck_s == heart.silence_s(rank_beat(1), patience_s=0.0) == 0.5
    clock[0] += 7200
    assert heart.stuck_s == heart.silence_s(rank_beat(1), patience_s=0.0) == 1.5


def test_beats_are_heard_and_missed():
    store = HashStore()
    other = Heartbeat(store, rank_beat(1))
    watcher = Heartbeat(store, rank_beat(0), [rank_beat(1), rank_beat(2)])
    other.start(), watcher.start()
    try:
        time.sleep(2.5 * BEAT_S)
        assert watcher.silence_s(rank_beat(1)) < 2 * BEAT_S
        assert watcher.silence_s(rank_beat(2)) == 0  # may come at any time
        assert 0 < watcher.silence_s(rank_beat(2), patience_s=0.0) < 10
        other.stop()
        post(store, Fault("over"))
        time.sleep(4 * BEAT_S)
        assert watcher.silence_s(rank_beat(1)) > 2 * BEAT_S
        assert watcher.fault == Fault("over")
        assert watcher.stuck_s < 2 * BEAT_S and watcher.broken is None
    finally:
        other.stop(), watcher.stop()
    assert not watcher.is_alive()
