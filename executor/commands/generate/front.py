"""A leader's share of a data set that a cluster's front door deals out: rows come and answers go by one connection.

It stands where `Spread` stands for the replicas of one job. To the front door: `ready`, `row`; from it `go` (or
`end`: there is nothing to do), `rows` [places in the data set], `end`.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from torch.distributed import PrefixStore

from dataset.sample import Dataset, Sample
from executor.cluster.leader import front_and_hello
from executor.parallel.groups import Parallel
from executor.recipe.schema import Recipe
from executor.serve import wire
from executor.serve.gate import call_blocking

MAX_HELD = 1 << 20  # the front door counts


class FrontSpread:
    """The same names as executor.commands.generate.spread.Spread. `recipe` is settled.

    Ranks that follow their replica's first have no `dataset`, and take nothing.
    """

    max_held = MAX_HELD

    def __init__(
        self, parallel: Parallel, dataset: Dataset | None, recipe: Recipe, seats: int, variables: Mapping[str, str]
    ) -> None:
        """`seats`: rows that this leader can hold. `variables`: the environment, which says where the front door is."""
        self._store = PrefixStore("front", parallel.store)
        self._is_first = parallel.rank == 0
        self._dataset = dataset
        self._rows: SimpleQueue[int | None] = SimpleQueue()  # None: there are no more
        if dataset is None:
            return
        front, hello = front_and_hello(recipe, parallel, variables)
        self._connection = call_blocking(front, hello | {"dataset": dataset.digest(), "seats": seats})

    def start(self) -> bool:
        """Whether there is anything to answer. Waits until the front door knows."""
        if self._dataset is None:
            return json.loads(self._store.get("start"))
        message = wire.read_blocking(self._connection)
        if message is None:
            raise RuntimeError("the front door is gone: its process or the network has ended")
        if self._is_first:
            self._store.set("start", json.dumps("go" in message))
        return "go" in message

    def samples(self) -> Iterator[tuple[int, Sample] | None]:
        """The samples that this leader gets; None where there is none at the moment."""
        threading.Thread(target=self._read, name="front", daemon=True).start()
        self._send({"ready": True})
        while True:
            try:
                row = self._rows.get_nowait()
            except Empty:
                yield None
                continue
            if row is None:
                return
            if row < 0:
                raise RuntimeError("the front door is gone: its process or the network has ended")
            yield row, self._dataset[row]

    def send(self, row: dict[str, Any]) -> None:
        """One answer to the front door."""
        self._send({"row": row})

    def receive(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Nothing comes from other replicas."""

    def _send(self, message: Any) -> None:
        try:
            self._connection.sendall(wire.pack(message))
        except OSError as error:
            raise RuntimeError("the front door is gone: its process or the network has ended") from error

    def _read(self) -> None:
        while (message := wire.read_blocking(self._connection)) is not None:
            for row in message.get("rows", ()):
                self._rows.put(row)
            if "end" in message:
                self._rows.put(None)
                return
        self._rows.put(-1)
