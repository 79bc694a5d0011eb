"""The job's TCPStore: opened on the master, joined by everyone else. Knows no ranks and no recipes.

A question to a store whose machine is gone may block for minutes, so whoever must stay awake asks in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from executor.errors import UserError
from executor.host.machine import Machine
from executor.host.nodes import PORTS

logger = logging.getLogger(__name__)

ANSWER_S = 30
"""How long one question to the store may take before its connection counts as broken."""
CONNECT_S = 10
"""How long something that listens may take to show that it is a store."""
JOIN_S = 600
"""How long everyone waits for each other; the commands are typed by hand on every node."""
REMIND_S = 20
POLL_S = 0.1
BACKLOG = 512
"""Connections that may wait: every rank of a big job comes at once."""
BROKEN = (DistError, RuntimeError, OSError)
"""What a call raises when the store is gone."""

T = TypeVar("T")


def serve(address: str, port: int, machine: Machine) -> tuple[Store, int]:
    """Open the store on this node; `port` 0 is the first free one of PORTS. UserError where none is."""
    for candidate in [port] if port else PORTS:
        if not machine.port_is_free(candidate):
            continue
        try:
            return connect(address, candidate, is_server=True), candidate
        except BROKEN as error:  # taken between the look and the use
            logger.debug("port %d: %s", candidate, error)
    if port:
        raise UserError(
            f"the master port {port} is taken on this node: an earlier job may still run (ss -ltnp 'sport = :{port}' "
            "names its process); end it, or set MASTER_PORT to a free port, alike on every node"
        )
    raise UserError(
        f"the ports {PORTS[0]} to {PORTS[-1]} are all taken: earlier jobs may still run; end them, or set MASTER_PORT"
    )


def join(address: str, port: int, timeout_s: float = JOIN_S) -> Store:
    """Connect to the master's store, waiting for the master to start. UserError when it does not come."""
    started = reminded = time.monotonic()
    while True:
        try:
            with socket.create_connection((address, port), timeout=3):
                break
        except OSError as error:
            now = time.monotonic()
            if now - started > timeout_s:
                raise UserError(
                    f"the master {address} did not answer on port {port} for {timeout_s:.0f} s ({error}): type the "
                    "same command there (see what it printed), and check that no firewall closes the port"
                ) from None
            if now - reminded > REMIND_S:
                reminded = now
                logger.info("waiting for the master %s, port %d: type the same command there", address, port)
            time.sleep(POLL_S)
    try:
        return connect(address, port)
    except BROKEN as error:
        raise UserError(
            f"what answers on the master {address}, port {port}, is no job of this project ({first_line(error)}): end "
            "it, or set MASTER_PORT to a free port, alike on every node"
        ) from None


def connect(address: str, port: int, is_server: bool = False) -> Store:
    """A connection of its own, which every thread needs. A server shares its port with torch.distributed's own store
    in the same process (multi_tenant)."""
    store = TCPStore(
        address,
        port,
        is_master=is_server,
        timeout=timedelta(seconds=CONNECT_S),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=_listen(address, port) if is_server else None,
    )
    store.set_timeout(timedelta(seconds=ANSWER_S))
    return PrefixStore("recipe", store)


def _listen(address: str, port: int) -> int:
    """A socket, which the store takes over, that listens on `address` alone: left to itself a store, which asks for no
    password, listens on every network of the machine."""
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with contextlib.closing(socket.socket(family, kind, protocol)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # A name that leads here by way of another machine (a service's), which torchrun or Slurm has given.
            logger.warning("%s is no address of this machine: the job's store listens on all of its networks", address)
            server.bind(("", port))
        server.listen(BACKLOG)
        return server.detach()


def wait_for(
    store: Store,
    keys: Iterable[str],
    timeout_s: float,
    remind: Callable[[list[str]], str] | None = None,
    meanwhile: Callable[[list[str]], object] = lambda missing: None,
) -> list[str]:
    """Wait until all keys are set; returns those that are not after `timeout_s`. `remind` words what is missing,
    `meanwhile` gets it often.
    """
    missing, started = list(keys), time.monotonic()
    reminded = started
    while True:
        missing = [key for key in missing if not store.check([key])]
        now = time.monotonic()
        if not missing or now - started > timeout_s:
            return missing
        if remind and now - reminded > REMIND_S:
            reminded = now
            logger.info(remind(missing))
        meanwhile(missing)
        time.sleep(POLL_S)


def in_thread(action: Callable[[], T]) -> Future[T]:
    """Run what may block in a thread that nobody has to wait for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # the one who asks gets it
            future.set_exception(error)

    threading.Thread(target=work, name="store: question", daemon=True).start()
    return future


def soon(action: Callable[[], T], within_s: float) -> T | None:
    """The result of `action`; None where the store is gone or does not answer in time."""
    try:
        return in_thread(action).result(within_s)
    except (TimeoutError, *BROKEN):
        return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
