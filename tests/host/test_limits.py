"""What a process may take of a machine's memory and cores, as /proc and control groups of both versions tell it."""

import os
from pathlib import Path

import pytest

from executor.host.limits import computing_threads, host_cores, host_memory_bytes

MB = 2**20
V2_MOUNT = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "40 32 0:36 {mounted} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
V1_CPU = "41 32 0:37 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
NO_LIMIT_V1 = 9223372036854771712


class Kernel:
    """A machine with 1000 MB available, whose files a test lays down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, own: str, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"0::{own}\n")
        self.write("proc/self/mountinfo", V2_MOUNT.format(mounted=mounted))

    def v1(self, own: str, mounted: str = "/") -> None:
        self.write("proc/self/cgroup", f"5:cpu,cpuacct:/\n4:memory:{own}\n")
        self.write("proc/self/mountinfo", V1_CPU + V1_MOUNT.format(mounted=mounted))

    def group_v2(self, path: str, limit: int | str, used: int = 0, inactive: int = 0, high: int | str = "max") -> None:
        folder = f"sys/fs/cgroup/{path}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 7\nfile 99\ninactive_file {inactive}\nactive_file 3\n")

    def group_v1(self, path: str, limit: int, used: int = 0, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"inactive_file 5\ntotal_inactive_file {inactive}\n")

    @property
    def memory_mb(self) -> float:
        return host_memory_bytes(self.root) / MB


@pytest.fixture
def kernel(tmp_path):
    return Kernel(tmp_path)


def test_a_machine_without_limits(kernel):
    assert kernel.memory_mb == 1000
    kernel.v2("/")
    assert kernel.memory_mb == 1000
    kernel.group_v2("", "max", used=400 * MB)
    assert kernel.memory_mb == 1000


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_is_used_in_a_container_is_not_to_be_had(kernel, version):
    """File cache that can be dropped is."""
    getattr(kernel, version)("/")
    getattr(kernel, f"group_{version}")("", 800 * MB, used=500 * MB, inactive=100 * MB)
    assert kernel.memory_mb == 400


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_narrowest_of_nested_groups_decides(kernel, version):
    getattr(kernel, version)("/pod/container/session")
    group = getattr(kernel, f"group_{version}")
    unlimited = NO_LIMIT_V1 if version == "v1" else "max"
    group("pod", 900 * MB, used=700 * MB)
    group("pod/container", 600 * MB, used=100 * MB)
    group("pod/container/session", unlimited, used=50 * MB)
    assert kernel.memory_mb == 200
    group("pod", 900 * MB, used=200 * MB)
    assert kernel.memory_mb == 500
    group("other", 1 * MB)
    assert kernel.memory_mb == 500


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_that_sees_its_own_group_as_the_top(kernel, version):
    """Its path is told from the host's root, or from a namespace it is not in."""
    getattr(kernel, version)("/docker/abc", mounted="/docker/abc")
    getattr(kernel, f"group_{version}")("", 300 * MB, used=100 * MB)
    assert kernel.memory_mb == 200
    getattr(kernel, version)("/../other", mounted="/")
    assert kernel.memory_mb == 200


def test_a_group_that_is_slowed_down_before_it_is_killed(kernel):
    kernel.v2("/job")
    kernel.group_v2("job", 800 * MB, used=100 * MB, high=400 * MB)
    assert kernel.memory_mb == 300


def test_a_group_that_is_full_leaves_nothing(kernel):
    kernel.v2("/")
    kernel.group_v2("", 100 * MB, used=120 * MB)
    assert kernel.memory_mb == 0


# Cores


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


def test_a_quota_of_cores_in_version_2(kernel, eight_cores):
    kernel.v2("/pod/container")
    assert host_cores(kernel.root) == 8
    for text, cores in (("max 100000", 8), ("200000 100000", 2), ("250000 100000", 3), ("5000 100000", 1)):
        kernel.write("sys/fs/cgroup/pod/container/cpu.max", text + "\n")
        assert host_cores(kernel.root) == cores
    kernel.write("sys/fs/cgroup/pod/container/cpu.max", "max 100000\n")
    kernel.write("sys/fs/cgroup/pod/cpu.max", "400000 100000\n")
    assert host_cores(kernel.root) == 4


def test_a_quota_of_cores_in_version_1(kernel, eight_cores):
    kernel.v1("/")
    for quota, cores in ((-1, 8), (300000, 3), (1600000, 8)):
        kernel.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
        kernel.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
        assert host_cores(kernel.root) == cores


def test_threads_of_one_core_count_once(kernel, eight_cores):
    """Eight CPUs, of which 0 and 4, 1 and 5, ... are one core each; and a quota of less."""
    kernel.v2("/pod")
    assert computing_threads(kernel.root) == 8
    for cpu in range(8):
        kernel.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    assert (computing_threads(kernel.root), host_cores(kernel.root)) == (4, 8)
    kernel.write("sys/fs/cgroup/pod/cpu.max", "300000 100000\n")
    assert computing_threads(kernel.root) == 3


def test_this_machine():
    assert 1 <= computing_threads() <= host_cores() <= len(os.sched_getaffinity(0))
    assert 0 < host_memory_bytes() <= host_memory_bytes(Path("/nowhere"))
