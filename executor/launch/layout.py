"""Which ranks run where: from the recipe, the addresses in set_env.sh and this machine to a `Layout`.

Reads the machine only through what is handed in (executor.host.machine.Machine or a test's), starts nothing. What the
user must mend is a UserError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from executor.errors import UserError
from executor.host.machine import Machine
from executor.host.nodes import PORTS, is_placeholder, parse_visible_devices
from executor.host.npu_smi import A2, A3, DUO, family, parse_info
from executor.recipe.schema import Recipe

SET_ENV = "executor/scripts/set_env.sh"
RANKS_OF_SOC = {A2: 8, A3: 16, DUO: 2}
"""Ranks of a node whose chips cannot be counted: an A2 node, an A3 node (8 modules of 2 dies), one 300I DUO card."""

LOCAL_ADDRESS = "127.0.0.1"
MEND = f"write the nodes' addresses in rank order into IPs in {SET_ENV}, alike on every node"


@dataclass(frozen=True)
class Layout:
    """Which ranks run where: the nodes of a job in the order of their ranks, and which of them this is."""

    addresses: tuple[str, ...]
    node: int
    ranks_per_node: int
    port: int
    """Master port; 0: the first free one of PORTS (one node only)."""

    @property
    def num_nodes(self) -> int:
        return len(self.addresses)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def master(self) -> str:
        return self.addresses[0]

    @property
    def address(self) -> str:
        """This node's own."""
        return self.addresses[self.node]

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        return range(self.node * self.ranks_per_node, (self.node + 1) * self.ranks_per_node)

    @property
    def in_words(self) -> str:
        return f"{self.num_nodes} node(s) of {self.ranks_per_node} rank(s): {', '.join(self.addresses)}"

    def address_of(self, rank: int) -> str:
        """The node that a rank runs on."""
        return self.addresses[rank // self.ranks_per_node]


def lay_out(recipe: Recipe, device: str, entries: tuple[str, ...], machine: Machine) -> Layout:
    """How a recipe of several ranks is laid over the nodes.

    `device` is the recipe's with `auto` settled, `entries` are the IPs of set_env.sh. Raises UserError for a world that
    does not fit, and for addresses that do not say which node this is.
    """
    world_size = recipe.parallel.world_size
    port = machine.environment.get("MASTER_PORT", "")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"MASTER_PORT={port} is no port: set a number from 1 to 65535, or unset it")
    check_entries(entries, machine)
    if device == "npu":
        per_node = npu_ranks(recipe.model.soc, machine)
        num_nodes = num_npu_nodes(world_size, per_node)
    else:
        # Nothing but IPs says how many nodes there are; a template's placeholders do not.
        num_nodes = 1 if all(is_placeholder(entry) for entry in entries) else len(entries)
        if world_size % num_nodes:
            raise UserError(
                f"parallel_config.world_size: got {world_size}, which cannot be dealt evenly to the {num_nodes} nodes "
                f"of IPs in {SET_ENV}: make it a multiple of {num_nodes}, or correct IPs"
            )
    per_node = world_size // num_nodes
    if num_nodes < len(entries) and not any(is_placeholder(entry) for entry in entries):
        raise UserError(
            f"parallel_config.world_size: {world_size} rank(s) fit on {num_nodes} node(s), but IPs in {SET_ENV} names "
            f"{len(entries)} ({', '.join(entries)}), each of which would run the job: take the others out of IPs "
            "(IPs=() for this node alone), or set a world_size for all of them"
        )
    if num_nodes == 1:
        return Layout((LOCAL_ADDRESS,), 0, per_node, int(port or 0))
    addresses = check_addresses(entries, num_nodes, machine)
    return Layout(addresses, find_node(addresses, machine), per_node, int(port or PORTS[0]))


