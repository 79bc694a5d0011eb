"""`serve` over a Ray cluster: this process has the HTTP, jobs of the whole recipe on the cluster's nodes answer.

The leaders of each job call here (executor.serve.gate); the settled recipe comes from them, as this machine may have
no chip. A job that dies is started again while the others serve.
"""

import asyncio
import logging
import signal
from collections.abc import Iterable
from typing import Any

from executor.cluster.jobs import Jobs
from executor.cluster.process import End
from executor.cluster.ray_cluster import RayCluster
from executor.commands.serve.front import open_door, router_of
from executor.errors import UserError
from executor.host.env import code_digest
from executor.prompt.options import media_options
from executor.recipe.schema import Recipe, build_recipe
from executor.serve.gate import Gate, Peer
from executor.serve.listener import SIGNALS, interrupt, listen
from executor.serve.remote import RemoteBackend
from executor.serve.router import Router
from executor.serve.service import Service

logger = logging.getLogger(__name__)

END_S = 15.0
"""How long jobs that have been let go may take to end."""


def run_cluster(recipe: Recipe) -> tuple[dict[str, Any], int]:
    """Serve until SIGTERM; returns the JSON document and the exit status."""
    import uvloop

    listener = listen(recipe.server)
    num_jobs = recipe.num_jobs("serve")
    with RayCluster(recipe, num_jobs) as cluster:
        signal.signal(signal.SIGTERM, interrupt)  # Ray has set its own
        document = uvloop.run(serve_over(cluster, recipe, num_jobs, listener))
    return document | {"replicas": num_jobs}, 0


async def serve_over(
    cluster: Any, recipe: Recipe, num_jobs: int, listener: Any, signals: Iterable[signal.Signals] = SIGNALS
) -> dict[str, Any]:
    """HTTP over `num_jobs` jobs on a cluster (executor.cluster.jobs), until one of `signals`; returns the document."""
    fleet = Fleet(recipe, num_jobs)
    gate = await Gate.open(cluster.address, fleet.on_peer)
    event_loop = asyncio.get_running_loop()

    def on_end(number: int, end: End) -> None:
        event_loop.call_soon_threadsafe(fleet.on_end, number, end)

    jobs = Jobs(cluster, num_jobs, "serve", {"RECIPE_FRONT": gate.front.to_text()}, on_end)
    try:
        await fleet.settled.wait()
        fleet.check()
        jobs.check()
        jobs.are_up = True
        logger.info("%d jobs share the requests", num_jobs)
        fleet.service = service_of(fleet.recipe, fleet.router)
        return await open_door(fleet.service, listener, signals)
    finally:
        await fleet.end()
        gate.close()
        await asyncio.to_thread(jobs.stop, END_S if jobs.are_up else 0.0)


def service_of(recipe: Recipe, router: Router) -> Service:
    """The service over jobs elsewhere: of the checkpoint nothing but its processor is read here."""
    from executor.checkpoint.folder import find_checkpoint
    from executor.recipe.settle import read_folder
    from models.registry import family_runner

    folder = find_checkpoint(recipe.model.model_path, recipe.model.hub)
    config, _, shapes = read_folder(folder, recipe.model.model_path)
    processor = family_runner(config).build_processor(folder, media_options(recipe))
    return Service(recipe, processor, shapes.vocab_size, router)


class Fleet:
    """The jobs as the front door sees them: each is there when all its leaders are, and lost with the first of them.

    All of it is called in the event loop's thread.
    """

    def __init__(self, recipe: Recipe, num_jobs: int) -> None:
        self.recipe = recipe
        self.router: Router | None = None  # once a leader has said what the recipe is
        self.service: Service | None = None  # once all jobs were there
        self.settled = asyncio.Event()  # all jobs are up, or one cannot come up
        self._num_jobs = num_jobs
        self._leaders: dict[int, dict[int, RemoteBackend]] = {number: {} for number in range(num_jobs)}
        self._complete: set[int] = set()
        self._fault: UserError | None = None

    async def on_peer(self, peer: Peer) -> None:
        """Serves one leader's connection."""
        hello = peer.hello
        number, leader, leaders = hello["replica"], hello["leader"], hello["leaders"]
        if hello["code"] != code_digest():
            self._fault = UserError(
                f"job {number} runs other code than this machine; put the same version of this repository on every node"
            )
            self.settled.set()
            return
        if self.router is None:
            self.recipe = build_recipe(hello["recipe"]).replace(server=self.recipe.server.model_dump())
            self.router = router_of(self.recipe, survives=True)
        name = f"job {number}" + (f", replica {leader}" if leaders > 1 else "")
        backend = RemoteBackend(peer, name)
        group = self._leaders[number]
        group[leader] = backend
        if len(group) == leaders:
            for each in group.values():
                self.router.add(each)
            self._complete.add(number)
            logger.info("job %d is up: %d of %d", number, len(self._complete), self._num_jobs)
            if len(self._complete) == self._num_jobs:
                self.settled.set()
        self._note_readiness()
        await backend.run()
        if group is self._leaders[number]:
            self._lose(number, backend.fault)

    def on_end(self, number: int, end: End) -> None:
        """Its process has ended, or its node is gone, which no connection may have told."""
        self._lose(number, end.words)
        self.settled.set()

    def check(self) -> None:
        if self._fault is not None:
            raise self._fault

    async def end(self) -> None:
        """Let all of them go."""
        groups, self._leaders = self._leaders, {number: {} for number in self._leaders}
        await asyncio.gather(*(backend.end() for group in groups.values() for backend in group.values()))

    def _lose(self, number: int, reason: str) -> None:
        group, self._leaders[number] = self._leaders[number], {}
        self._complete.discard(number)
        for backend in group.values():
            self.router.remove(backend)
        self._note_readiness()
        for backend in group.values():
            backend.lose(reason)

    def _note_readiness(self) -> None:
        """/health says whether a request would be answered now."""
        if self.service is not None:
            self.service.is_ready = bool(self._complete)
