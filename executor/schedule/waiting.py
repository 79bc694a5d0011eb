"""The requests that wait to be admitted, in their order; any of them leaves at once, however many wait."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from executor.schedule.request import Request


class Waiting:
    """A queue that a preempted request enters at its front. Requests are told apart by identity."""

    def __init__(self, requests: Iterable[Request] = ()) -> None:
        self._requests: OrderedDict[Request, None] = OrderedDict.fromkeys(requests)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request in self._requests

    @property
    def first(self) -> Request:
        return next(iter(self._requests))

    def append(self, request: Request) -> None:
        self._requests[request] = None

    def append_first(self, request: Request) -> None:
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def pop_first(self) -> Request:
        return self._requests.popitem(last=False)[0]

    def remove(self, request: Request) -> None:
        del self._requests[request]
