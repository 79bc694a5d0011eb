"""Jobs of a cluster: what keeps one from starting ends the command, what kills one later has it started again."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from executor.cluster import jobs as module
from executor.cluster import process
from executor.cluster.jobs import Jobs
from executor.cluster.process import End, JobProcess
from executor.errors import UserError
from tests.cluster.fakes import FakeCluster


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.005)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.02)


def until(found: Callable[[], object], within_s: float = 10) -> None:
    limit_s = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < limit_s
        time.sleep(0.002)


def test_a_job_that_dies_is_started_again_and_the_other_is_left_alone() -> None:
    cluster, ends = FakeCluster(), []
    jobs = Jobs(cluster, 2, "serve", {"RECIPE_FRONT": "x"}, lambda number, end: ends.append((number, end.words)))
    until(lambda: len(cluster.jobs) == 2)
    jobs.are_up = True
    cluster.latest(1).die()
    until(lambda: len(cluster.jobs) == 3)
    cluster.latest(1).is_gone = True
    until(lambda: len(cluster.jobs) == 4)
    jobs.check()
    jobs.stop(0)
    assert sorted(job.number for job in cluster.jobs) == [0, 1, 1, 1]
    assert cluster.jobs[0].variables == {"RECIPE_FRONT": "x", "RECIPE_REPLICA": str(cluster.jobs[0].number)}
    assert ends == [(1, "was killed by signal 9"), (1, "the node is gone")]
    assert all(cluster.latest(number).dying.is_set() for number in range(2))


def test_a_node_that_cannot_start_a_job_is_tried_again() -> None:
    cluster, ends = FakeCluster(), []
    jobs = Jobs(cluster, 1, "serve", {}, lambda number, end: ends.append(end))
    until(lambda: cluster.jobs)
    jobs.are_up, cluster.refusal = True, "no room"
    cluster.latest(0).die()
    until(lambda: len(ends) > 2)
    cluster.refusal = None
    until(lambda: len(cluster.jobs) == 2)
    jobs.stop(0)
    assert ends[1] == End(None, "no room")


@pytest.mark.parametrize("status, kind", [(2, UserError), (1, RuntimeError), (-9, RuntimeError)])
def test_what_keeps_a_job_from_starting_is_the_command_s_fault(status: int, kind: type[Exception]) -> None:
    cluster, ends = FakeCluster(), []
    jobs = Jobs(cluster, 2, "serve", {}, lambda number, end: ends.append(number))
    until(lambda: len(cluster.jobs) == 2)
    jobs.check()
    cluster.latest(1).die("there is no folder models/none", status)
    until(lambda: ends)
    with pytest.raises(kind, match="job 1: there is no folder models/none"):
        jobs.check()
    jobs.stop(0)
    assert len(cluster.jobs) == 2


def test_a_mistake_that_only_one_node_finds_is_the_command_s_fault_too() -> None:
    cluster, ends = FakeCluster(), []
    jobs = Jobs(cluster, 2, "generate", {}, lambda number, end: ends.append(number))
    until(lambda: len(cluster.jobs) == 2)
    jobs.are_up = True
    cluster.latest(0).die()
    until(lambda: len(cluster.jobs) == 3)
    cluster.latest(0).die("there is no folder any more", 2)
    until(lambda: len(cluster.jobs) == 4)
    jobs.check()
    cluster.latest(1).die("there is no folder models/none", 2)
    until(lambda: len(ends) == 3)
    with pytest.raises(UserError, match="job 1: there is no folder models/none"):
        jobs.check()
    jobs.stop(0)


def test_a_process_says_why_it_has_ended(tmp_path: Path) -> None:
    job = JobProcess()
    recipe = '{"model_config": {"model_path": "/nowhere", "device": "cpu"}}'
    log = job.start(recipe, "serve", {"OMP_NUM_THREADS": "1"}, str(tmp_path / "logs"), "job")
    until(lambda: job.end(), 60)
    assert job.end().status == 2 and "there is no folder /nowhere" in job.end().words
    assert any("there is no folder /nowhere" in line for line in job.end().tail)
    assert Path(log).parent == tmp_path / "logs"
    job.stop(0)


def test_a_process_ends_when_it_is_told_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho began >&2\nexec {sys.executable} -c 'import time; time.sleep(60)'\n")
    program.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(program))
    job = JobProcess()
    job.stop(0)  # was never started
    log = job.start("{}", "serve", {}, str(tmp_path), "job")
    until(lambda: "began" in Path(log).read_text())
    assert job.end() is None
    job.stop(0)
    assert job.end() == End(-signal.SIGKILL, f"was killed by signal 9; its log: {log}", ("began",))
