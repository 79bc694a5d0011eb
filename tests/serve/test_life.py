"""A server's life: ready when the first request is answered at once, draining, stopped, or ended by its engine."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from executor.engine.engine import Engine
from executor.engine.loop import EngineLoop
from executor.recipe.schema import build_recipe
from executor.serve.app import build_app
from executor.serve.backends import EngineBackend
from executor.serve.listener import listen
from executor.serve.server import serve
from executor.serve.service import Service
from executor.serve.settings import url_of
from executor.serve.warmup import warm_up
from tests.reference import REPO
from tests.serve.conftest import TINY, start

CHAT = "/v1/chat/completions"
LIMIT_S = 60


def asked(num_tokens: int) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip


def said_at_the_end(lines: list[str]) -> str:
    """The error that a stream ended with."""
    return json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]["message"]


def until(is_done) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def status(http: httpx.Client) -> int | None:
    try:
        return http.get("/health", timeout=2).status_code
    except httpx.TransportError:
        return None


class Command:
    """`serve` as a process of its own."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "executor", "config/quickstart.yaml", "serve", "--set", "server_config.port=0",
                 *(word for each in settings for word in ("--set", each))],
                cwd=REPO, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def says(self, words: str) -> str | None:
        """What follows `words` in its log, once it is there."""
        return next((line.split(words)[1] for line in self.log.read_text().splitlines() if words in line), None)

    def url(self) -> str:
        until(lambda: self.says("serving ") or self.process.poll() is not None)
        return self.says(" at ").split(";")[0]

    def end(self) -> tuple[int, dict[str, object]]:
        out, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, json.loads(out.splitlines()[-1])


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    started = Command(tmp_path)
    yield started
    started.process.kill()
    started.process.wait()


@contextmanager
def streaming(url: str, num_tokens: int) -> Iterator[tuple[httpx.Client, Iterator[str]]]:
    """A stream whose first event has come, and a client for other requests."""
    with (
        httpx.Client(base_url=url, timeout=LIMIT_S) as http,
        http.stream("POST", CHAT, json=asked(num_tokens)) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines).startswith("data: {")
        yield http, lines


def test_a_signal_lets_what_runs_end_and_takes_nothing_new(command: Command) -> None:
    with streaming(command.url(), 300) as (http, lines):
        command.process.send_signal(signal.SIGTERM)
        until(lambda: status(http) == 503)
        refused = http.post(CHAT, json=asked(1))
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert "stopped" in refused.json()["error"]["message"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and len(rest) > 100
    code, document = command.end()
    assert code == 0
    assert document["command"] == "serve" and document["model"] == "models/tiny/qwen3_vl"
    assert document["address"].startswith("http://127.0.0.1:")
    assert (document["requests"], document["answered"], document["failed"]) == (1, 1, 0)


def test_a_second_signal_stops_at_once(command: Command) -> None:
    with streaming(command.url(), 2000) as (http, lines):
        command.process.send_signal(signal.SIGINT)
        until(lambda: status(http) == 503)
        command.process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):  # the answer is not whole, and says so
            rest = []
            for line in lines:
                rest.append(line)
    assert "stopped" in said_at_the_end(rest)
    code, document = command.end()
    assert code == 0 and (document["answered"], document["failed"]) == (0, 1)


def test_a_signal_while_the_model_is_loaded_ends_the_command(command: Command) -> None:
    until(lambda: command.says("settled by the checkpoint"))
    command.process.send_signal(signal.SIGTERM)
    code, document = command.end()
    assert code == 130 and document == {"command": "serve", "error": "interrupted: SIGTERM"}


# The same, from inside


