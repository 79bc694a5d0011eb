"""What a job takes of a Ray cluster, and what is said where there is none, or no room. Needs no Ray."""

import sys
from types import SimpleNamespace

import pytest

from executor.cluster.ray_cluster import RayCluster
from executor.errors import UserError
from executor.recipe.schema import build_recipe


def room(nodes: list[dict], num_jobs: int, world_size: int = 1, **model: object) -> dict:
    """The resources of a job on a cluster of these nodes."""
    cluster = object.__new__(RayCluster)
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    cluster._ray = SimpleNamespace(nodes=lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99, "NPU": 99}}])
    sections = {"model_config": {"model_path": "m", "device": "cpu"} | model}
    cluster._recipe = build_recipe(sections | {"parallel_config": {"world_size": world_size}})
    cluster._resources = cluster._room(num_jobs, "here:6379")
    return cluster._resources | cluster._threads()


def test_jobs_on_one_machine_share_its_cores() -> None:
    assert room([{"CPU": 8}], 2) == {"num_cpus": 4, "OMP_NUM_THREADS": "4"}
    assert room([{"CPU": 8}], 2, world_size=2) == {"num_cpus": 4, "OMP_NUM_THREADS": "2"}
    assert room([{"CPU": 8}], 3) == {"num_cpus": 2, "OMP_NUM_THREADS": "2"}
    assert room([{"CPU": 1}], 2) == {"num_cpus": 0.5, "OMP_NUM_THREADS": "1"}


def test_a_job_stays_on_one_node() -> None:
    assert room([{"CPU": 4}, {"CPU": 4}], 2)["num_cpus"] == 4
    assert room([{"CPU": 6}, {"CPU": 2}], 2)["num_cpus"] == 3
    assert room([{"CPU": 5}, {"CPU": 5}, {"CPU": 5}], 4)["num_cpus"] == 2


def test_chips_are_counted_and_not_cores() -> None:
    npu = {"device": "npu", "soc": "atlas_800i_a2"}
    assert room([{"NPU": 8, "CPU": 1}, {"NPU": 8}], 4, 4, **npu) == {"num_cpus": 0, "resources": {"NPU": 4}}
    for nodes, num_jobs in (([{"NPU": 8}, {"NPU": 8}], 3), ([{"CPU": 64}], 1)):
        with pytest.raises(UserError, match=f"{num_jobs} jobs of 5 NPU each do not fit on the Ray cluster here:6379"):
            room(nodes, num_jobs, 5, **npu)


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = build_recipe({"model_config": {"model_path": "m", "device": "cpu"}})
    with pytest.raises(UserError, match="pip install -r .*requirements-ray.txt"):
        RayCluster(recipe, 2)


@pytest.mark.parametrize(
    "command, sections, jobs",
    [
        ("serve", {"server_config": {"replicas": 2}}, 2),
        ("generate", {"server_config": {"replicas": 2}}, 1),
        ("generate", {"parallel_config": {"ray_jobs": 3}}, 3),
        ("eval", {"parallel_config": {"ray_jobs": 3}}, 3),
        ("serve", {"parallel_config": {"ray_jobs": 3}}, 3),
        ("serve", {"parallel_config": {"ray_jobs": 3}, "server_config": {"replicas": 1}}, 1),
        ("plan", {"parallel_config": {"ray_jobs": 3}}, 1),
    ],
)
def test_how_many_jobs_a_command_has(command: str, sections: dict, jobs: int) -> None:
    assert build_recipe({"model_config": {"model_path": "m"}, **sections}).num_jobs(command) == jobs
