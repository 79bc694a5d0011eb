"""The recipe's own server, started to be measured: a process of this machine with all its ranks, which ends with us.

It gets the recipe as it is, but a free port. The kernel ends it when this process dies, whatever that dies of
(executor.cluster.process). Must be started by the main thread.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from executor.bench.client import HEALTH, Client, Endpoint
from executor.cluster.process import JobProcess
from executor.errors import UserError
from executor.recipe.schema import Recipe
from executor.serve.listener import listen
from executor.serve.settings import url_of

POLL_S = 0.05
END_S = 15.0
"""For which the server may take leave after SIGTERM, before it is killed."""
DRAIN_S = 2.0
"""That requests under way have then: there are some only where the benchmark was interrupted."""


class OwnServer:
    """A server that has been started; `ready` must be awaited before it is asked. UserError for an address that cannot
    be listened on."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        with listen(recipe.replace(server={"port": 0}).server) as free:
            port = free.getsockname()[1]
        recipe = recipe.replace(server={"port": port, "drain_timeout_s": DRAIN_S})
        self.url = url_of(recipe.server, port)
        self.endpoint = Endpoint.at(self.url, recipe.server.api_key, recipe.server.ssl_certfile)
        self.begun_s = time.perf_counter()
        self.startup_s: float | None = None
        self._job = JobProcess()
        # JSON is YAML.
        tree = json.dumps(recipe.model_dump(mode="json", by_alias=True))
        self.log = Path(self._job.start(tree, "serve", {}, str(folder), "server"))

    async def ready(self) -> None:
        """Wait until it answers. UserError for a mistake in the recipe, RuntimeError where it ends otherwise."""
        client = Client(self.endpoint, timeout_s=5.0)
        while self.startup_s is None:
            self.check()
            with suppress(OSError, TimeoutError):
                status, _ = await client.get(HEALTH)
                if status == 200:
                    self.startup_s = time.perf_counter() - self.begun_s
            await asyncio.sleep(POLL_S)
        client.close()

    def check(self) -> None:
        """Raises UserError or RuntimeError where the server has ended."""
        end = self._job.end()
        if end is None:
            return
        if end.status == 2:
            raise UserError(f"the recipe's server: {end.words}")
        tail = "\n".join(end.tail)
        raise RuntimeError(f"the recipe's server has ended ({end.words.partition('; its log')[0]}):\n{tail}")

    def peak_memory_bytes(self) -> int:
        """The most memory that each of its processes has held so far, added up."""
        return sum(_peak_bytes(pid) for pid in _tree(self._job.pid))

    def stop(self) -> None:
        self._job.interrupt()
        self._job.stop(END_S)


@contextmanager
def own_server(recipe: Recipe) -> Iterator[OwnServer]:
    """Started now, ended when this is left."""
    with tempfile.TemporaryDirectory(prefix="bench_server_") as folder:
        server = OwnServer(recipe, Path(folder))
        try:
            yield server
        finally:
            server.stop()


def _tree(pid: int) -> Iterator[int]:
    """A process and all that it has started and that are still there."""
    yield pid
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in (thread / "children").read_text().split():
                    yield from _tree(int(child))


def _peak_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
