"""A client that hangs up: everything of its request is free one step later, wherever the request was."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from executor.engine.handle import Handle
from tests.reference import REPO
from tests.serve.conftest import Running, start
from tests.serve.test_life import CHAT, asked, until

PICTURE = REPO / "dataset/media/objects.png"


class Watched:
    """When a request was given up, and which steps began after that."""

    def __init__(self, server: Running, patch: pytest.MonkeyPatch) -> None:
        self.engine = server.engine
        self.loop = server.service.backend.loop
        self.given_up: list[float] = []
        self.steps: list[tuple[float, int]] = []  # when it began, and of how many rows
        abort, execute = Handle.abort, self.engine.runner.execute

        def noted(handle: Handle) -> None:
            if not handle.ended and not handle.is_aborted:
                self.given_up.append(time.monotonic())
            abort(handle)

        def counted(plan):
            self.steps.append((time.monotonic(), len(plan.rows)))
            return execute(plan)

        patch.setattr(Handle, "abort", noted)
        patch.setattr(self.engine.runner, "execute", counted)

    def is_over(self) -> bool:
        return bool(self.given_up) and not self.loop.num_unfinished

    def check(self, others: int = 0) -> None:
        """At most one step after it was given up had a row of it."""
        after = [rows for began, rows in self.steps if self.given_up and began > self.given_up[0]]
        assert sum(rows > others for rows in after) <= 1, f"rows of the steps after it was given up: {after}"
        self.engine.scheduler.check()


@pytest.fixture
def watched(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched(server, monkeypatch)
    yield watched
    until(lambda: not watched.loop.num_unfinished and not server.engine.has_work)
    pool = server.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    server.engine.scheduler.check()  # of the encoder's entries too: nobody holds any


@contextmanager
def connection(server: Running, body: dict[str, object]) -> Iterator[Callable[[], None]]:
    """A request in a thread of its own; what is given hangs up."""
    http = httpx.Client(base_url=server.url, timeout=60)

    def ask() -> None:
        with pytest.raises(httpx.TransportError), http.stream("POST", CHAT, json=body) as reply:
            for _ in reply.iter_bytes():
                pass

    thread = threading.Thread(target=ask)
    thread.start()

    def hang_up() -> None:
        for connection in http._transport._pool.connections:
            connection._connection._network_stream._sock.shutdown(2)

    yield hang_up
    thread.join(60)
    http.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("media", [False, True])
def test_while_it_is_answered(server: Running, watched: Watched, stream: bool, media: bool) -> None:
    body = {**asked(1500), "stream": stream}
    if media:
        parts = [{"type": "image_url", "image_url": {"url": data_url()}}, {"type": "text", "text": "Count."}]
        body["messages"] = [{"role": "user", "content": parts}]
    with connection(server, body) as hang_up:
        until(lambda: len(watched.steps) > 5)
        hang_up()
        until(watched.is_over)
    watched.check()


def test_while_others_go_on(server: Running, watched: Watched) -> None:
    with connection(server, asked(1500)) as hang_up, server.http.stream("POST", CHAT, json=asked(300)) as other:
        lines = other.iter_lines()
        next(lines)
        until(lambda: watched.steps and watched.steps[-1][1] == 2)
        hang_up()
        until(lambda: watched.loop.num_unfinished == 1)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
    watched.check(others=1)


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_is_prepared(server: Running, watched: Watched, monkeypatch, stream: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()
    build = server.engine.processor.build

    def slow(messages, **options):
        begun.set()
        assert go_on.wait(60)
        return build(messages, **options)

    monkeypatch.setattr(server.engine.processor, "build", slow)
    with connection(server, {**asked(50), "stream": stream}) as hang_up:
        assert begun.wait(60)
        hang_up()
        until(watched.is_over)
        go_on.set()
    assert watched.steps == []


def test_while_it_waits(server: Running, watched: Watched, monkeypatch) -> None:
    monkeypatch.setattr(watched.loop._lanes, "_max_taken", 0)
    with connection(server, asked(50)) as hang_up:
        until(lambda: watched.loop.num_unfinished)
        hang_up()
        until(watched.is_over)
    assert watched.steps == [] and not any(watched.loop._lanes._waiting.values())


def test_when_its_time_is_over(tiny_engine, monkeypatch) -> None:
    with start(tiny_engine, request_timeout_s=0.3) as server:
        whole = server.http.post(CHAT, json={**asked(1900), "stream": False})
        assert whole.status_code == 504 and "time" in whole.json()["error"]["message"]
        until(lambda: not tiny_engine.has_work)
        tiny_engine.scheduler.check()
        until(lambda: server.http.post(CHAT, json={**asked(1), "stream": False}).status_code == 200)


def test_a_full_queue_says_when_to_come_again(tiny_engine) -> None:
    with (
        start(tiny_engine, max_queued_requests=1) as server,
        server.http.stream("POST", CHAT, json=asked(1900)) as reply,
    ):
        lines = reply.iter_lines()  # its end would be the connection's
        next(lines)
        refused = server.http.post(CHAT, json=asked(4))
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "server_busy"


def data_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
