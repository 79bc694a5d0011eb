"""A rank that dies while a model answers: the others wait for it in a collective, and end within ten seconds."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cases import mostly_long
from tests.launch.jobs import Job


def rank_process(job: Job, rank: int) -> int:
    """The process id of a rank of this job."""
    for pid in job.processes():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise LookupError(f"no rank {rank}")


@pytest.mark.parametrize("victim", mostly_long((0, 1), [0]))  # rank 1 is killed in test_one_node.py
def test_a_rank_killed_between_two_tokens(job, victim) -> None:
    job.start(
        "parallel_config.world_size=2",
        "generation_config.max_new_tokens=1900",
        "generation_config.ignore_eos=true",
        prompt="What do you see?",
        run="generate",
    )
    job.until(lambda: "weights:" in job.log(0).read_text() and "weights:" in job.log(1).read_text())
    time.sleep(1.5)  # it answers
    process = rank_process(job, victim)
    at = time.monotonic()
    os.kill(process, signal.SIGKILL)
    assert job.ends(at) == [1]
    assert f"rank {victim} was killed by SIGKILL" in job.document()["error"]
