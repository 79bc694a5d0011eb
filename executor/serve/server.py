"""The server's life: listens, becomes ready, drains at the first SIGTERM, stops at the second."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterable

import uvicorn
from fastapi import FastAPI

from executor.errors import EngineEnded
from executor.recipe.schema import ServerSection
from executor.serve.connection import KEEP_ALIVE_S, Connection, Server
from executor.serve.listener import BACKLOG, SIGNALS
from executor.serve.service import Service

logger = logging.getLogger(__name__)

POLL_S = 0.05
CLOSE_S = 2.0  # that a client has to read the last of its answer, once nothing more is computed


def config_of(app: FastAPI, settings: ServerSection) -> uvicorn.Config:
    """How HTTP is spoken. `access_log`: the application writes its own."""
    return uvicorn.Config(
        app, log_config=None, access_log=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S, lifespan="off",
        ws="none", http=Connection, ssl_certfile=settings.ssl_certfile, ssl_keyfile=settings.ssl_keyfile,
        server_header=False,
    )  # fmt: skip


async def serve(
    app: FastAPI, service: Service, listener: socket.socket, signals: Iterable[signal.Signals] = SIGNALS
) -> None:
    """Until one of `signals`, or the backend's fault: EngineEnded then. The first signal lets what runs come to its
    end within drain_timeout_s; a second one, and the end of that time, ends it at once."""
    settings = service.recipe.server
    server = Server(config_of(app, settings))
    loop = asyncio.get_running_loop()
    hurried = asyncio.Event()

    def on_signal() -> None:
        if service.is_draining:
            hurried.set()
        else:
            logger.info("the server takes no new requests; %d are answered to their end", service.num_open)
        service.is_draining = True

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        service.is_ready = True
        while not running.done() and not service.is_draining and service.backend.fault is None:
            await asyncio.sleep(POLL_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_timeout_s):
                while service.num_open and not hurried.is_set() and service.backend.fault is None:
                    await asyncio.sleep(POLL_S)
    finally:
        service.is_draining = True
        fault = service.backend.fault
        service.end_all(f"the engine has ended: {fault}" if fault else "the server was stopped meanwhile")
        server.should_exit = True
        await _closed(server, running)
        for number in signals:
            loop.remove_signal_handler(number)
    if fault is not None:
        raise EngineEnded(f"the engine has ended: {fault}")


async def _closed(server: Server, running: asyncio.Future[None]) -> None:
    """HTTP has come to its end: connections that go on by themselves are cut."""
    await asyncio.wait((running,), timeout=CLOSE_S)
    server.force_exit = True
    await running
