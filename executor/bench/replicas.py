"""The replicas of one job at the same run: they begin together, and the first gets every result.

All of it goes through the job's key-value store. Each request belongs to the replica at whose turn it comes. With one
replica there is nobody to wait for. Replicas on other nodes have clocks of their own: times are told from each one's
own beginning, which lie a few milliseconds apart.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch.distributed import PrefixStore

from executor.bench.results import RequestResult
from executor.errors import UserError
from executor.parallel.groups import Parallel


class Replicas:
    """One replica's place among all, for the ranks that lead one. `meanwhile` is called while others are waited for:
    their steps may need this replica's experts."""

    def __init__(self, parallel: Parallel, meanwhile: Callable[[], Any]) -> None:
        self._store = PrefixStore("bench", parallel.store)
        self._number, self._size = parallel.replicas.rank, parallel.replicas.size
        self._meanwhile = meanwhile
        self._num_runs = 0

    @property
    def is_first(self) -> bool:
        return self._number == 0

    def agree(self, digest: str) -> None:
        """Raises UserError where this replica would ask other requests than the first one."""
        if self._size == 1:
            return
        if self.is_first:
            self._store.set("requests", digest)
        elif self._store.get("requests").decode() != digest:
            raise UserError(
                "data_config: the data set here holds other requests than on rank 0's machine; copy the same files to "
                "every node"
            )

    def share(self, requests: Sequence[Any]) -> Sequence[Any]:
        """This replica's part of a run's requests."""
        return requests[self._number :: self._size]

    def begin(self) -> None:
        """Returns when every replica has come here."""
        self._num_runs += 1
        if self._size == 1:
            return
        key = f"ready/{self._num_runs}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self._size:
            self._meanwhile()

    def gather(self, results: list[RequestResult]) -> list[RequestResult]:
        """The results of all replicas on the first one, in the order of the run's requests; elsewhere its own."""
        if self._size == 1:
            return results
        if not self.is_first:
            self._store.set(self._key(self._number), json.dumps([asdict(each) for each in results]))
            return results
        keys = [self._key(number) for number in range(1, self._size)]
        while not self._store.check(keys):
            self._meanwhile()
        parts = [results, *(self._taken(key) for key in keys)]
        number, order = sum(map(len, parts)), []
        for place in range(number):
            order.append(parts[place % self._size][place // self._size])
        return order

    def _key(self, number: int) -> str:
        return f"results/{self._num_runs}/{number}"

    def _taken(self, key: str) -> list[RequestResult]:
        rows = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return [RequestResult(**{**row, "token_times_s": tuple(row["token_times_s"])}) for row in rows]
