"""Judges the host: memory, ports, and how nodes reach each other."""

from __future__ import annotations

from executor.doctor.facts import Facts
from executor.doctor.findings import ERROR, NOTE, OK, UNKNOWN, WARNING, Finding
from executor.host.cpu import parse_cpuinfo
from executor.host.nodes import PORTS, is_placeholder, parse_hccn_conf
from executor.host.npu_smi import A2, A3

_LOW_MEMORY_BYTES = 4 * 2**30
_SET_ENV = "executor/scripts/set_env.sh"


def check(facts: Facts) -> list[Finding]:
    """All findings about the host and its network."""
    findings = [_system(facts), _cpu(facts), _memory(facts), _ports(facts), _nodes(facts), _interface(facts)]
    if facts.num_nodes > 1 and facts.family in (A2, A3):
        findings.append(_npu_network(facts))
    return findings


def _system(facts: Facts) -> Finding:
    system, arch = facts.machine.system, facts.machine.arch
    if facts.on_npu and (not system.startswith("Linux") or arch not in ("aarch64", "x86_64")):
        return Finding(
            "os", ERROR, f"{system}, {arch}", "Linux on aarch64 or x86_64", "Ascend has drivers for these only"
        )
    return Finding("os", OK, f"{system}, {arch}")


def _cpu(facts: Facts) -> Finding:
    """What the cpu device will make of this CPU; nothing here keeps a recipe from running."""
    cpu = parse_cpuinfo(facts.machine.read("/proc/cpuinfo") or "")
    if cpu is None:
        return Finding("cpu", UNKNOWN, "/proc/cpuinfo lists no instructions; the cpu device asks torch when it starts")
    found = f"{cpu.name}: {cpu.vectors or 'no vector instructions that torch has kernels for'}"
    int8 = "int8 in one product" if cpu.sums_int8_in_32_bits else "int8 by digits (no VNNI)"
    if cpu.multiplies_bfloat16 and cpu.is_x86:
        return Finding("cpu", OK, f"{found}; the cpu device multiplies bfloat16 itself (cpu_isa avx512), {int8}")
    if {"avx2", "f16c"} <= cpu.flags:
        return Finding(
            "cpu",
            OK,
            f"{found}; the cpu device keeps 16-bit weights packed and computes in float32 (cpu_isa avx2), {int8}",
        )
    if cpu.is_x86:
        advice = "in a virtual machine, let it see the host's CPU (kvm: -cpu host)"
        return Finding(
            "cpu", WARNING, f"{found}; the cpu device has plain products only, which are slow", "AVX2", advice
        )
    return Finding("cpu", NOTE, f"{found}; the cpu device tries which packed products torch has here")


def _memory(facts: Facts) -> Finding:
    free = facts.machine.memory_bytes()
    found = f"{free / 2**30:.1f} GiB to be had"
    if free < _LOW_MEMORY_BYTES:
        advice = "close other programs, or give the container more; loading reads the checkpoint through memory"
        return Finding("host_memory", WARNING, found, "4 GiB or more", advice)
    return Finding("host_memory", OK, found)


def _ports(facts: Facts) -> Finding:
    port = facts.machine.environment.get("MASTER_PORT", "")
    if port.isdigit() and not facts.machine.port_is_free(int(port)):
        advice = f"unset MASTER_PORT or choose a free one, e.g. {_first_free(facts) or 'outside 20000-20050'}"
        return Finding("ports", ERROR if _is_big(facts) else WARNING, f"MASTER_PORT={port} is taken", "free", advice)
    taken = [number for number in PORTS if not facts.machine.port_is_free(number)]
    if len(taken) == len(PORTS):
        advice = "an earlier job may still run (its processes hold them); or set MASTER_PORT to a free port"
        return Finding(
            "ports", ERROR if _is_big(facts) else WARNING, "20000 to 20050 are all taken", "one free", advice
        )
    found = f"{len(PORTS) - len(taken)} of {len(PORTS)} free in 20000-20050"
    if taken:
        found += f"; taken: {', '.join(str(port) for port in taken[:8])}" + (" ..." if len(taken) > 8 else "")
    return Finding("ports", OK, found)


def _first_free(facts: Facts) -> int | None:
    return next((port for port in PORTS if facts.machine.port_is_free(port)), None)


def _is_big(facts: Facts) -> bool:
    return bool(facts.wish and facts.wish.world_size > 1)


def _needs_more_nodes(facts: Facts) -> bool:
    """Whether the recipe has more ranks than this node has chips."""
    return bool(facts.on_npu and facts.wish and facts.usable_chips and facts.wish.world_size > facts.usable_chips)


def _local_rank(facts: Facts) -> int | None:
    """This node's place in IPs, None when no entry is one of this machine's addresses."""
    for rank, entry in enumerate(facts.setup.ips):
        address = facts.machine.resolve(entry)
        if address and facts.machine.is_local(address):
            return rank
    return None


