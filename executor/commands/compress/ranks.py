"""Processes that torchrun started, each with one rank's part: what they tell one another. Alone it is the same code."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from executor.errors import UserError
from executor.host.env import RankPlace

_PATIENCE = timedelta(days=365)  # the largest part may take hours; a rank that dies ends the others through torchrun
_LOOK_EVERY_S = 0.05


class Ranks:
    """This process among those of the job."""

    def __init__(self, place: RankPlace) -> None:
        self.place = place
        if place.world_size == 1:
            self.store: Any = dist.HashStore()
        else:
            self.store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size))
        self.store.set_timeout(_PATIENCE)
        self.store = dist.PrefixStore("compress", self.store)

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    def together(self, step: str, act: Callable[[], Any]) -> list[Any]:
        """What `act` gives on every rank, in their order, when all are done with it. JSON values travel.

        Raises, on every rank, what it raised on the first that could not: UserError or RuntimeError.
        """
        outcome: dict[str, Any] = {}
        try:
            outcome["value"] = act()
        except UserError as error:
            outcome |= {"error": str(error), "is_users": True}
        except (RuntimeError, OSError) as error:
            outcome |= {"error": str(error), "is_users": False}
        self.store.set(f"{step}/{self.place.rank}", json.dumps(outcome))
        outcomes = [json.loads(self._awaited(f"{step}/{rank}")) for rank in range(self.place.world_size)]
        for rank, each in enumerate(outcomes):
            if "error" in each:
                where = "" if len({other.get("error") for other in outcomes}) == 1 else f"rank {rank}: "
                raise (UserError if each["is_users"] else RuntimeError)(where + each["error"])
        return [each["value"] for each in outcomes]

    def _awaited(self, key: str) -> bytes:
        """Looks again and again: a call that waits by itself would let no signal through."""
        while not self.store.check([key]):
            time.sleep(_LOOK_EVERY_S)
        return self.store.get(key)
