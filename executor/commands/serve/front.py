"""The front door and the leaders of a job's replicas: how they find each other, and how HTTP is opened over them."""

import asyncio
import logging
import signal
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from executor.cluster.leader import front_and_hello
from executor.host.env import environment
from executor.recipe.schema import Recipe
from executor.serve.app import build_app
from executor.serve.backends import Backend
from executor.serve.gate import Front, Gate, Peer
from executor.serve.listener import SIGNALS
from executor.serve.remote import RemoteBackend
from executor.serve.router import Router, slack_of
from executor.serve.server import serve
from executor.serve.service import Service
from executor.serve.settings import greeting, url_of

logger = logging.getLogger(__name__)

KEY = "serve/front"  # in the job's store


async def open_door(service: Service, listener: Any, signals: Iterable[signal.Signals] = SIGNALS) -> dict[str, Any]:
    """HTTP until one of `signals`; returns the command's document. Raises RuntimeError for the backend's fault."""
    address = url_of(service.recipe.server, listener.getsockname()[1])
    for line, is_warning in greeting(service, listener.getsockname()[1]):
        logger.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
    await serve(build_app(service), service, listener, signals)
    return {
        "command": "serve",
        "model": service.recipe.model.model_path,
        "address": address,
        "requests": service.num_answered + service.num_failed,
        "answered": service.num_answered,
        "failed": service.num_failed,
    }


async def with_others(backend: Backend, recipe: Recipe, parallel: Any, replicas: AsyncExitStack) -> Router:
    """Rank 0's engine and those of its job's other replicas as one. The end of `replicas` lets those go."""
    others: dict[int, RemoteBackend] = {}
    is_complete = asyncio.Event()

    async def on_peer(peer: Peer) -> None:
        rank = peer.hello["rank"]
        others[rank] = RemoteBackend(peer, f"the replica of rank {rank}")
        if len(others) == parallel.replicas.size - 1:
            is_complete.set()
        await others[rank].run()

    gate = await Gate.open(environment().get("MASTER_ADDR", "127.0.0.1"), on_peer)
    replicas.callback(gate.close)
    parallel.store.set(KEY, gate.front.to_text())
    await is_complete.wait()
    for other in others.values():
        replicas.push_async_callback(other.end)
    logger.info("%d replicas share the requests", parallel.replicas.size)
    return router_of(recipe, [backend, *(others[rank] for rank in sorted(others))])


def router_of(recipe: Recipe, backends: Iterable[Backend] = (), *, survives: bool = False) -> Router:
    """By a settled recipe's sizes."""
    seats = recipe.scheduler.max_num_seqs
    return Router(
        list(backends), max_unfinished=seats, max_queued=recipe.server.max_queued_requests, slack=slack_of(seats),
        survives=survives,
    )  # fmt: skip


async def find_front(recipe: Recipe, parallel: Any, variables: Mapping[str, str]) -> tuple[Front, dict[str, Any]]:
    """Where this leader is to go, and what it says there: to its cluster's front door, or to rank 0's.

    `variables`: the environment.
    """
    if "RECIPE_FRONT" not in variables:
        return Front.from_text(await asyncio.to_thread(parallel.store.get, KEY)), {"rank": parallel.rank}
    return front_and_hello(recipe, parallel, variables)
