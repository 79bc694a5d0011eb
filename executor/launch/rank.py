"""This process as one rank of a job: who started it, its signs of life, and where its result goes.

Under this project's launcher the result goes to the launcher, which alone prints, and which ends this process when
the job is over. Under torchrun or Slurm the ranks are by themselves: they compare notes before they start, rank 0
watches the others and prints, and each ends itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from executor.errors import UserError
from executor.host.env import code_digest, environment, rank_place, set_always
from executor.launch.foreign import check_world, rank_variables
from executor.launch.processes import die_with_parent
from executor.recipe.schema import Recipe

if TYPE_CHECKING:  # torch takes seconds to import; a mistake in the command line need not wait for it
    from executor.launch.heartbeat import Heartbeat
    from executor.launch.watch import Watch

WATCH_S = 0.2
FAREWELL_S = 1.0
"""How long the rank that holds the store stays for the others to learn why the job ends."""

Document = dict[str, Any]


def outcome_of(store: Any, rank: int) -> dict[str, Any] | None:
    """What a rank has left: its `document`, its `status`, the `error` in words, and whether it `is_first` to fail."""
    key = f"outcome/{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


class Rank:
    """This process among the ranks of its job. `variables` are torchrun's, `has_launcher` means this project's."""

    def __init__(self, variables: dict[str, str], has_launcher: bool) -> None:
        self.place = rank_place()
        self._variables, self._has_launcher = variables, has_launcher
        self._heart: Heartbeat | None = None
        self._store: Any = None
        self._is_host = False
        self._result = threading.Lock()  # held by the thread that gives the result, of which there is one
        self._is_agreed = False  # the ranks have started: from here on a mistake may be one rank's alone

    @classmethod
    def of_this_process(cls) -> Rank | None:
        """None in a process that no launcher has made a rank. UserError for half of a launcher's variables.

        From here on RANK and its companions are in the environment, and only rank 0 can write to stdout.
        """
        inherited = environment()
        variables = rank_variables(inherited)
        if not variables:
            return None
        set_always(variables)
        launcher = inherited.get("RECIPE_LAUNCHER")
        if launcher is not None:
            die_with_parent(int(launcher))
        rank = cls(variables, launcher is not None)
        if rank.place.rank:
            sys.stdout.flush()
            os.dup2(2, 1)
        return rank

    @property
    def shows_mistakes(self) -> bool:
        """Whether a UserError is for this rank to print: not what the launcher prints, or all ranks of a node find."""
        if self._has_launcher:
            return self.place.rank > 0  # for its log; rank 0's log is on the launcher's screen
        return self._is_agreed or self.place.local_rank == 0

    def start(
        self,
        recipe: Recipe,
        command: str,
        check: Callable[[Recipe, int], Recipe],
        set_options: Callable[[], None],
    ) -> None:
        """Join the job: signs of life, and without our launcher the preflight, whose UserErrors every rank gets.

        `set_options` sets the environment variables that our launcher would have set; the user's own stay.
        """
        check_world(self._variables, recipe.parallel.world_size)
        if not self._has_launcher:
            set_options()
        if self.place.world_size > 1:
            self._join(recipe, command, check)
        self._is_agreed = True

    def _join(self, recipe: Recipe, command: str, check: Callable[[Recipe, int], Recipe]) -> None:
        from executor.launch import store as stores
        from executor.launch.heartbeat import Heartbeat, rank_beat

        address, port = self._variables["MASTER_ADDR"], int(self._variables["MASTER_PORT"])
        rank = self.place.rank
        self._is_host = rank == 0 and environment().get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store = stores.connect(address, port, is_server=True) if self._is_host else stores.join(address, port)
        self._heart = Heartbeat(stores.connect(address, port), rank_beat(rank))
        if not self._has_launcher:
            watch = self._watch_others(recipe.parallel.hang_timeout_s if rank == 0 else None)
            threading.Thread(target=self._keep_watch, args=(watch,), name="store: watch", daemon=True).start()
        self._heart.start()
        if not self._has_launcher:
            self._preflight(recipe, command, check)

    def _preflight(self, recipe: Recipe, command: str, check: Callable[[Recipe, int], Recipe]) -> None:
        from executor.launch.preflight import Card, agree, exchange, take_place

        names = [f"rank {rank}" for rank in range(self.place.world_size)]

        def make_card() -> Card:
            settled, problem = None, ""
            try:
                if self.place.local_rank == 0:  # the others look at the same files
                    settled = check(recipe, self.place.local_world_size).model_dump(mode="json", by_alias=True)
            except UserError as error:
                problem = str(error)
            return Card(names[self.place.rank], command, code_digest(), settled, problem)

        take_place(self._store, self.place.rank, names, f"{self.place.world_size} ranks")
        agree(exchange(self._store, self.place.rank, names, make_card))

    def _watch_others(self, hang_timeout_s: int | None) -> Watch:
        """What this rank does for want of a launcher of ours: it watches the store, and as rank 0 (which has a
        `hang_timeout_s`) the other ranks."""
        from executor.launch.heartbeat import Fault, hang_of
        from executor.launch.watch import Watch, watched_rank

        def hanging(rank: int) -> Fault:
            return Fault(hang_of(f"rank {rank}", hang_timeout_s), rank=rank)

        others = range(1, self.place.world_size) if hang_timeout_s is not None else ()
        watched = [
            watched_rank(rank, hang_timeout_s, partial(hanging, rank), partial(self._has_left, rank)) for rank in others
        ]
        return Watch(self._heart, lambda why: Fault(f"the job's store is gone ({why})"), watched)

    def _keep_watch(self, watch: Watch) -> None:
        """End this process when the job is over, or its store gone. In a thread: the main one may wait for a peer."""
        from executor.launch.heartbeat import post

        heart = self._heart
        while not heart.is_stopped:
            time.sleep(WATCH_S)
            fault = watch.look()
            if fault is None or heart.is_stopped:
                continue
            if heart.fault or heart.broken:
                self._leave_at_once(fault.summary, fault.status)
            post(self._store, fault)  # every rank reads it, this one too

    def _leave_at_once(self, reason: str, status: int) -> None:
        is_result = self._result.acquire(blocking=False)
        if not is_result and self._heart.is_stopped:
            return  # the main thread is ending this process
        print(f"error: {reason}; rank {self.place.rank} ends", file=sys.stderr, flush=True)
        if self.place.rank == 0 and is_result:
            print(json.dumps({"command": "launch", "error": reason}, ensure_ascii=False), flush=True)
            time.sleep(FAREWELL_S if self._is_host else 0)
        os._exit(status)

    def _has_left(self, rank: int) -> bool:
        return self._store.check([f"left/{rank}"])

    def finish(self, document: Document, status: int, failed: bool) -> int:
        """Hand the result over; returns this process's exit status."""
        if self._has_launcher:
            return self._tell_launcher(document, status, failed)
        if failed and self._heart is not None:
            self._heart.stop()
        if not self._result.acquire(blocking=False):
            threading.Event().wait()  # _leave_at_once ends this process
        if failed and self._store is not None:
            document, status = self._tell_others(document, status)
        if self.place.rank == 0:
            print(json.dumps(document, ensure_ascii=False), flush=True)
        if self._store is not None:
            with _while_there_is_a_store():
                self._leave(failed)
        return status

    def _tell_launcher(self, document: Document, status: int, failed: bool) -> int:
        """Only what was raised is a failed rank: a command that ends with status 2 is done."""
        if self._heart is not None:
            self._heart.stop()
        if self._store is not None:
            with _while_there_is_a_store():
                outcome = {"document": document, "status": status, "error": document.get("error")}
                if failed:
                    name = str(self.place.rank)
                    outcome["is_first"] = self._store.compare_set("first_failed", "", name).decode() == name
                self._store.set(f"outcome/{self.place.rank}", json.dumps(outcome))
        return status if failed else 0

    def _tell_others(self, document: Document, status: int) -> tuple[Document, int]:
        """What was raised here is the job's fault, unless that is another's, from which this one followed."""
        from executor.launch.heartbeat import Fault, post

        words = str(document["error"])
        raised = Fault(words if status == 2 else f"rank {self.place.rank} failed: {words}", status)
        fault = post(self._store, raised)
        if fault.summary == raised.summary:
            return document, status
        print(f"error: {fault.summary}", file=sys.stderr, flush=True)
        return document | {"error": fault.summary}, fault.status

    def _leave(self, failed: bool) -> None:
        """The rank that holds the store goes last."""
        self._store.set(f"left/{self.place.rank}", "yes")
        if self._is_host and failed:
            time.sleep(FAREWELL_S)
        elif self._is_host:  # without limit: _watch ends this process when one of them hangs
            while not all(self._has_left(rank) for rank in range(1, self.place.world_size)):
                time.sleep(0.05)
        if self._heart is not None:
            self._heart.stop()


@contextlib.contextmanager
def _while_there_is_a_store() -> Iterator[None]:
    """Without one the launcher, or the other ranks, see that this one is gone."""
    from executor.launch.store import BROKEN

    with contextlib.suppress(*BROKEN):
        yield
