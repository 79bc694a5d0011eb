"""Environment variables a job's ranks get. What the user has set wins; whoever hands them on sees to that.

Sources: the HCCL and Ascend Extension for PyTorch chapters of the CANN documentation (names and meanings of variables).
"""

from __future__ import annotations

import ctypes.util
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from executor.host.env import set_where_unset
from executor.host.limits import computing_threads, host_cores
from executor.host.machine import Machine
from executor.host.npu_smi import A2, A3
from executor.launch.layout import Layout
from executor.recipe.schema import Recipe

logger = logging.getLogger(__name__)

HCCL_CONNECT_TIMEOUT_S = 1200  # ranks read their weights at different speeds before they meet
HCCL_EXEC_TIMEOUT_S = 1800

READ_AT_START = frozenset({"LD_PRELOAD", "GLIBC_TUNABLES"})
"""What the C library reads when a process begins, and not again."""


def rank_options(recipe: Recipe, device: str, local_ranks: int) -> dict[str, str]:
    """What the `local_ranks` ranks of a node get. `device` is the recipe's with `auto` settled."""
    if device != "npu":
        return cpu_options(local_ranks)
    return npu_options(recipe.model.soc, ctypes.util.find_library("jemalloc"))


def in_words(variables: Mapping[str, str]) -> str:
    """For the log."""
    return ", ".join(f"{name}={value}" for name, value in sorted(variables.items())) or "nothing to add"


def apply(options: Mapping[str, str]) -> None:
    """Set what the user has not set in this process, which has not imported torch yet, and log it.

    Where one is among them that is read when a process starts, this process begins anew with all of them in its
    environment, which takes a moment once.
    """
    added = set_where_unset(options)
    if added:
        logger.info("environment: %s", in_words(added))
    if READ_AT_START & added.keys():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cpu_options(local_ranks: int, root: Path = Path("/")) -> dict[str, str]:
    """For `local_ranks` ranks that share the CPU of a node. `root` is where /proc and /sys are looked for."""
    options = huge_pages(root)
    # One process takes all cores as it is, but does not see a container's quota of them.
    if local_ranks > 1 or host_cores(root) < len(os.sched_getaffinity(0)):
        options["OMP_NUM_THREADS"] = str(max(1, computing_threads(root) // local_ranks))
    return options


def huge_pages(root: Path = Path("/"), libc: str | None = None) -> dict[str, str]:
    """Weights in pages of 2 MiB: a decode step reads all of them, and looks up 512 times as few addresses.

    Nothing where the kernel gives such pages to everybody or to nobody, and of a C library (`libc`; None asks) that
    cannot ask for them: malloc does so since glibc 2.35, and the libraries that pack weights take their memory there.
    """
    try:
        found = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
        libc = os.confstr("CS_GNU_LIBC_VERSION") or "" if libc is None else libc
    except (OSError, ValueError):  # no such file; no such name, as the library is another one
        return {}
    version = re.fullmatch(r"glibc (\d+)\.(\d+)", libc)
    if "[madvise]" not in found or version is None or (int(version[1]), int(version[2])) < (2, 35):
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def npu_options(soc: str | None, jemalloc: str | None) -> dict[str, str]:
    """For ranks on NPUs; `jemalloc` is the library's file name where it is installed.

    HCCL_BUFFSIZE is not among them: executor.parallel.groups gives every communicator the buffers of its use.
    """
    options = {
        "OMP_NUM_THREADS": "1",
        "OMP_PROC_BIND": "false",
        "CPU_AFFINITY_CONF": "1",
        "TASK_QUEUE_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_CONNECT_TIMEOUT": str(HCCL_CONNECT_TIMEOUT_S),
        "HCCL_EXEC_TIMEOUT": str(HCCL_EXEC_TIMEOUT_S),
    }
    if soc in (A2, A3):
        options["HCCL_OP_EXPANSION_MODE"] = "AIV"
    if jemalloc:
        options["LD_PRELOAD"] = jemalloc
    return options


def network_options(layout: Layout, device: str, machine: Machine) -> dict[str, str]:
    """The way of gloo, and on NPUs of HCCL, to the other nodes; a job of one node stays on the loopback.

    Where `ip` is missing the interface is left to the libraries, whose own choice is the first that looks right.
    HCCL_IF_IP outranks HCCL_SOCKET_IFNAME, so it is left out where the user has chosen an interface.
    """
    if layout.num_nodes == 1:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    routed = machine.run(["ip", "route", "get", layout.master], 10)
    name = interface(routed.stdout if routed else "", machine.addresses(), layout.address)
    options = {"GLOO_SOCKET_IFNAME": name} if name else {}
    if device == "npu" and "HCCL_SOCKET_IFNAME" not in machine.environment:
        options["HCCL_IF_IP"] = layout.address
        if name:
            options["HCCL_SOCKET_IFNAME"] = name
    return options


def interface(route: str, interfaces: Mapping[str, list[str]], address: str) -> str | None:
    """The network interface that leads to the master, by what `ip route get MASTER` prints.

    The master's way to itself is the loopback; there it is the interface that has `address`.
    """
    found = re.search(r"\bdev\s+(\S+)", route)
    if found and found[1] != "lo":
        return found[1]
    return next((name for name, addresses in interfaces.items() if address in addresses), None)
