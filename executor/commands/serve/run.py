"""The `serve` command: the recipe's model behind HTTP.

Rank 0 listens. Where `attn_tp_size` makes several replicas of a job each one's leader answers requests: rank 0's own
engine, and the others by `executor.serve.remote`. A job that a Ray cluster has started has no HTTP: all its leaders
attend the front door of the cluster (executor.commands.serve.cluster).
"""

import asyncio
import logging
import signal
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from executor.host.env import environment, rank_place
from executor.recipe.schema import Recipe
from executor.recipe.settle import Prepared, prepare
from executor.serve.listener import SIGNALS, interrupt, listen

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a step of the engine may take after everything else has ended."""


def run(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Serve until SIGTERM; returns the JSON document and the exit status."""
    if recipe.num_jobs("serve") > 1:
        from executor.commands.serve.cluster import run_cluster

        return run_cluster(recipe)
    import uvloop  # asyncio's own loop lets Python's lock go at every write, and has to wait for it again

    from executor.commands.build import engine_of, open_rank, request_limits
    from executor.engine.loop import EngineLoop

    place, variables = rank_place(), environment()
    listener = listen(recipe.server) if place.rank == 0 and "RECIPE_FRONT" not in variables else None
    if listener is None or "RECIPE_LAUNCHER" in variables:
        for number in SIGNALS:  # to a whole control group, say: whoever started this process ends it in good order
            signal.signal(number, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, interrupt)
    prepared = prepare(recipe, place.local_world_size)
    device, parallel = open_rank(prepared)
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(prepared, device, parallel, limits=request_limits(recipe)))
        if not parallel.leads:
            engine.follow()
            return {"command": "serve"}, 0
        most = None  # where a front door counts for several
        if parallel.replicas.size == 1:
            most = prepared.recipe.scheduler.max_num_seqs + recipe.server.max_queued_requests
        engine.runner.hold_profile(True)
        loop = EngineLoop(engine, max_unfinished=most).start()
        try:
            if listener is None:
                uvloop.run(_attend(prepared, loop, parallel))
                return {"command": "serve"}, 0
            return uvloop.run(_serve(prepared.recipe, loop, parallel, listener)), 0
        finally:
            if not loop.stop(patience_s=PATIENCE_S):
                logger.warning("a step of the engine goes on; this process ends without waiting for it")
                stack.pop_all()


async def _serve(recipe: Recipe, loop: Any, parallel: Any, listener: Any) -> dict[str, Any]:
    """Rank 0: HTTP over the replicas of this job. Returns the command's document."""
    from executor.commands.build import settle_memory
    from executor.commands.serve.front import open_door, with_others
    from executor.serve.backends import EngineBackend
    from executor.serve.service import Service
    from executor.serve.warmup import warm_up

    engine = loop.engine
    async with AsyncExitStack() as replicas:
        backend = EngineBackend(loop, asyncio.get_running_loop())
        await warm_up(backend)
        engine.end_warm_up()
        settle_memory()  # once more: of what the first requests have imported and made
        if parallel.replicas.size > 1:
            backend = await with_others(backend, recipe, parallel, replicas)
        signals = (signal.SIGUSR1,) if "RECIPE_LAUNCHER" in environment() else SIGNALS
        service = Service(recipe, engine.processor, engine.vocab_size, backend)
        return await open_door(service, listener, signals)


async def _attend(prepared: Prepared, loop: Any, parallel: Any) -> None:
    """Any other leader: answer what the front door asks."""
    from executor.commands.build import settle_memory
    from executor.commands.serve.front import find_front
    from executor.serve.backends import EngineBackend
    from executor.serve.gate import call
    from executor.serve.remote import attend
    from executor.serve.warmup import warm_up

    backend = EngineBackend(loop, asyncio.get_running_loop())
    await warm_up(backend)
    loop.engine.end_warm_up()
    settle_memory()
    front, hello = await find_front(prepared.recipe, parallel, environment())
    await attend(await call(front, hello), backend)