@contextmanager
def serving(engine: Engine, **server: object) -> Iterator[tuple[httpx.Client, Service, list[BaseException | None]]]:
    """`serve` over an engine, in a thread; the list gets what it ends with."""
    recipe = build_recipe({"model_config": {"model_path": str(TINY)}, "scheduler_config": {"max_model_len": 2048},
                           "server_config": {"port": 0, **server}})  # fmt: skip
    listener, ended = listen(recipe.server), []
    url = url_of(recipe.server, listener.getsockname()[1])
    with EngineLoop(engine).start() as loop:
        made: list[Service] = []

        async def run() -> None:
            backend = EngineBackend(loop, asyncio.get_running_loop())
            made.append(Service(recipe, engine.processor, engine.vocab_size, backend))
            await serve(build_app(made[0]), made[0], listener, signals=())

        def target() -> None:
            try:
                asyncio.run(run())
                ended.append(None)
            except RuntimeError as error:
                ended.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        until(lambda: made and made[0].is_ready)
        with httpx.Client(base_url=url, timeout=LIMIT_S) as http:
            yield http, made[0], ended
        made[0].is_draining = True
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_what_is_not_answered_in_time_is_given_up_and_freed(tiny_engine: Engine) -> None:
    with serving(tiny_engine, drain_timeout_s=0.2) as (http, service, ended):
        with http.stream("POST", CHAT, json=asked(2000)) as reply:
            lines = reply.iter_lines()
            next(lines)
            service.is_draining = True
            with pytest.raises(httpx.RemoteProtocolError):
                rest = []
                for line in lines:
                    rest.append(line)
        assert "stopped" in said_at_the_end(rest)
        until(lambda: ended)
    assert ended == [None] and not tiny_engine.has_work
    tiny_engine.scheduler.check()


def test_an_engine_that_ends_is_told_to_everybody_and_ends_the_server(tiny_engine: Engine, monkeypatch) -> None:
    def broken(plan):
        raise AssertionError("out of order")

    with serving(tiny_engine) as (http, service, ended), monkeypatch.context() as patch:
        with http.stream("POST", CHAT, json=asked(2000)) as reply:
            lines = reply.iter_lines()
            next(lines)
            patch.setattr(tiny_engine.runner, "execute", broken)
            with pytest.raises(httpx.RemoteProtocolError):
                rest = []
                for line in lines:
                    rest.append(line)
        assert "out of order" in said_at_the_end(rest)
        answers = []
        while not ended and len(answers) < 20:  # a step that fails by itself is no reason to go; three are
            try:
                answers.append(http.post(CHAT, json={**asked(4), "stream": False}))
            except httpx.TransportError:
                break
        codes = [answer.status_code for answer in answers]
        num_failed = codes.count(500)  # 503: asked while it was ending already, which takes as long as it takes
        assert codes and num_failed <= 3 and codes == [500] * num_failed + [503] * (len(codes) - num_failed)
        until(lambda: ended)
    assert isinstance(ended[0], RuntimeError) and "the engine has ended: out of order" in str(ended[0])
    assert service.backend.fault == "out of order" and not tiny_engine.has_work


def test_a_test_that_fails_leaves_no_server_behind(tiny_engine: Engine) -> None:
    """Of the tests' own servers: the threads of one that is left would keep the process from ending."""
    threads, options = set(threading.enumerate()), tiny_engine.processor.options
    with (
        pytest.raises(ZeroDivisionError),
        start(tiny_engine, max_media_bytes=1) as server,
        server.http.stream("POST", CHAT, json=asked(1900)) as reply,
    ):
        next(reply.iter_lines())
        raise ZeroDivisionError
    left = [each for each in set(threading.enumerate()) - threads if not each.daemon]
    assert not left and not tiny_engine.has_work and tiny_engine.processor.options is options
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_health_says_no_from_the_moment_that_the_engine_has_ended(server) -> None:
    loop = server.service.backend.loop
    assert server.http.get("/health").status_code == 200
    loop.fault = RuntimeError("its thread has ended")
    try:
        reply = server.http.get("/health")
        assert reply.status_code == 503 and "its thread has ended" in reply.text
        assert server.http.post(CHAT, json=asked(1)).status_code == 503
    finally:
        loop.fault = None


def test_nothing_is_taken_before_the_server_is_ready(server, monkeypatch) -> None:
    monkeypatch.setattr(server.service, "is_ready", False)
    reply = server.http.post(CHAT, json=asked(1))
    assert reply.status_code == 503 and "retry-after" in reply.headers and "loaded" in reply.text
    assert server.http.get("/health").status_code == 503


def test_the_first_requests_are_a_text_and_a_picture(tiny_engine: Engine, caplog) -> None:
    async def run(loop: EngineLoop) -> None:
        await warm_up(EngineBackend(loop, asyncio.get_running_loop()))

    encoded, encode = [], tiny_engine.runner.encode
    with EngineLoop(tiny_engine).start() as loop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_engine.runner, "encode", lambda media: encoded.extend(media) or encode(media))
        asyncio.run(run(loop))
    assert len(encoded) == 1 and not [record for record in caplog.records if record.levelname == "WARNING"]
