"""A job of several ranks, as one node's launcher sees it: who takes part, preflight, the ranks, the watch, the end.

The ranks get torchrun's variables and meet in torch.distributed's TCPStore, so a rank cannot tell the two launchers
apart. torchrun's agent itself is not used here: it knows its own node only, tells other nodes nothing, and gives ranks
30 s to end. Whatever may block (the store of a machine that is gone) is asked in a thread; this process's main thread
looks at everything ten times a second, and ends the job at the first fault.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from executor.errors import UserError
from executor.host.env import REPO_ROOT, code_digest
from executor.host.machine import Machine
from executor.host.nodes import is_address, parse_set_env
from executor.host.streams import reader_is_gone
from executor.launch import store as stores
from executor.launch.heartbeat import (
    LOST_S,
    Fault,
    Heartbeat,
    Kind,
    fault_of_exit,
    hang_of,
    node_beat,
    post,
)
from executor.launch.layout import LOCAL_ADDRESS, SET_ENV, Layout, lay_out
from executor.launch.options import in_words, network_options, rank_options
from executor.launch.preflight import PROBLEM, Card, Rivals, agree, exchange, take_place
from executor.launch.processes import Follower, RankProcess, end_all, start_rank
from executor.launch.rank import outcome_of
from executor.launch.watch import Watch, watched_node, watched_rank
from executor.recipe.schema import Recipe
from executor.recipe.settle import resolve_device

logger = logging.getLogger(__name__)

WATCH_S = 0.1
SETTLE_S = {Kind.KILLED: 0.0, Kind.MISTAKE: 0.0, Kind.RAISED: 1.0, Kind.FOLLOWED: 2.0}
"""How long the launcher waits for a fault that explains the one it has seen: a rank raises when its peer dies, and may
be noticed first."""
FAREWELL_S = 1.0
"""How long the master stays for the others to learn why the job ends."""
LEAVE_S = 5.0
REPORT_S = 10.0
"""How long a node that cannot take part tries to say so to the master."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
DRAINING = ("serve",)
"""Commands whose rank 0 ends a job in good order when it gets DRAIN; a second signal ends it at once."""
DRAIN_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN = signal.SIGUSR1
DRAIN_KEY = "drain"
"""Set in the job's store by another node's launcher, for the master's."""

Document = dict[str, Any]
T = TypeVar("T")


def start_job(
    recipe: Recipe, command: str, argv: Sequence[str], check: Callable[[Recipe, int], Recipe]
) -> tuple[Document, int]:
    """Run this node's part of a job: its JSON document and the exit status. UserError before any rank starts.

    Every rank is `python -m executor ARGV`. `check` settles the recipe for so many
    ranks of this node, or raises UserError for what keeps it from starting.
    """
    machine = Machine()
    device = resolve_device(recipe).model.device
    entries = node_entries(machine)
    try:
        layout = lay_out(recipe, device, entries, machine)
    except UserError as error:
        _report_to_master(entries, machine, str(error))
        raise
    options = rank_options(recipe, device, len(layout.ranks)) | network_options(layout, device, machine)
    return Job(recipe, command, argv, layout, options, check).run()


def node_entries(machine: Machine) -> tuple[str, ...]:
    """The entries of IPs in set_env.sh: as infer.sh hands them over, else as the file has them."""
    entries = machine.environment.get("RECIPE_NODES")
    if entries is not None:
        return tuple(entries.replace(",", " ").split())
    return parse_set_env(machine.read(str(REPO_ROOT / SET_ENV)) or "").ips


def _report_to_master(entries: tuple[str, ...], machine: Machine, reason: str) -> None:
    """Say to the nodes that may be waiting for this one why it does not come."""
    master = machine.resolve(entries[0]) if len(entries) > 1 and is_address(entries[0]) else None
    if master is None or machine.is_local(master):
        return
    port = machine.environment.get("MASTER_PORT", "")
    try:
        stores.join(master, int(port) if port.isdigit() else stores.PORTS[0], REPORT_S).set(PROBLEM, reason)
    except (UserError, *stores.BROKEN):
        return  # nobody is waiting yet; they will be told when they ask


