"""A server over a tiny checkpoint, in a thread of the test's process."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest

from executor.commands.build import request_limits
from executor.engine.engine import Engine
from executor.engine.loop import EngineLoop
from executor.recipe.schema import Recipe, build_recipe
from executor.serve.app import build_app
from executor.serve.backends import EngineBackend
from executor.serve.connection import Server
from executor.serve.listener import listen
from executor.serve.server import config_of
from executor.serve.service import Service
from executor.serve.settings import url_of
from tests.engines import engine_over
from tests.reference import REPO

TINY = REPO / "models/tiny/qwen3_vl"


@dataclass
class Running:
    """A server that listens: `http` asks it, `service` and `engine` are what it is made of."""

    url: str
    http: httpx.Client
    service: Service
    engine: Engine


@contextmanager
def start(engine: Engine, *, data: dict[str, object] | None = None, **server: object) -> Iterator[Running]:
    """A server, until the context is left, however it is left. `server` changes fields of server_config.

    `data` changes fields of data_config. The engine reads media within the server's limits for as long as it runs.
    """
    sections = {"model_config": {"model_path": str(TINY)}, "scheduler_config": {"max_model_len": 2048}}
    recipe: Recipe = build_recipe({**sections, "server_config": {"port": 0, **server}, "data_config": data or {}})
    options = engine.processor.options
    engine.processor.options = replace(options, limits=request_limits(recipe))
    listener = listen(recipe.server)
    port = listener.getsockname()[1]
    event_loop = asyncio.new_event_loop()
    try:
        with EngineLoop(engine, max_unfinished=recipe.server.max_queued_requests) as loop:
            service = Service(recipe, engine.processor, engine.vocab_size, EngineBackend(loop.start(), event_loop))
            service.is_ready = True
            server_ = Server(config_of(build_app(service), recipe.server))
            thread = threading.Thread(target=event_loop.run_until_complete, args=(server_.serve(sockets=[listener]),))
            thread.start()
            try:
                url = url_of(recipe.server, port)
                with httpx.Client(base_url=url, timeout=60, verify=False) as http:
                    yield Running(url, http, service, engine)
            finally:
                server_.should_exit = True
                thread.join()
    finally:
        event_loop.close()
        engine.processor.options = options


def named_events(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream of named events holds; each one's name is its type."""
    with server.http.stream("POST", path, json=body) as reply:
        text = "".join(reply.iter_text())
    events = []
    for each in text.removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.fixture(scope="session")
def tiny_engine() -> Iterator[Engine]:
    with engine_over(TINY) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(tiny_engine: Engine) -> Iterator[Running]:
    with start(tiny_engine) as running:
        yield running
