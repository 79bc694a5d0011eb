"""A data set over a Ray cluster: this process reads the data set, deals its rows out, and has the results.

Jobs of the whole recipe on the cluster's nodes answer (executor.commands.generate.front). A row that cannot be
answered fails alone; rows of a job that has died are answered by the others, and by itself when it is back.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from dataset.sample import Dataset
from executor.cluster.jobs import Jobs
from executor.cluster.process import End
from executor.cluster.ray_cluster import RayCluster
from executor.commands.generate.answering import Work, answered, check_data
from executor.commands.generate.dealer import MAX_LOSSES, Dealer
from executor.commands.generate.results import ResultsFile
from executor.commands.generate.rows import Row, failed_row
from executor.commands.generate.taking import Taking
from executor.errors import UserError
from executor.host.env import code_digest
from executor.recipe.schema import Recipe, build_recipe
from executor.serve.gate import Gate, Peer

logger = logging.getLogger(__name__)

END_S = 15.0
"""How long jobs that have been let go may take to end."""


def run_cluster(work: Work, recipe: Recipe, out: TextIO) -> tuple[Row, int]:
    """Answer everything `recipe` asks; returns the JSON document and the exit status."""
    check_data(recipe)
    dataset = work.dataset(recipe)
    num_jobs = recipe.num_jobs(work.command)
    with RayCluster(recipe, num_jobs) as cluster:
        return answer_over(cluster, num_jobs, dataset, out, work)


def answer_over(cluster: Any, num_jobs: int, dataset: Dataset, out: TextIO, work: Work) -> tuple[Row, int]:
    """The same over `num_jobs` jobs on a cluster (executor.cluster.jobs)."""
    with asyncio.Runner() as runner:
        crew = Crew(dataset, num_jobs, work.command)
        try:
            recipe = runner.run(crew.gather(cluster))

            def fill(rows: dict[int, Row], results: ResultsFile | None) -> None:
                with Taking(work, dataset, rows, results, out) as take:
                    runner.run(crew.answer([index for index in range(len(dataset)) if index not in rows], take))

            return answered(work, recipe, dataset, out, fill)
        finally:
            runner.run(crew.end())


class Crew:
    """The jobs' leaders, and what they do. All of it is called in the event loop's thread."""

    def __init__(self, dataset: Dataset, num_jobs: int, command: str) -> None:
        self._dataset, self._num_jobs, self._command = dataset, num_jobs, command
        self._digest, self._code = dataset.digest(), code_digest()
        self._peers: list[Peer] = []  # leaders that are here
        self._recipe: Recipe | None = None
        self._dealer: Dealer | None = None  # once it is known what is to be answered
        self._num_rows = 0  # that it was given
        self._arrived: deque[Row] = deque()
        self._fault: UserError | None = None
        self._changed = asyncio.Event()
        self._jobs: Jobs | None = None
        self._gate: Gate | None = None

    async def gather(self, cluster: Any) -> Recipe:
        """Start the jobs; returns the recipe as the first of them has settled it."""
        self._gate = await Gate.open(cluster.address, self._on_peer)
        event_loop = asyncio.get_running_loop()

        def on_end(number: int, end: End) -> None:
            event_loop.call_soon_threadsafe(self._on_end, number)

        variables = {"RECIPE_FRONT": self._gate.front.to_text()}
        self._jobs = Jobs(cluster, self._num_jobs, self._command, variables, on_end)
        while self._recipe is None:
            await self._change()
        return self._recipe

    async def answer(self, rows: Sequence[int], take: Callable[[Row], None]) -> None:
        """Until all `rows` are answered, and taken."""
        self._dealer, self._num_rows = Dealer(rows), len(rows)
        for peer in self._peers:
            peer.send({"go": True} if rows else {"end": True})
        while self._dealer.num_left or self._arrived:
            while self._arrived:
                take(self._arrived.popleft())
            if self._dealer.num_left:
                await self._change()

    async def end(self) -> None:
        """Let the jobs go."""
        for peer in self._peers:
            peer.send({"end": True})
            await peer.flush()
        if self._jobs is not None:
            is_done = self._dealer is not None and not self._dealer.num_left
            await asyncio.to_thread(self._jobs.stop, END_S if is_done else 0.0)
        if self._gate is not None:
            self._gate.close()

    async def _change(self) -> None:
        """Wait until something has happened. Raises what keeps all from being answered."""
        await self._changed.wait()
        self._changed.clear()
        self._jobs.check()
        if self._fault is not None:
            raise self._fault

    def _on_end(self, number: int) -> None:
        """A job's process has ended, or its node is gone, which no connection may have told."""
        for peer in self._peers:
            if peer.hello["replica"] == number:
                peer.close()
        self._changed.set()

    async def _on_peer(self, peer: Peer) -> None:
        """Serves one leader's connection."""
        hello = peer.hello
        self._fault = self._fault or self._strangeness(hello)
        self._recipe = self._recipe or build_recipe(hello["recipe"])
        self._peers.append(peer)
        self._changed.set()
        if self._dealer is not None:
            peer.send({"go": True} if self._dealer.num_left else {"end": True})
        while (message := await peer.receive()) is not None:
            if "ready" in message:
                share = -(-self._num_rows // (self._num_jobs * hello["leaders"]))
                self._dealer.join(peer, min(hello["seats"], max(1, share)))
                self._jobs.are_up = True  # one that answers is enough
            elif self._dealer.answered(peer, message["row"]["index"]):
                self._arrived.append(message["row"])
            self._deal()
        self._peers.remove(peer)
        self._give_up(peer)

    def _strangeness(self, hello: dict[str, Any]) -> UserError | None:
        """Why a leader's answers would not be those that are asked for."""
        if hello["code"] != self._code:
            return UserError(
                f"job {hello['replica']} runs other code than this machine; put the same version of this repository on "
                "every node"
            )
        if hello["dataset"] != self._digest:
            return UserError(
                f"data_config: the data set {self._dataset.path} of job {hello['replica']} holds other requests than "
                "on this machine; copy the same files to every node"
            )
        return None

    def _give_up(self, peer: Peer) -> None:
        """A leader is gone: others answer what it held, but for what too many have died of."""
        for index in self._dealer.lose(peer) if self._dealer else ():
            words = f"{MAX_LOSSES} jobs have died while they answered it; see their logs"
            self._arrived.append(failed_row(index, self._dataset[index], words))
        self._deal()

    def _deal(self) -> None:
        if self._dealer is not None:
            for peer, rows in self._dealer.deal().items():
                peer.send({"rows": rows})
        self._changed.set()
