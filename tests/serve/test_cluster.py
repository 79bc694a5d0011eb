"""`serve` over jobs that die: the others serve, what had not begun is asked again, the dead one comes back."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from executor.cluster import jobs
from executor.commands.serve.cluster import serve_over
from executor.commands.serve.front import find_front
from executor.errors import UserError
from executor.parallel.groups import Parallel
from executor.recipe.schema import build_recipe
from executor.serve.gate import call
from executor.serve.listener import listen
from executor.serve.remote import attend
from tests.cluster.fakes import FakeCluster, FakeJob
from tests.serve.fakes import DONE, FakeBackend

RECIPE = build_recipe(
    {
        "model_config": {"model_path": "models/tiny/qwen3_vl", "device": "cpu", "dtype": "float32"},
        "scheduler_config": {"max_model_len": 2048},
        "server_config": {"port": 0, "replicas": 2, "drain_timeout_s": 5, "served_model_name": "tiny"},
    }
)
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


class Echo(FakeBackend):
    """Answers with its own name, at once; what is named "wait" when the test says so."""

    def __init__(self, job: FakeJob) -> None:
        super().__init__(f"job {job.number}")
        self.job, self.loop = job, asyncio.get_running_loop()

    def ask(self, ask):
        feed = super().ask(ask)
        if "wait" not in str(ask.prompt.messages[-1]):
            self.loop.call_soon(self.answer, ask.id)
        return feed

    def answer(self, request_id: str) -> None:
        self.say(request_id, self.name)
        self.end(request_id, DONE)


@dataclass
class Crowd:
    """A served cluster of two: its client, its jobs, and what each has been asked (the latest backend of a number)."""

    http: httpx.Client
    cluster: FakeCluster
    backends: dict[int, Echo]

    def text(self, content: str = "hello", **fields: object) -> str:
        reply = self.http.post("/v1/chat/completions", json=HELLO | fields | {"messages": message(content)})
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    def health(self) -> int:
        return self.http.get("/health").status_code


def message(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def until(found: Callable[[], object], within_s: float = 20) -> None:
    limit_s = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < limit_s
        time.sleep(0.005)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    """Two jobs whose leaders are threads, and the front door in a third."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)
    monkeypatch.setattr(jobs, "FIRST_PAUSE_S", 0.05)
    backends: dict[int, Echo] = {}

    def body(job: FakeJob) -> None:
        asyncio.run(leader(job))

    async def leader(job: FakeJob) -> None:
        front, hello = await find_front(
            RECIPE.replace(server={"replicas": None, "served_model_name": None}), Parallel(), job.variables
        )
        backends[job.number] = backend = Echo(job)
        attending = asyncio.ensure_future(attend(await call(front, hello), backend))
        while not attending.done() and not job.dying.is_set():
            await asyncio.sleep(0.005)
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)

    cluster, listener = FakeCluster(body), listen(RECIPE.server)
    event_loop = asyncio.new_event_loop()
    serving = event_loop.create_task(serve_over(cluster, RECIPE, 2, listener, signals=()))

    def serve() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            event_loop.run_until_complete(serving)

    thread = threading.Thread(target=serve)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as http:
        until(lambda: answers(http))
        yield Crowd(http, cluster, backends)
    event_loop.call_soon_threadsafe(serving.cancel)
    thread.join(30)
    assert not thread.is_alive()
    event_loop.close()


def answers(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return http.get("/health").status_code == 200
    return False


def test_two_jobs_share_and_a_conversation_stays(crowd: Crowd) -> None:
    assert crowd.health() == 200
    assert crowd.http.get("/v1/models").json()["data"][0]["id"] == "tiny", "what the front door's own recipe says"
    assert {crowd.text(f"question {number}") for number in range(4)} == {"job 0", "job 1"}
    for number in range(4):
        turns = [*message(f"talk {number}"), {"role": "assistant", "content": "x"}, *message("and?")]
        first = crowd.text(f"talk {number}")
        reply = crowd.http.post("/v1/chat/completions", json=HELLO | {"messages": turns})
        assert reply.json()["choices"][0]["message"]["content"] == first


def test_a_dead_job_s_requests_go_elsewhere_and_it_comes_back(crowd: Crowd) -> None:
    first, second = crowd.backends[0], crowd.backends[1]
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(crowd.http.post("/v1/chat/completions", json=HELLO | {"messages": message("wait a while")}))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: first.feeds or second.feeds)
    dead, other = (first, second) if first.feeds else (second, first)
    crowd.cluster.refusal = "no node has room"
    dead.job.die()
    until(lambda: other.feeds)
    assert crowd.health() == 200
    assert {crowd.text(f"question {number}") for number in range(3)} == {other.name}
    other.loop.call_soon_threadsafe(other.answer, next(iter(other.feeds)))
    asking.join(20)
    assert found[0].json()["choices"][0]["message"]["content"] == other.name
    crowd.cluster.refusal = None
    until(lambda: crowd.backends[dead.job.number] is not dead)
    until(lambda: len({crowd.text(f"again {number} {time.monotonic()}") for number in range(4)}) == 2)


def test_a_begun_answer_of_a_dead_job_is_broken_and_no_job_at_all_is_not_healthy(crowd: Crowd) -> None:
    body = HELLO | {"messages": message("wait, as a stream"), "stream": True}

    def begin() -> None:
        until(lambda: any(each.feeds for each in crowd.backends.values()))
        dead = next(each for each in crowd.backends.values() if each.feeds)
        dead.loop.call_soon_threadsafe(dead.say, next(iter(dead.feeds)), "Once upon")

    threading.Thread(target=begin).start()  # nothing is sent before the first token
    with crowd.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert "Once upon" in next(lines)
        crowd.cluster.refusal = "no node has room"
        for each in crowd.backends.values():
            each.job.die()
        assert "is lost" in next(lines)
        with pytest.raises(httpx.RemoteProtocolError):
            next(lines)
    until(lambda: crowd.health() == 503)
    refused = crowd.http.post("/v1/chat/completions", json=HELLO)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    crowd.cluster.refusal = None
    until(lambda: crowd.health() == 200)
    assert crowd.text("are you there?") in ("job 0", "job 1")


def test_a_job_that_cannot_start_ends_the_server_with_its_reason() -> None:
    cluster = FakeCluster(lambda job: job.die("model_config.model_path: there is no folder", 2))
    with pytest.raises(UserError, match="job .: model_config.model_path: there is no folder"):
        asyncio.run(serve_over(cluster, RECIPE, 2, listen(RECIPE.server), signals=()))
