"""The `serve` command: the recipe's model behind HTTP.

Rank 0 listens. Where `attn_tp_size` makes several replicas of a job, each one's leader answers requests; those of rank
0's front door travel to the others by `executor.serve.remote`. A job that a Ray cluster has started
(executor.commands.serve.cluster) has no HTTP: all its leaders attend the cluster's front door.
"""

import asyncio
import logging
import signal
from contextlib import AsyncExitStack
from typing import Any

from executor.host.env import environment, rank_place
from executor.recipe.schema import Recipe
from executor.recipe.settle import prepare
from executor.serve.server import SIGNALS, listen

logger = logging.getLogger(__name__)

FRONT_KEY = "serve/front"  # in the job's store


def run(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Serve until SIGTERM; returns the JSON document and the exit status."""
    from executor.commands.build import engine_of, open_rank
    from executor.engine.loop import EngineLoop

    place = rank_place()
    listener = listen(recipe.server) if place.rank == 0 else None
    if place.rank or "RECIPE_LAUNCHER" in environment():
        for number in SIGNALS:  # of a whole control group, say: rank 0 ends the job, its launcher tells it when
            signal.signal(number, signal.SIG_IGN)
    prepared = prepare(recipe, place.local_world_size)
    device, parallel = open_rank(prepared)
    with engine_of(prepared, device, parallel) as engine:
        if not parallel.leads:
            engine.follow()
            return {"command": "serve"}, 0
        most = None
        if parallel.replicas.size == 1:
            most = prepared.recipe.scheduler.max_num_seqs + recipe.server.max_queued_requests
        with EngineLoop(engine, max_unfinished=most) as loop:
            loop.start()
            if place.rank:
                asyncio.run(_attend(loop, parallel))
                return {"command": "serve"}, 0
            asyncio.run(_serve(prepared.recipe, loop, parallel, listener))
    return {"command": "serve", "model": recipe.model.model_path}, 0


async def _serve(recipe: Recipe, loop: Any, parallel: Any, listener: Any) -> None:
    """Rank 0: HTTP over the replicas of this job."""
    from executor.serve.app import build_app
    from executor.serve.backends import EngineBackend
    from executor.serve.server import serve
    from executor.serve.service import Service

    engine = loop.engine
    async with AsyncExitStack() as replicas:
        backend = EngineBackend(loop, asyncio.get_running_loop())
        if parallel.replicas.size > 1:
            backend = await _with_others(backend, recipe, parallel, replicas)
        service = Service(recipe, engine.processor, engine.vocab_size, backend)
        host, port = listener.getsockname()[:2]
        logger.info("serving %s at http://%s:%d", service.model_name, host, port)
        signals = (signal.SIGUSR1,) if "RECIPE_LAUNCHER" in environment() else SIGNALS
        await serve(build_app(service), service, listener, signals)


async def _with_others(backend: Any, recipe: Recipe, parallel: Any, replicas: AsyncExitStack) -> Any:
    """This rank's engine and those of the other replicas as one backend. `replicas`, when it ends, lets them go."""
    from executor.serve.gate import Gate, Peer
    from executor.serve.remote import RemoteBackend
    from executor.serve.router import Router, slack_of

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
    parallel.store.set(FRONT_KEY, gate.front.to_text())
    await is_complete.wait()
    for other in others.values():
        replicas.push_async_callback(other.end)
    logger.info("%d replicas share the requests", parallel.replicas.size)
    seats = recipe.scheduler.max_num_seqs
    return Router(
        [backend, *(others[rank] for rank in sorted(others))],
        max_unfinished=seats, max_queued=recipe.server.max_queued_requests, slack=slack_of(seats),
    )  # fmt: skip


async def _attend(loop: Any, parallel: Any) -> None:
    """Another replica's leader: answer what rank 0 asks."""
    from executor.serve.backends import EngineBackend
    from executor.serve.gate import Front, call
    from executor.serve.remote import attend

    front = Front.from_text(await asyncio.to_thread(parallel.store.get, FRONT_KEY))
    peer = await call(front, {"rank": parallel.rank})
    await attend(peer, EngineBackend(loop, asyncio.get_running_loop()))