def npu_ranks(soc: str | None, machine: Machine) -> int:
    """Ranks this node can hold: its visible chips, else those the driver shows, else what its kind of node has."""
    shown = machine.run(["npu-smi", "info"])
    listed = parse_info(shown.stdout).chips if shown else ()
    chips = len(listed) or len(machine.glob("/dev/davinci[0-9]*"))
    visible = machine.environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        read = parse_visible_devices(visible, chips)
        if read.problem:
            raise UserError(f"ASCEND_RT_VISIBLE_DEVICES={visible}: {read.problem}; write 0,1,2 or unset it")
        return len(read.devices)
    if chips:
        return chips
    soc = soc or (family(listed[0].name) if listed else None)
    if soc not in RANKS_OF_SOC:
        raise UserError(
            "device npu: this machine shows no chips (npu-smi, /dev/davinci*) and the recipe names none; set "
            "model_config.soc, or run python -m executor.commands.doctor"
        )
    return RANKS_OF_SOC[soc]


def num_npu_nodes(world_size: int, per_node: int) -> int:
    """Nodes of a world on nodes of `per_node` chips."""
    if world_size <= per_node:
        return 1
    if world_size % per_node:
        raise UserError(
            f"parallel_config.world_size: got {world_size}; this node has {per_node} chip(s), so a larger world must "
            f"be a multiple of {per_node}. Allowed: up to {per_node}, or {2 * per_node}, {3 * per_node} ... over "
            "several nodes; ASCEND_RT_VISIBLE_DEVICES chooses fewer chips of each node"
        )
    return world_size // per_node


def check_entries(entries: tuple[str, ...], machine: Machine) -> None:
    """UserError for what is neither a placeholder nor an address nor a host, however many nodes the job has."""
    bad = [entry for entry in entries if not is_placeholder(entry) and machine.resolve(entry) is None]
    if bad:
        verb = "are no addresses and no known hosts" if len(bad) > 1 else "is no address and no known host"
        raise UserError(f"IPs in {SET_ENV}: {', '.join(bad)} {verb}: {MEND}; IPs=() for this node alone")


def check_addresses(entries: tuple[str, ...], num_nodes: int, machine: Machine) -> tuple[str, ...]:
    """The addresses of the `num_nodes` nodes. UserError for anything in IPs that is no usable address."""
    if not entries:
        raise UserError(f"the recipe needs {num_nodes} nodes, but IPs in {SET_ENV} is empty: {MEND}")
    placeholders = [entry for entry in entries if is_placeholder(entry)]
    if placeholders:
        raise UserError(f"IPs in {SET_ENV} still has placeholders ({', '.join(placeholders)}): {MEND}")
    addresses = [address for address in map(machine.resolve, entries) if address]  # check_entries has seen them
    if len(set(addresses)) < len(addresses):
        raise UserError(f"IPs in {SET_ENV} names a node twice ({', '.join(entries)}): name each once")
    loops = [address for address in addresses if re.match(r"127\.|::1$|0\.0\.0\.0$", address)]
    if loops:
        raise UserError(f"IPs in {SET_ENV}: {', '.join(loops)} cannot be reached from other nodes: {MEND}")
    if len(addresses) < num_nodes:
        raise UserError(
            f"the recipe needs {num_nodes} nodes, but IPs in {SET_ENV} names {len(addresses)} "
            f"({', '.join(entries)}): {MEND}"
        )
    return tuple(addresses)


def find_node(addresses: tuple[str, ...], machine: Machine) -> int:
    """This machine's place in `addresses`; UserError where it has none, or two. It is never taken for the first."""
    here = [node for node, address in enumerate(addresses) if machine.is_local(address)]
    if len(here) == 1:
        return here[0]
    if here:
        names = ", ".join(addresses[node] for node in here)
        raise UserError(f"IPs in {SET_ENV} names this machine twice ({names}): name each node once")
    shown = machine.addresses()
    own = ", ".join(
        address
        for name, found in shown.items()
        for address in found
        if name != "lo" and not address.lower().startswith("fe80")
    )
    raise UserError(
        f"this machine ({own or 'no address found'}) is not among the {len(addresses)} nodes of the job "
        f"({', '.join(addresses)}): correct IPs in {SET_ENV}, alike on every node"
    )
