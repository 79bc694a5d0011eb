"""A real Ray of two jobs on this machine, as a user starts it: one is killed, the other goes on, it is back."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import Job
from tests.reference import REPO
from tests.serve.test_replicas import QUICK, TWO, all_asked, asked, check_answers, num_running, served, turns

pytestmark = [pytest.mark.long, pytest.mark.skipif("not __import__('importlib').util.find_spec('ray')")]
REPLICAS = ("server_config.replicas=2",)
JOBS = ("parallel_config.ray_jobs=2",)
PICTURES = ("objects.png", "objects_2.jpg", "number.jpg", "word.png")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    started = Job(tmp_path)
    yield started
    started.clear()


def job_processes(job: Job) -> dict[int, int]:
    """The process of each job of the cluster, by the job's number."""
    found = {}
    for process in job.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{process}/environ").read_bytes()
            number = re.search(rb"RECIPE_REPLICA=(\d+)", variables)
            if b"executor" in words and number and b"\0RANK=" not in variables:
                found[int(number[1])] = process
    return found


def test_serve_over_two_jobs_one_of_which_dies(job: Job) -> None:
    client = served(job, *REPLICAS, config=QUICK, timeout_s=240)
    check_answers(client, "qwen3_vl")
    first = job_processes(job)
    assert sorted(first) == [0, 1]
    endless = {"messages": turns("word.png"), "stream": True, "ignore_eos": True, "max_tokens": 1500}
    with client.stream("POST", "/v1/chat/completions", json=endless) as stream:
        lines = stream.iter_lines()
        next(lines)
        job.until(lambda: num_running(client) >= 1, 5)
    job.until(lambda: num_running(client) == 0, 5)

    os.kill(first[1], signal.SIGKILL)
    for _ in range(3):  # from now on, whether the front door knows already or not
        for text, _ in all_asked(client, [turns(name) for name in PICTURES]):
            assert text
        assert client.get("/health").status_code == 200
    job.until(lambda: job_processes(job).get(1, first[1]) != first[1], 60)
    job.until(lambda: len(re.findall("job 1 is up", job.err())) == 2, 120)
    assert job_processes(job)[0] == first[0]
    check_answers(client, "qwen3_vl")

    job.launchers[0].terminate()
    assert job.wait() == [0], job.err()
    assert job.document()["replicas"] == 2
    job.until(lambda: not job.processes(), 10)


def test_each_job_may_have_ranks_and_replicas_of_its_own(job: Job) -> None:
    client = served(job, *REPLICAS, *TWO, config=QUICK, timeout_s=300)
    check_answers(client, "qwen3_vl")
    assert asked(client, turns("word.png"))[0]
    job.launchers[0].terminate()
    assert job.wait() == [0], job.err()
    job.until(lambda: not job.processes(), 10)


def test_a_data_set_over_two_jobs_one_of_which_dies(job: Job, tmp_path: Path) -> None:
    media, results, questions = REPO / "dataset/media", tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    names = [str(media / name) for name in PICTURES[:3]] + ["missing.png"]
    rows = [{"question": f"Describe the picture. {number}", "image": name} for number in range(60) for name in names]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data_config.dataset=jsonl", f"data_config.dataset_path={questions}", f"data_config.results_path={results}"]
    job.start(*JOBS, *data, config=QUICK, run="generate")
    job.until(lambda: results.exists() and results.read_bytes().count(b"\n") > 20, 240)
    victim = job_processes(job)[0]  # whether it answers by now or still reads its weights
    os.kill(victim, signal.SIGKILL)
    assert job.wait(240) == [2], job.err()
    assert "job 0 has ended and is started again: was killed by signal 9" in job.err()
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["index"] for row in found] == list(range(len(rows)))
    assert [row["error"] is None for row in found] == [True, True, True, False] * 60
    assert job.document()["outputs"][0]["text"] == found[0]["text"]
    job.until(lambda: not job.processes(), 10)

    single = Job(tmp_path / "single")
    single.folder.mkdir()
    again = tmp_path / "single.jsonl"
    single.start(*data[:2], f"data_config.results_path={again}", config=QUICK, run="generate")
    assert single.wait(240) == [2]
    alone = [json.loads(line) for line in again.read_text().splitlines()]
    for key in ("text", "error", "fingerprint", "prompt_tokens"):
        assert [row[key] for row in alone] == [row[key] for row in found], "as one process answers them"


def test_a_mistake_of_the_recipe_is_told_in_its_words(job: Job) -> None:
    job.start(*REPLICAS, "server_config.port=0", "model_config.model_path=/nowhere", config=QUICK, run="serve")
    assert job.wait(120) == [2], job.err()
    assert "there is no folder /nowhere" in job.document()["error"]
    at = time.monotonic()
    job.until(lambda: not job.processes(), 10)
    assert time.monotonic() - at < 10


def test_a_cluster_without_room_is_refused(job: Job) -> None:
    job.start("server_config.replicas=200", "server_config.port=0", "model_config.device=npu",
              "model_config.soc=atlas_800i_a2", config=QUICK, run="serve")  # fmt: skip
    assert job.wait(120) == [2], job.err()
    assert "200 jobs of 1 NPU each do not fit" in job.document()["error"]
