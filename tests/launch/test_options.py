"""The variables ranks get: derived, and never instead of the user's."""

import os

from executor.host.machine import Output
from executor.launch.options import interface, network_options, npu_options, rank_options
from executor.launch.plan import NodePlan
from executor.recipe.schema import load_recipe
from tests.doctor import fake

ROUTE = "192.168.0.10 via 192.168.1.1 dev enp1s0 src 192.168.0.11 uid 0\n    cache\n"
NODES = NodePlan(("192.168.0.10", "192.168.0.11"), 1, 8, 20000)


def routed():
    machine = fake.a2()
    machine.commands["ip route get 192.168.0.10"] = Output(0, ROUTE)
    return machine


def test_threads_of_cpu_ranks_share_the_cores():
    recipe = load_recipe("config/quickstart.yaml")
    cores = len(os.sched_getaffinity(0))
    assert rank_options(recipe, "cpu", 1) == {"OMP_NUM_THREADS": str(cores)}
    assert rank_options(recipe, "cpu", 10 * cores) == {"OMP_NUM_THREADS": "1"}


def test_npu_ranks():
    options = npu_options("atlas_800i_a3", jemalloc="libjemalloc.so.2")
    assert options["OMP_NUM_THREADS"] == "1"
    assert options["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert "HCCL_BUFFSIZE" not in options, "every communicator has buffers of its own size"
    assert options["LD_PRELOAD"] == "libjemalloc.so.2"
    plain = npu_options("atlas_300i_duo", jemalloc=None)
    assert not {"HCCL_OP_EXPANSION_MODE", "LD_PRELOAD"} & plain.keys()
    assert int(plain["HCCL_CONNECT_TIMEOUT"]) > 120


def test_the_interface_is_the_way_to_the_master():
    assert network_options(NODES, "npu", routed()) == {
        "GLOO_SOCKET_IFNAME": "enp1s0",
        "HCCL_IF_IP": "192.168.0.11",
        "HCCL_SOCKET_IFNAME": "enp1s0",
    }
    assert network_options(NODES, "cpu", routed()) == {"GLOO_SOCKET_IFNAME": "enp1s0"}
    assert network_options(NodePlan(("127.0.0.1",), 0, 8, 0), "npu", routed()) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_the_master_takes_the_interface_with_its_address():
    interfaces = {"lo": ["127.0.0.1"], "bond0": ["10.0.0.1"]}
    assert interface("local 10.0.0.1 dev lo src 10.0.0.1", interfaces, "10.0.0.1") == "bond0"
    assert interface("", {}, "10.0.0.1") is None  # no `ip` command


def test_an_interface_the_user_chose_is_not_outranked():
    """HCCL_IF_IP goes before HCCL_SOCKET_IFNAME."""
    machine = routed()
    machine.environment["HCCL_SOCKET_IFNAME"] = "ib0"
    assert network_options(NODES, "npu", machine) == {"GLOO_SOCKET_IFNAME": "enp1s0"}
