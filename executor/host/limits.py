"""Memory and cores that this process may take: what the machine has, within the limits of its control groups.

A container's memory limit says nothing of what is used in it already, a quota of cores shows in no list of cores, and
groups nest (a service in a slice, a pod's container in the pod): each group from this process's own up to the root has
limits, and the narrowest decides. Standard library only, and importable on Python 3.8 (the doctor). Sources: the
kernel's admin-guide, cgroup-v1/memory and cgroup-v2, and its scheduler/sched-bwc.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Files:
    """Names of a group's files in one version of control groups. Any of `limits` bounds what the group may use."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: str
    """The line of memory.stat that counts file cache which nobody has touched lately: the kernel drops it first."""


# memory.high does not kill, but slows down whatever goes beyond it until it stands still.
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes this process may still take. `root` is where /proc and /sys are looked for."""
    available = _meminfo_available_bytes(root) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = [bytes_left for folder, files in _groups(root, "memory") for bytes_left in _left_in_group(folder, files)]
    return max(0, min([available, *left]))


def process_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process holds already, code of libraries included; 0 where the system does not say."""
    return _status_bytes(root, "VmRSS")


def peak_memory_bytes(root: Path = Path("/")) -> int:
    """The most memory that this process has held so far; 0 where the system does not say."""
    return _status_bytes(root, "VmHWM")


def restart_peak_memory() -> bool:
    """Count `peak_memory_bytes` from now on; False where the system does not allow it, and it counts on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def _status_bytes(root: Path, key: str) -> int:
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def host_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy: those it may run on, and no more than its quota of their time; at least 1."""
    quotas = [quota for folder, files in _groups(root, "cpu") for quota in _quota(folder, files)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def computing_threads(root: Path = Path("/")) -> int:
    """Threads worth computing with: one for each core this process may keep busy; at least 1.

    Two CPUs that are threads of one core share its vector units, which one of them keeps busy in a matrix product.
    """
    topology = root / "sys/devices/system/cpu"
    names = (topology / f"cpu{cpu}/topology/thread_siblings_list" for cpu in os.sched_getaffinity(0))
    cores = {"".join(_lines(name)) or str(name) for name in names}
    return min(len(cores), host_cores(root))


def _quota(folder: Path, files: _Files) -> Iterator[int]:
    """Whole cores of one group's quota; a part of a core is one that is not always there."""
    if files is _V2:
        words = " ".join(_lines(folder / "cpu.max")).split()  # `200000 100000`: microseconds in each period
    else:
        words = [" ".join(_lines(folder / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period")]
    if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # none: `max`, or -1
        yield -(-int(words[0]) // int(words[1]))


def _meminfo_available_bytes(root: Path) -> int | None:
    """MemAvailable counts page cache that can be dropped, which sysconf's AVPHYS_PAGES does not."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's groups for memory or cpu, from its own up to where the hierarchy is mounted."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        for mount_point, mounted in _mounts(root, files, controller):
            top = root / mount_point.lstrip("/")
            # A container may see its own group as the top of the mount, while its path is told from the host's root.
            inner = os.path.relpath(own, mounted)
            folder = top if inner.startswith("..") else top / inner
            while True:
                yield folder, files
                if folder == top or top not in folder.parents:
                    break
                folder = folder.parent


def _mounts(root: Path, files: _Files, controller: str) -> Iterator[tuple[str, str]]:
    """(mount point, path within the hierarchy that is mounted there) of a version's hierarchy."""
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(), filesystem.split()
        if len(fields) < 5 or not kind:
            continue
        is_v1 = kind[0] == "cgroup" and controller in kind[-1].split(",")
        if is_v1 if files is _V1 else kind[0] == "cgroup2":
            yield fields[4], fields[3]


def _left_in_group(folder: Path, files: _Files) -> Iterator[int]:
    """Each limit of one group, less what is used in it and cannot be dropped."""
    used = _number(folder / files.usage) or 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == files.reclaimable and value.strip().isdigit():
            used -= min(used, int(value))
    for name in files.limits:
        limit = _number(folder / name)  # None for `max`; version 1 writes about 2**63 for none
        if limit is not None:
            yield limit - used


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel; none where it is not there or not to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
