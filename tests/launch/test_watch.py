"""Why a job must end, from the signs of life: alike for a launcher and for a rank that has none of ours."""

import pytest
from torch.distributed import HashStore

from executor.launch.heartbeat import LOST_S, STARTUP_S, Fault, Heartbeat, node_beat, rank_beat
from executor.launch.watch import Watch, watched_node, watched_rank

LIMIT_S = 300.0


class Signs(Heartbeat):
    """A heart whose clock and beats a test sets."""

    def __init__(self) -> None:
        super().__init__(HashStore(), rank_beat(0))
        self.silent: dict[str, float] = {}

    def silence_s(self, key, patience_s=None):
        if key in self.silent:
            return self.silent[key]
        return 0.0 if patience_s is None else self.silent.get("since the start", 0.0) - patience_s


@pytest.fixture
def heart():
    return Signs()


def watch(heart, *watched, stuck_s=LOST_S):
    return Watch(heart, lambda why: Fault(f"the store is gone: {why}"), watched, stuck_s)


def test_a_silent_rank_is_a_hang_unless_it_has_ended(heart):
    ended = []
    looking = watch(heart, watched_rank(1, LIMIT_S, lambda: Fault("rank 1 hangs"), lambda: bool(ended)))
    heart.silent["since the start"] = STARTUP_S + LIMIT_S
    assert looking.look() is None, "Python and torch are read from disk before the first beat"
    heart.silent["since the start"] += 1
    assert looking.look() == Fault("rank 1 hangs")
    heart.silent[rank_beat(1)] = LIMIT_S
    assert looking.look() is None
    heart.silent[rank_beat(1)] += 1
    assert looking.look() == Fault("rank 1 hangs")
    ended.append(True)
    assert looking.look() is None


def test_a_node_may_come_at_any_time_and_is_lost_soon(heart):
    looking = watch(heart)
    looking.add([watched_node(1, lambda: Fault("node 1", lost_node=1))])
    assert node_beat(1) in heart._watched, "its beats are read from now on"
    heart.silent["since the start"] = 10_000
    assert looking.look() is None
    heart.silent[node_beat(1)] = LOST_S + 1
    assert looking.look() == Fault("node 1", lost_node=1)


def test_what_somebody_has_found_comes_before_the_store_and_that_before_silence(heart, monkeypatch):
    looking = watch(heart, watched_node(1, lambda: Fault("node 1")))
    heart.silent[node_beat(1)] = LOST_S + 1
    monkeypatch.setattr(Signs, "stuck_s", LOST_S + 1)
    assert looking.look().summary == "the store is gone: no answer for 7 s"
    assert watch(heart, stuck_s=1000).look() is None
    heart.broken = "connection reset"
    assert looking.look().summary == "the store is gone: connection reset"
    heart.fault = Fault("the disk is full")
    assert looking.look() is heart.fault
