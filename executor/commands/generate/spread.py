"""The requests of one job over its replicas: whoever is free takes the next, and rank 0 gets every answer.

All of it goes through the job's key-value store: what is to be answered, a counter of what has been taken, and the
rows. One replica is the same with nobody else taking.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.distributed import PrefixStore

from dataset.sample import Dataset, Sample
from executor.errors import UserError
from executor.parallel.groups import Parallel

POLL_S = 0.02


class Spread:
    """One replica's share of a list of requests, known by their places in the data set.

    Ranks that follow their replica's first have no `dataset`, and take nothing.
    """

    def __init__(self, parallel: Parallel, dataset: Dataset | None) -> None:
        self._store = PrefixStore("generate", parallel.store)
        self._dataset = dataset
        self._is_first = parallel.rank == 0
        self._num_replicas = parallel.replicas.size
        self._todo: list[int] = []
        self._num_received = 0

    def start(self, todo: Sequence[int] = ()) -> bool:
        """Rank 0 says what is to be answered; the others learn it. Returns whether there is anything.

        Raises UserError on a replica whose data set is not rank 0's.
        """
        compares = self._dataset is not None and self._num_replicas > 1
        digest = self._dataset.digest() if compares else ""
        if self._is_first:
            self._todo = list(todo)
            self._store.set("todo", json.dumps([digest, self._todo]))
            return bool(todo)
        wanted_digest, self._todo = json.loads(self._store.get("todo"))
        if compares and wanted_digest != digest:
            raise UserError(
                f"data_config: the data set {self._dataset.path} here holds other requests than on rank 0's machine; "
                "copy the same files to every node"
            )
        return bool(self._todo)

    @property
    def max_held(self) -> int:
        """As many requests as one replica may hold while others have none; at least one."""
        return max(1, -(-len(self._todo) // self._num_replicas))

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """The requests that this replica takes, one by one."""
        while (taken := self._store.add("taken", 1)) <= len(self._todo):
            index = self._todo[taken - 1]
            yield index, self._dataset[index]

    def send(self, row: dict[str, Any]) -> None:
        """One answer to rank 0."""
        number = self._store.add("sent", 1)
        self._store.set(f"row/{number}", json.dumps(row, ensure_ascii=False))

    def receive(self, take: Callable[[dict[str, Any]], None]) -> None:
        """On rank 0: `take` the answers of other replicas that have come since the last call."""
        if self._num_replicas == 1 or not self._is_first:
            return
        for number in range(self._num_received + 1, self._store.add("sent", 0) + 1):
            row = json.loads(self._store.get(f"row/{number}"))
            self._store.delete_key(f"row/{number}")
            self._num_received = number
            take(row)

    def wait(self) -> None:
        """A moment, for others to answer."""
        time.sleep(POLL_S)
