"""Layers take the device's form while the rest of the checkpoint is read: each as soon as its own tensors are there.

One thread prepares, one layer at a time, so that no more than one stands in both forms; a layer's plain weights are
gone when it is done. Left to `finalize`: what shares a parameter with somebody else, as a tied head does.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor, nn

from executor.checkpoint.pull import Pull, finalize


class EarlyPreparation:
    """Of a model whose `pulls` are about to be read. A context manager; at its end all that it has begun is done.

    Raises what a layer raises that cannot be prepared.
    """

    def __init__(self, model: nn.Module, pulls: Iterable[Pull]) -> None:
        self.prepared: set[nn.Module] = set()
        storages, owners = [_storage(pull.into) for pull in pulls if pull.into.numel()], _owners(model)
        if not owners.keys() >= set(storages):  # some are no parameter's: who reads those is not known here
            storages = []
        self._owner = {storage: owners[storage] for storage in storages}
        self._left = Counter(owners[storage] for storage in storages)
        self._running: list[Future[None]] = []

    def filled(self, pull: Pull) -> None:
        """Its slice is in place."""
        layer = self._owner.get(_storage(pull.into))
        if layer is None:
            return
        self._left[layer] -= 1
        if not self._left[layer]:
            self.prepared.update(layer.modules())
            self._running.append(self._thread.submit(finalize, layer))

    def __enter__(self) -> "EarlyPreparation":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare: weights")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._running:
                future.result()


def _owners(model: nn.Module) -> dict[int, nn.Module | None]:
    """Storage of each parameter -> the outermost layer with `prepare` around it; None where it cannot go alone."""
    found: dict[int, set[nn.Module | None]] = defaultdict(set)
    for owner, module in _with_owner(model, None):
        for parameter in module.parameters(recurse=False):
            found[_storage(parameter)].add(owner)
    tangled = {owner for owners in found.values() if len(owners) > 1 for owner in owners}
    return {storage: None if tangled & owners else next(iter(owners)) for storage, owners in found.items()}


def _with_owner(module: nn.Module, owner: nn.Module | None) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    if owner is None and hasattr(module, "prepare"):
        owner = module
    yield owner, module
    for child in module.children():
        yield from _with_owner(child, owner)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