def _nodes(facts: Facts) -> Finding:
    """IPs of set_env.sh: they matter when the job has more than one node."""
    ips = facts.setup.ips
    bad = ERROR if _is_big(facts) else WARNING
    if not ips:
        return Finding("nodes", OK, f"IPs in {_SET_ENV} is empty: this node alone")
    placeholders = [entry for entry in ips if is_placeholder(entry)]
    if placeholders == list(ips) and not _needs_more_nodes(facts):
        return Finding("nodes", OK, f"IPs in {_SET_ENV} has placeholders only: this node alone")
    if placeholders:
        advice = f"write the nodes' addresses in rank order into {_SET_ENV}, alike on every node; IPs=() for one node"
        return Finding("nodes", bad, f"IPs still has placeholders: {', '.join(placeholders)}", "addresses", advice)
    unknown = [entry for entry in ips if facts.machine.resolve(entry) is None]
    if unknown:
        return Finding(
            "nodes", bad, f"IPs: cannot resolve {', '.join(unknown)}", "addresses", "write addresses, not names"
        )
    if len(set(ips)) < len(ips):
        return Finding("nodes", bad, f"IPs names a node twice: {', '.join(ips)}", "each once", f"correct {_SET_ENV}")
    rank = _local_rank(facts)
    if rank is None:
        return Finding(
            "nodes",
            bad,
            f"none of IPs ({', '.join(ips)}) is this machine's: {_addresses(facts)}",
            "this machine among them",
            f"correct {_SET_ENV}; it is the same on every node",
        )
    return Finding("nodes", OK, f"{len(ips)} node(s), this one is number {rank}, master {ips[0]}")


def _addresses(facts: Facts) -> str:
    shown = [
        f"{name} {address}"
        for name, addresses in facts.machine.addresses().items()
        for address in addresses
        if name != "lo" and not address.startswith("fe80")
    ]
    return ", ".join(shown) or "no address found"


def _interface(facts: Facts) -> Finding:
    """HCCL's interface: the one whose address packets to the master leave from."""
    environment = facts.machine.environment
    interfaces = facts.machine.addresses()
    local = {address for addresses in interfaces.values() for address in addresses}
    address, name = environment.get("HCCL_IF_IP", ""), environment.get("HCCL_SOCKET_IFNAME", "")
    bad = ERROR if _is_big(facts) and facts.num_nodes > 1 else WARNING
    if address and local and address not in local:
        advice = "unset HCCL_IF_IP: it is found from the route to the master"
        return Finding("hccl_interface", bad, f"HCCL_IF_IP={address} is not this machine's", _addresses(facts), advice)
    plain = name.lstrip("=^").split(",")[0]
    if plain and not name.startswith("^") and interfaces and not any(known.startswith(plain) for known in interfaces):
        advice = "unset HCCL_SOCKET_IFNAME: it is found from the route to the master"
        return Finding("hccl_interface", bad, f"HCCL_SOCKET_IFNAME={name}: there is no such interface", "", advice)
    if address or name:
        return Finding("hccl_interface", OK, f"set by you: {address or name}")
    if facts.num_nodes == 1:
        return Finding("hccl_interface", OK, f"one node, nothing to set; addresses: {_addresses(facts)}")
    master = facts.machine.resolve(environment.get("MASTER_ADDR") or (facts.setup.ips[0] if facts.setup.ips else ""))
    if master is None:
        return Finding("hccl_interface", UNKNOWN, "who the master is, the launcher finds out when the job starts")
    leaves = facts.machine.address_towards(master)
    if leaves is None:
        advice = "check the network and the first entry of IPs"
        return Finding("hccl_interface", bad, f"no route to the master {master}", "a route", advice)
    names = [name for name, addresses in interfaces.items() if leaves in addresses]
    if leaves.startswith("127."):
        advice = f"the master's address must be one that other nodes reach: correct IPs in {_SET_ENV}"
        return Finding("hccl_interface", bad, f"the way to the master {master} is {leaves}", "", advice)
    return Finding(
        "hccl_interface", OK, f"{names[0] if names else 'interface'} {leaves}, the way to the master {master}"
    )


def _npu_network(facts: Facts) -> Finding:
    """Between nodes, collectives of A2 and A3 travel over the NPUs' own network ports."""
    ports = parse_hccn_conf(facts.machine.read("/etc/hccn.conf") or "")
    advice = "give each an address (hccn_tool -i N -ip -s ...); `hccn_tool -i N -ip -g` shows it, -link -g its link"
    if not ports:
        note = "; in a container mount /etc/hccn.conf"
        return Finding("npu_network", UNKNOWN, "/etc/hccn.conf names no address", "one for each chip", advice + note)
    if len(ports) < facts.chip_count:
        found = f"/etc/hccn.conf names {len(ports)} addresses for {facts.chip_count} chips"
        return Finding("npu_network", NOTE, found, "one for each chip", advice)
    return Finding("npu_network", OK, f"{len(ports)} addresses, {ports[min(ports)]} ...")
