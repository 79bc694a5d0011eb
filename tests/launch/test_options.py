"""The variables ranks get: derived, and never instead of the user's."""

import os
import sys

import pytest

from executor import __main__ as main
from executor.command_line import parse
from executor.commands.generate import run as generate
from executor.host.limits import computing_threads
from executor.host.machine import Output
from executor.launch import options
from executor.launch.layout import Layout
from executor.launch.options import (
    apply,
    cpu_options,
    huge_pages,
    interface,
    network_options,
    npu_options,
    rank_options,
)
from executor.recipe import settle
from executor.recipe.schema import load_recipe
from tests.doctor import fake

ROUTE = "192.168.0.10 via 192.168.1.1 dev enp1s0 src 192.168.0.11 uid 0\n    cache\n"
NODES = Layout(("192.168.0.10", "192.168.0.11"), 1, 8, 20000)


def routed():
    machine = fake.a2()
    machine.commands["ip route get 192.168.0.10"] = Output(0, ROUTE)
    return machine


def test_threads_of_cpu_ranks_share_the_cores():
    recipe = load_recipe("config/quickstart.yaml")
    cores = computing_threads()
    assert rank_options(recipe, "cpu", 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert rank_options(recipe, "cpu", 10 * cores)["OMP_NUM_THREADS"] == "1"


def test_one_cpu_rank_takes_what_torch_takes_but_no_more_than_a_quota(tmp_path, monkeypatch):
    """Of a container with 3 of 8 cores; hyperthreads are tested with the limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert "OMP_NUM_THREADS" not in cpu_options(1, tmp_path)
    monkeypatch.setattr(options, "host_cores", lambda root: 3)
    monkeypatch.setattr(options, "computing_threads", lambda root: 3)
    assert cpu_options(1, tmp_path)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "enabled, libc, is_wanted",
    [
        ("always [madvise] never", "glibc 2.36", True),
        ("always [madvise] never", "glibc 2.35", True),
        ("always [madvise] never", "glibc 2.34", False),
        ("always [madvise] never", "", False),
        ("[always] madvise never", "glibc 2.36", False),
        ("always madvise [never]", "glibc 2.36", False),
        (None, "glibc 2.36", False),
    ],
)
def test_huge_pages_are_asked_for_where_the_kernel_gives_them_to_who_asks(tmp_path, enabled, libc, is_wanted):
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    if enabled is not None:
        file.parent.mkdir(parents=True)
        file.write_text(enabled + "\n")
    assert huge_pages(tmp_path, libc) == ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if is_wanted else {})


def test_npu_ranks():
    options = npu_options("atlas_800i_a3", jemalloc="libjemalloc.so.2")
    assert options["OMP_NUM_THREADS"] == "1"
    assert options["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert "HCCL_BUFFSIZE" not in options, "every communicator has buffers of its own size"
    assert options["LD_PRELOAD"] == "libjemalloc.so.2"
    plain = npu_options("atlas_300i_duo", jemalloc=None)
    assert not {"HCCL_OP_EXPANSION_MODE", "LD_PRELOAD"} & plain.keys()
    assert int(plain["HCCL_CONNECT_TIMEOUT"]) > 120


@pytest.fixture
def own_environment(monkeypatch):
    """Variables that a test sets are gone after it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("LD_PRELOAD", "TASK_QUEUE_ENABLE", "OMP_NUM_THREADS", "GLIBC_TUNABLES"):
        os.environ.pop(name, None)


@pytest.fixture
def restarts(monkeypatch, own_environment):
    """The command lines with which this process would have begun anew."""
    begun = []
    monkeypatch.setattr(os, "execv", lambda path, words: begun.append(words))
    return begun


def test_options_are_logged_and_leave_the_users_alone(restarts, caplog):
    os.environ["OMP_NUM_THREADS"] = "7"
    with caplog.at_level("INFO"):
        apply({"OMP_NUM_THREADS": "1", "TASK_QUEUE_ENABLE": "1"})
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TASK_QUEUE_ENABLE"]) == ("7", "1")
    assert "environment: TASK_QUEUE_ENABLE=1" in caplog.text and "OMP" not in caplog.text
    assert restarts == []


@pytest.mark.parametrize(
    "name, value", [("LD_PRELOAD", "libjemalloc.so.2"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")]
)
def test_what_the_c_library_reads_at_start_needs_a_new_process_once(restarts, name, value):
    """The second time it is in the environment already."""
    for _ in range(2):
        apply({name: value})
    assert restarts == [[sys.executable, *sys.orig_argv[1:]]]
    assert os.environ[name] == value


def test_a_recipe_of_one_npu_rank_has_the_options_of_many(monkeypatch, restarts):
    """Before the command is imported, and torch with it."""
    seen = []
    monkeypatch.setattr(settle, "has_torch_npu", lambda: True)
    monkeypatch.setattr(options.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(generate, "run", lambda recipe: (seen.append(dict(os.environ)), ({}, 0))[1])
    chip = ["--set", "model_config.soc=atlas_800i_a2", "model_config.dtype=auto"]
    for device, expected in (("npu", True), ("cpu", False)):
        words = chip if device == "npu" else []
        parsed = parse(["config/quickstart.yaml", *words, "--device", device])
        main.run(parsed, [])
        wanted = npu_options("atlas_800i_a2", None)
        assert (wanted.items() <= seen[-1].items()) == expected
        for name in wanted:
            os.environ.pop(name, None)
    assert len(seen) == 2


def test_the_interface_is_the_way_to_the_master():
    assert network_options(NODES, "npu", routed()) == {
        "GLOO_SOCKET_IFNAME": "enp1s0",
        "HCCL_IF_IP": "192.168.0.11",
        "HCCL_SOCKET_IFNAME": "enp1s0",
    }
    assert network_options(NODES, "cpu", routed()) == {"GLOO_SOCKET_IFNAME": "enp1s0"}
    assert network_options(Layout(("127.0.0.1",), 0, 8, 0), "npu", routed()) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_the_master_takes_the_interface_with_its_address():
    interfaces = {"lo": ["127.0.0.1"], "bond0": ["10.0.0.1"]}
    assert interface("local 10.0.0.1 dev lo src 10.0.0.1", interfaces, "10.0.0.1") == "bond0"
    assert interface("", {}, "10.0.0.1") is None  # no `ip` command


def test_an_interface_the_user_chose_is_not_outranked():
    """HCCL_IF_IP goes before HCCL_SOCKET_IFNAME."""
    machine = routed()
    machine.environment["HCCL_SOCKET_IFNAME"] = "ib0"
    assert network_options(NODES, "npu", machine) == {"GLOO_SOCKET_IFNAME": "enp1s0"}
