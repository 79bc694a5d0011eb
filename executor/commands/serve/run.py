"""The `serve` command: the recipe's model behind HTTP."""

import asyncio
import logging
from typing import Any

from executor.host.env import rank_place
from executor.recipe.schema import Recipe
from executor.recipe.settle import prepare
from executor.serve.server import listen

logger = logging.getLogger(__name__)


def run(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Serve until SIGTERM; returns the JSON document and the exit status."""
    from executor.commands.build import engine_of, open_rank, request_limits
    from executor.engine.loop import EngineLoop

    place = rank_place()
    prepared = prepare(recipe, place.local_world_size)
    listener = None if place.rank else listen(recipe.server)
    device, parallel = open_rank(prepared)
    with engine_of(prepared, device, parallel, limits=request_limits(recipe)) as engine:
        if place.rank:
            engine.follow()
            return {"command": "serve"}, 0
        most = prepared.recipe.scheduler.max_num_seqs + recipe.server.max_queued_requests
        with EngineLoop(engine, max_unfinished=most) as loop:
            asyncio.run(_serve(prepared.recipe, loop.start(), listener))
    return {"command": "serve", "model": recipe.model.model_path}, 0


async def _serve(recipe: Recipe, loop: Any, listener: Any) -> None:
    from executor.serve.app import build_app
    from executor.serve.backends import EngineBackend
    from executor.serve.server import serve
    from executor.serve.service import Service
    from executor.serve.settings import greeting

    engine = loop.engine
    service = Service(recipe, engine.processor, engine.vocab_size, EngineBackend(loop, asyncio.get_running_loop()))
    for line, is_warning in greeting(service, listener.getsockname()[1]):
        logger.log(logging.WARNING if is_warning else logging.INFO, "%s", line)
    await serve(build_app(service), service, listener)