class _Over(Exception):
    """The job ends, for the reason in `fault`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.summary)
        self.fault = fault


class Job:
    """One run of a recipe of several ranks. `options` are environment variables for the ranks; the user's own win."""

    def __init__(
        self,
        recipe: Recipe,
        command: str,
        argv: Sequence[str],
        layout: Layout,
        options: dict[str, str],
        check: Callable[[Recipe, int], Recipe],
    ) -> None:
        self._recipe, self._command, self._argv = recipe, command, argv
        self._layout, self._options, self._check = layout, options, check
        self._names = [f"node {address}" for address in layout.addresses] if layout.num_nodes > 1 else ["this node"]
        self._store: Any = None
        self._heart: Heartbeat | None = None
        self._watch: Watch | None = None
        self._ranks: list[RankProcess] = []
        self._follower: Follower | None = None
        self._faults: dict[int, Fault] = {}  # of ranks of this node that have ended badly, the first one _failed_at
        self._failed_at = inf
        self._signal: int | None = None
        self._drained_by: int | None = None  # the signal after which rank 0 was asked to come to an end

    def run(self) -> tuple[Document, int]:
        """The JSON document of this node's launcher and the job's exit status. UserError for what preflight finds."""
        former = self._catch_signals()
        try:
            self._join()
            folder = self._preflight()
            self._start_ranks(folder)
            while any(rank.exit_code != 0 for rank in self._ranks):
                self._look()
                time.sleep(WATCH_S)
            return self._finish()
        except _Over as over:
            return self._end(over.fault)
        except UserError:
            self._leave(LEAVE_S)  # the others read what is wrong from the master
            raise
        finally:
            end_all(self._ranks)
            if self._heart:
                self._heart.stop()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _catch_signals(self) -> dict[int, Any]:
        """From now on a signal is noted. One that is ignored (nohup, a shell's background job) stays ignored."""

        def note(number: int, _: object) -> None:
            self._signal = self._signal or number

        caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        return {number: signal.signal(number, note) for number in caught}

    def _await(self, action: Callable[[], T]) -> T:
        """The result of `action`, which asks the store and may block, while the watch goes on."""
        future = stores.in_thread(action)
        while not wait([future], WATCH_S).done:
            self._look()
        try:
            return future.result()
        except stores.BROKEN as error:
            raise _Over(self._lost_master(stores.first_line(error))) from None

    # Before the ranks

    def _join(self) -> None:
        layout = self._layout
        if layout.node == 0:
            self._store, port = self._await(lambda: stores.serve(layout.master, layout.port, Machine()))
            self._layout = layout = replace(layout, port=port)
        else:
            self._store = self._await(lambda: stores.join(layout.master, layout.port))
        self._await(lambda: take_place(self._store, layout.node, self._names, layout.in_words))
        store = self._await(lambda: stores.connect(layout.master, layout.port))
        self._heart = Heartbeat(store, node_beat(layout.node))
        others = (node for node in range(layout.num_nodes) if node != layout.node)
        watched = [watched_node(node, partial(self._lost_node, node)) for node in others]
        self._watch = Watch(self._heart, self._lost_master, watched, LOST_S)
        self._heart.start()

    def _preflight(self) -> Path:
        """The folder of this node's logs, when all nodes have agreed to start."""
        layout, store = self._layout, self._store
        if layout.node == 0:
            now = time.time()  # to the millisecond: jobs may be started in one breath
            started = time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"-{int(now % 1 * 1000):03d}"
            self._await(lambda: store.set("started", started))
        rivals = Rivals(layout) if layout.node == 0 else lambda missing: None
        agree(self._await(lambda: exchange(store, layout.node, self._names, self._card, rivals)))
        started = self._await(lambda: store.get("started").decode())
        folder = self._log_root() / started
        folder.mkdir(parents=True, exist_ok=True)
        where = f"{layout.num_nodes} nodes ({', '.join(layout.addresses)})" if layout.num_nodes > 1 else "this node"
        logger.info("%d ranks on %s; logs in %s", layout.world_size, where, folder)
        return folder

    def _card(self) -> Card:
        recipe, problem = self._recipe, ""
        try:
            recipe = self._check(self._recipe, len(self._layout.ranks))
            self._log_root().mkdir(parents=True, exist_ok=True)
        except UserError as error:
            problem = str(error)
        except PermissionError as error:
            problem = f"model_config.output_path: no logs can be written to {self._log_root()} ({error.strerror})"
        except Exception as error:  # whatever it is, the other nodes must not wait for this one
            logger.exception("this node cannot start")
            problem = f"{type(error).__name__}: {error}"
        name = self._names[self._layout.node]
        return Card(name, self._command, code_digest(), recipe.model_dump(mode="json", by_alias=True), problem)

    def _log_root(self) -> Path:
        return Path(self._recipe.model.output_path) / "logs"

    def _start_ranks(self, folder: Path) -> None:
        layout = self._layout
        place_in_job = {
            "WORLD_SIZE": str(layout.world_size),
            "LOCAL_WORLD_SIZE": str(len(layout.ranks)),
            "MASTER_ADDR": layout.master,
            "MASTER_PORT": str(layout.port),
            # This process has opened the store: torch.distributed's env:// joins it (as under torchrun).
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "RECIPE_LAUNCHER": str(os.getpid()),
        }
        users = Machine().environment
        added = {name: value for name, value in self._options.items() if name not in users}
        logger.info("environment of the ranks: %s", in_words(added))
        variables = added | users | place_in_job
        for local, rank in enumerate(layout.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            self._ranks.append(start_rank(rank, self._argv, variables | place, folder))
        if layout.node == 0:
            self._follower = Follower(self._ranks[0].log)
            self._heart.watch([DRAIN_KEY])
        timeout_s = self._recipe.parallel.hang_timeout_s
        self._watch.add(
            watched_rank(rank.rank, timeout_s, partial(self._hanging, rank), partial(_has_ended, rank))
            for rank in self._ranks
        )

    # The watch

    def _look(self) -> None:
        """Raise _Over for the first fault there is."""
        self._copy_log()
        self._drain()
        if self._signal:
            where = f" on node {self._layout.address}" if self._layout.address != LOCAL_ADDRESS else ""
            saved = self._recipe.data.results_path
            resume = f"; the answers so far are in {saved}, and the same command goes on from there" if saved else ""
            raise _Over(_interrupted(self._signal, f"{where}{resume}"))
        if self._watch is None:
            return
        if not self._heart.fault:  # what ended here says more than who is silent
            self._look_at_ranks()
        fault = self._watch.look()
        if fault:
            raise _Over(fault)

    def _drain(self) -> None:
        """Pass the first signal on to rank 0, where the command knows what to do then."""
        if self._command not in DRAINING or self._drained_by or not self._ranks:
            return
        is_master = self._layout.node == 0
        if self._signal in DRAIN_SIGNALS:
            self._drained_by, self._signal = self._signal, None
            logger.info(
                "%s: the job comes to its end; a second one ends it at once", signal.Signals(self._drained_by).name
            )
            if not is_master:
                stores.soon(lambda: self._store.set(DRAIN_KEY, "yes"), FAREWELL_S)
        elif is_master and self._heart.has_seen(DRAIN_KEY):
            self._drained_by = signal.SIGTERM
        if self._drained_by and is_master and self._ranks[0].exit_code is None:
            os.kill(self._ranks[0].process.pid, DRAIN)

    def _look_at_ranks(self) -> None:
        if self._drained_by and self._ranks[0].exit_code == -DRAIN:  # it was not so far yet that it could be asked
            raise _Over(_interrupted(self._drained_by))
        for rank in self._ranks:
            if rank.exit_code and rank.rank not in self._faults:
                self._failed_at = min(self._failed_at, time.monotonic())
                self._faults[rank.rank] = self._fault_of_rank(rank)
        cause = min(self._faults.values(), key=lambda fault: fault.kind, default=None)
        if cause and time.monotonic() - self._failed_at >= SETTLE_S[cause.kind]:
            raise _Over(cause)

    def _fault_of_rank(self, rank: RankProcess) -> Fault:
        outcome = stores.soon(lambda: outcome_of(self._store, rank.rank), 0.5) if rank.exit_code > 0 else None
        return fault_of_exit(rank.rank, self._rank_name(rank), rank.exit_code, outcome, str(rank.log), rank.tail())

    def _lost_node(self, node: int) -> Fault:
        words = f"no sign of life for {LOST_S:.0f} s: its launcher or the network is gone; see what it printed"
        return Fault(f"node {self._layout.addresses[node]}: {words}", lost_node=node)

    def _hanging(self, rank: RankProcess) -> Fault:
        why = f": {rank.state}" if rank.state else ""
        summary = f"{hang_of(self._rank_name(rank), self._recipe.parallel.hang_timeout_s)}{why}"
        return Fault(summary, rank=rank.rank, log=str(rank.log), tail=rank.tail())

    def _rank_name(self, rank: RankProcess) -> str:
        return f"rank {rank.rank}" + (f" on node {self._layout.address}" if self._layout.num_nodes > 1 else "")

    def _lost_master(self, why: str) -> Fault:
        words = f"has lost the master {self._layout.master} ({why}): its launcher or the network is gone"
        return Fault(f"node {self._layout.address} {words}; see what it printed", lost_node=0)

    # The end

    def _finish(self) -> tuple[Document, int]:
        """All ranks of this node have ended well: wait for the other nodes', and take the result of rank 0."""
        layout, store = self._layout, self._store
        for rank in self._ranks:
            if self._await(lambda rank=rank: outcome_of(store, rank.rank)) is None:
                raise _Over(Fault(f"{self._rank_name(rank)} ended without a result", 1, rank.rank, str(rank.log)))
        self._await(lambda: store.set(f"finished/{layout.node}", "yes"))
        keys = [f"finished/{node}" for node in range(layout.num_nodes)]
        self._await(lambda: stores.wait_for(store, keys, inf, _waiting_for_nodes))
        outcome = self._await(lambda: outcome_of(store, 0))
        self._copy_log()
        self._leave(LEAVE_S)
        if layout.node == 0:
            return outcome["document"], outcome["status"]
        return self._document() | {"ok": outcome["status"] == 0}, outcome["status"]

    def _end(self, fault: Fault) -> tuple[Document, int]:
        """End this node's part of the job, tell the other nodes why, and say it."""
        is_master, lost = self._layout.node == 0, fault.lost_node
        if self._store is not None and (is_master or lost != 0) and fault is not (self._heart and self._heart.fault):
            fault = replace(post(self._store, fault), own_status=fault.own_status)
        if not is_master and lost != 0:
            self._leave(0)  # it knows; the master need not wait for its ranks to end
        end_all(self._ranks)
        self._copy_log()
        if is_master:
            self._leave(FAREWELL_S, without=lost)
        document = self._document() if self._layout.node else {"command": self._command}
        document["error"] = self._report(fault)
        if self._layout.node:
            document["ok"] = False
        return document, fault.own_status or fault.status

    def _leave(self, patience_s: float, without: int | None = None) -> None:
        """The master goes last, as its process holds the store that the others read: it waits for those who are not
        known to be lost."""
        layout, store = self._layout, self._store
        if store is None or layout.num_nodes == 1:
            return
        stores.soon(lambda: store.set(f"left/{layout.node}", "yes"), FAREWELL_S)
        if layout.node == 0:
            others = [f"left/{node}" for node in range(layout.num_nodes) if node != without]
            stores.soon(lambda: stores.wait_for(store, others, patience_s), patience_s)

    def _copy_log(self) -> None:
        if self._follower:
            self._follower.copy()

    def _report(self, fault: Fault) -> str:
        """Say on the screen why the job ends; returns it in one line."""
        if reader_is_gone():  # `| head -1`: the job ends as any Unix tool does
            return fault.summary
        print(f"error: {fault.summary}", file=sys.stderr)
        if fault.status == 2 or fault.log is None:
            return fault.summary
        where = (
            f"{fault.log} on node {self._layout.address_of(fault.rank)}" if self._layout.num_nodes > 1 else fault.log
        )
        print(f"its log: {where}", file=sys.stderr)
        if not (fault.rank == 0 and self._follower):  # then they are on the screen
            for line in fault.tail:
                print(f"  | {line}", file=sys.stderr)
        return f"{fault.summary}; log: {where}"

    def _document(self) -> Document:
        return {"command": self._command, "node": self._layout.node, "ranks": list(self._layout.ranks)}


def _interrupted(number: int, more: str = "") -> Fault:
    return Fault(f"interrupted by {signal.Signals(number).name}{more}", kind=Kind.KILLED, own_status=128 + number)


def _has_ended(rank: RankProcess) -> bool:
    return rank.exit_code is not None


def _waiting_for_nodes(keys: list[str]) -> str:
    return f"waiting for node(s) {', '.join(key.split('/')[1] for key in keys)} to finish"
