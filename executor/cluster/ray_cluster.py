"""Ray as the place where jobs run: nodes with room, one worker on a node for each job, and word of a node's death.

Ray places and watches; what is asked and answered goes by executor.serve.wire over connections of its own, so that a
token takes one hop and no object store. Hence Ray's core suffices: of `ray[serve]` nothing would be used (its proxy
is another HTTP server before ours, its router knows no conversations).
Knows no requests.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from executor.cluster.jobs import REMIND_S
from executor.cluster.process import End
from executor.cluster.ray_install import missing_ray
from executor.cluster.worker import Worker
from executor.errors import UserError
from executor.host.env import REPO_ROOT, environment, set_where_unset
from executor.host.limits import host_cores
from executor.recipe.schema import Recipe
from executor.recipe.settle import resolve_device

logger = logging.getLogger(__name__)

STORE_BYTES = 128 * 1024 * 1024  # of a cluster of this machine's own: nothing of ours lies in Ray's object store
LOOK_S = 0.5
CALL_S = 30.0
"""How long a node may take to answer for one of its jobs before Ray itself says that it is gone."""


class RayJob:
    """A job in the hands of a Ray worker (executor.cluster.jobs.Job)."""

    def __init__(self, ray: Any, actor: Any, log: str) -> None:
        self.log = log
        self._ray, self._actor = ray, actor

    def end(self) -> End | None:
        found = self._call(self._actor.end.remote(), CALL_S)
        return None if found is None else End(*found)

    def stop(self, patience_s: float) -> None:
        self._call(self._actor.stop.remote(patience_s), patience_s + CALL_S)
        self._ray.kill(self._actor)

    def _call(self, reference: Any, timeout_s: float) -> Any:
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except self._ray.exceptions.RayActorError as error:
            raise OSError(f"the node of the job, or Ray's worker there, is gone ({_first_line(error)})") from error
        except self._ray.exceptions.GetTimeoutError as error:
            self._ray.kill(self._actor)
            raise OSError(f"the node of the job has not answered for {timeout_s:.0f} s") from error


class RayCluster:
    """Use as a context manager. `address` is this machine's, as the nodes reach it."""

    def __init__(self, recipe: Recipe, num_jobs: int) -> None:
        """Joins the cluster, or starts one here. UserError without Ray, without a cluster, or without room."""
        self._ray = ray = _import_ray()
        self._recipe = resolve_device(recipe)
        where = recipe.parallel.ray_address or environment().get("RAY_ADDRESS")
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if not where:
            settings |= {"num_cpus": host_cores(), "object_store_memory": STORE_BYTES, "include_dashboard": False}
        try:
            ray.init(address=where or "local", **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"parallel_config.ray_address: the Ray cluster {where or 'of this machine'} cannot be joined "
                f"({_first_line(error)}); start one with `ray start --head`, or leave ray_address and RAY_ADDRESS "
                "unset for one on this machine"
            ) from error
        self._abandoned = threading.Event()
        try:
            self.address = ray.util.get_node_ip_address()
            self._resources = self._room(num_jobs, where or "of this machine")
        except BaseException:
            ray.shutdown()
            raise

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *exception: object) -> None:
        self._ray.shutdown()

    def _room(self, num_jobs: int, where: str) -> dict[str, Any]:
        """What a job takes of its node, where the nodes have room for all jobs."""
        world_size = self._recipe.parallel.world_size
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if self._recipe.model.device == "npu":
            name, needed, resources = "NPU", world_size, {"num_cpus": 0, "resources": {"NPU": world_size}}
        else:
            total = sum(node.get("CPU", 0) for node in nodes)
            each = min(total / num_jobs, max((node.get("CPU", 0) for node in nodes), default=0))
            while each > 1 and sum(node.get("CPU", 0) // int(each) for node in nodes) < num_jobs:
                each -= 1  # nodes of different sizes, or whose cores do not come out even
            needed = each if each < 1 else int(each)
            name, resources = "CPU", {"num_cpus": needed}
        room = sum(int(node.get(name, 0) / needed) for node in nodes) if needed else 0
        if room < num_jobs:
            counts = ", ".join(f"{node.get(name, 0):g}" for node in nodes)
            raise UserError(
                f"{num_jobs} jobs of {needed:g} {name} each do not fit on the Ray cluster {where}: its {len(nodes)} "
                f"node(s) have {counts} {name}, room for {room}; a job stays on one node. Ask for fewer "
                "(server_config.replicas, parallel_config.ray_jobs), set a smaller parallel_config.world_size, or "
                "start more nodes (`ray start --address=HEAD:6379`, with --resources='{\"NPU\": 8}' where Ray does not "
                "see the chips)"
            )
        return resources

    def start(self, number: int, command: str, variables: Mapping[str, str]) -> RayJob:
        # It goes into a file of the node, and clients do not talk to it.
        server = {"replicas": None, "api_key": None, "ssl_certfile": None, "ssl_keyfile": None}
        recipe = self._recipe.replace(parallel={"ray_jobs": 1, "ray_address": None}, server=server)
        actor = self._ray.remote(Worker).options(scheduling_strategy="SPREAD", **self._resources).remote(str(REPO_ROOT))
        folder = os.path.join(recipe.model.output_path, "logs", "ray")
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{command}-{number}"
        started = actor.start.remote(
            os.getcwd(), recipe.model_dump_json(by_alias=True), command, {**self._threads(), **variables}, folder, name
        )
        reminded_s = time.monotonic()
        while not self._ray.wait([started], timeout=LOOK_S)[0]:
            if self._abandoned.is_set():
                self._ray.kill(actor)
                raise OSError("nothing is started any more")
            if time.monotonic() - reminded_s > REMIND_S:
                reminded_s = time.monotonic()
                logger.info("job %d waits for a node with %s", number, self._resources)
        try:
            return RayJob(self._ray, actor, self._ray.get(started))
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise OSError(_first_line(cause)) from error

    def abandon(self) -> None:
        self._abandoned.set()

    def _threads(self) -> dict[str, str]:
        """A CPU job's ranks share what Ray has given to it, and not all cores of its node."""
        if self._recipe.model.device == "npu":
            return {}
        threads = int(self._resources["num_cpus"] // self._recipe.parallel.world_size)
        return {"OMP_NUM_THREADS": str(max(1, threads))}


def _import_ray() -> Any:
    set_where_unset({"RAY_USAGE_STATS_ENABLED": "0"})  # it tells its makers nothing of this machine
    try:
        import ray
    except ImportError as error:
        raise missing_ray(str(error)) from error
    with contextlib.suppress(ValueError):
        import executor.cluster.worker as worker

        ray.cloudpickle.register_pickle_by_value(worker)
    return ray


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
