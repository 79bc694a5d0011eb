"""`serve` on several ranks, started as a user starts it: replicas share the requests, and end together."""

import base64
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.launch.jobs import Job
from tests.reference import REPO

QUICK = "config/quickstart.yaml"
MOE = "config/quickstart_qwen3_vl_moe.yaml"
CHAT = "/v1/chat/completions"
TWO = ("parallel_config.world_size=2", "parallel_config.attn_tp_size=1")
PICTURES = ("objects.png", "objects_2.jpg", "number.jpg", "word.png")
QUESTIONS = ("Describe the picture.", "How many objects are there?")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    started = Job(tmp_path)
    yield started
    started.clear()


def served(job: Job, *settings: str, config: str = MOE, timeout_s: float = 90) -> httpx.Client:
    """A client of a server that is ready."""
    small = ("server_config.port=0", "scheduler_config.block_size=16", "scheduler_config.num_blocks=512")
    job.start(*small, *settings, config=config, run="serve")

    def address() -> re.Match[str] | None:
        assert job.launchers[0].poll() is None, job.err()
        return re.search(r"serving \S+ at (http://[\w.:]+\d)", job.err())

    client = httpx.Client(base_url=job.until(address, timeout_s)[1], timeout=60)
    assert client.get("/health").status_code == 200
    return client


def turns(name: str, answers: tuple[str, ...] = ()) -> list[dict]:
    """A conversation about a picture, up to the question after `answers`."""
    picture = base64.b64encode((REPO / "dataset/media" / name).read_bytes()).decode()
    messages: list[dict] = []
    for number, question in enumerate(QUESTIONS[: len(answers) + 1]):
        content = [{"type": "text", "text": question}]
        if not number:
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}})
        messages.append({"role": "user", "content": content})
        messages += [{"role": "assistant", "content": text} for text in answers[number : number + 1]]
    return messages


def asked(client: httpx.Client, messages: list[dict], **fields: object) -> tuple[str, dict]:
    reply = client.post(CHAT, json={"messages": messages, "temperature": 0, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"], reply.json()["usage"]


def all_asked(client: httpx.Client, asks: list[list[dict]]) -> list[tuple[str, dict]]:
    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(lambda messages: asked(client, messages), asks))


def check_answers(client: httpx.Client, tiny: str) -> None:
    """Two turns about each picture: those of one engine, and the second turn finds what the first has computed."""
    with engine_over(REPO / "models/tiny" / tiny) as engine:
        params = SamplingParams(max_new_tokens=128)
        first = [each.texts[0] for each in engine.generate([turns(name) for name in PICTURES], params)]
        second = [turns(name, (text,)) for name, text in zip(PICTURES, first, strict=True)]
        wanted = [each.texts[0] for each in engine.generate(second, params)]
    found = all_asked(client, [turns(name) for name in PICTURES])
    assert [text for text, _ in found] == first
    found = all_asked(client, second)
    assert [text for text, _ in found] == wanted
    assert all(usage["prompt_tokens_details"]["cached_tokens"] > 0 for _, usage in found)


def num_running(client: httpx.Client) -> float:
    return float(re.search(r"^vllm:num_requests_running\S* (\S+)", client.get("/metrics").text, re.M)[1])


def answered_on(job: Job, rank: int) -> int:
    return int(re.search(r"(\d+) requests were answered here", job.log(rank).read_text())[1])


def check_shared_experts(job: Job, client: httpx.Client) -> None:
    check_answers(client, "qwen3_vl_moe")
    endless = {"messages": turns("word.png"), "stream": True, "ignore_eos": True, "max_tokens": 1500}
    for _ in range(2):  # one on each replica, as the first to be asked is the one that was asked longest ago
        with client.stream("POST", CHAT, json=endless) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert num_running(client) >= 1 or job.until(lambda: num_running(client) >= 1, 5)
        job.until(lambda: num_running(client) == 0, 5)  # who hangs up is forgotten on every replica
        endless["messages"] = turns("number.jpg")
    endless |= {"max_tokens": 200, "messages": turns("objects.png"), "stream_options": {"include_usage": True}}
    with client.stream("POST", CHAT, json=endless) as stream:
        lines = stream.iter_lines()
        next(lines)
        job.launchers[0].send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"completion_tokens":200' in rest[-2], "what was under way is answered"
    assert job.wait() == [0], job.err()
    document = job.document()
    assert (document["command"], document["model"]) == ("serve", "models/tiny/qwen3_vl_moe")
    assert document["requests"] == document["answered"] + document["failed"]
    assert not job.processes()


@pytest.mark.long
def test_replicas_that_share_experts(job: Job) -> None:
    client = served(job, *TWO, "parallel_config.moe_ep_size=2")
    check_shared_experts(job, client)
    assert 4 <= answered_on(job, 1) <= 7


@pytest.mark.long
def test_replicas_of_two_ranks_that_share_experts(job: Job) -> None:
    degrees = ("parallel_config.world_size=4", "parallel_config.attn_tp_size=2", "parallel_config.moe_ep_size=4")
    client = served(job, *degrees)
    check_shared_experts(job, client)
    assert 4 <= answered_on(job, 2) <= 7


@pytest.mark.long
def test_one_replica_of_two_ranks(job: Job) -> None:
    client = served(job, "parallel_config.world_size=2", config=QUICK)
    check_answers(client, "qwen3_vl")
    job.launchers[0].terminate()
    assert job.wait() == [0], job.err()


@pytest.mark.long
def test_a_dead_replica_ends_the_job_with_its_reason(job: Job) -> None:
    client = served(job, *TWO, config=QUICK)
    check_answers(client, "qwen3_vl")
    at = time.monotonic()
    os.kill(rank_process(job, 1), signal.SIGKILL)
    try:
        while client.get("/health").status_code == 200:
            time.sleep(0.01)
    except httpx.TransportError:
        pass  # it has ended already
    assert job.ends(at) == [1]
    assert job.document()["error"].startswith("rank 1 was killed by SIGKILL")


@pytest.mark.long
def test_a_second_signal_ends_the_job_at_once(job: Job) -> None:
    client = served(job, *TWO, config=QUICK)
    endless = {"messages": turns("word.png"), "stream": True, "ignore_eos": True, "max_tokens": 2000}
    with client.stream("POST", CHAT, json=endless) as stream:
        lines = stream.iter_lines()
        next(lines)
        job.launchers[0].terminate()
        job.until(lambda: "SIGTERM: the job comes to its end" in job.err(), 5)
        at = time.monotonic()
        job.launchers[0].terminate()
        assert job.ends(at) == [128 + signal.SIGTERM]


@pytest.mark.long
def test_a_signal_before_it_serves_ends_the_job(job: Job) -> None:
    job.start(*TWO, "server_config.port=0", config=QUICK, run="serve")
    job.log(1)
    at = time.monotonic()
    job.launchers[0].terminate()
    assert job.ends(at) == [128 + signal.SIGTERM]
    assert job.document()["error"] == "interrupted by SIGTERM"


def rank_process(job: Job, rank: int) -> int:
    for process in job.processes():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
            return process
    raise AssertionError(f"no process of rank {rank}")
