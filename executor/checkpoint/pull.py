"""What a layer asks of the checkpoint: which tensor, which part of it, and where it goes.

Weights are pulled: a layer lists its tensors, the loader reads just those slices.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Canonical tensor name -> something with `.shape`: what the checkpoint holds, for layers that meet several forms.
Catalog = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Pull:
    """A wish: slice `index` of tensor `name` goes into `into`.

    `shape` is the whole tensor's as the model sees it, `index` slices that (missing trailing slices take all), and
    `into.shape` equals the slice's shape. `into` may be a view of a fused parameter, of any dtype and device.
    `transpose`: in the file the last two dims of `shape` are swapped; `shape` and `index` stay the model's.
    `convert`: the slice as the file has it -> what goes into `into`, where that is not a plain copy: of another type,
    or a single number that is meant for every row. `accepts`: the types that it takes, where not all.
    `judged`: `convert` raises UserError for values that cannot be, which may be asked for without loading.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    into: Tensor
    transpose: bool = False
    convert: Callable[[Tensor], Tensor] | None = None
    accepts: tuple[torch.dtype, ...] = ()
    judged: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        return swap_last_two(self.shape) if self.transpose else tuple(self.shape)

    @property
    def file_index(self) -> tuple[slice, ...]:
        """One slice with explicit bounds per dim of `file_shape`."""
        padded = tuple(self.index) + (slice(None),) * (len(self.shape) - len(self.index))
        bounds = tuple(slice(*part.indices(size)[:2]) for part, size in zip(padded, self.shape, strict=True))
        return swap_last_two(bounds) if self.transpose else bounds


def swap_last_two(dims: tuple) -> tuple:
    """`(..., a, b)` -> `(..., b, a)`."""
    return (*dims[:-2], dims[-1], dims[-2])


def whole(name: str, into: Tensor) -> Pull:
    """The whole tensor, as it is."""
    return Pull(name, tuple(into.shape), (slice(None),) * into.dim(), into)


def zeros(beside: Pull, into: Tensor) -> Pull:
    """Zeros, for a tensor that the checkpoint need not have. `beside`: the pull of one that it has, which is read."""
    return replace(beside, into=into, transpose=False, convert=lambda x: torch.zeros((), dtype=into.dtype))


def elsewhere(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    convert: Callable[[Tensor], Tensor] | None = None,
    accepts: tuple[torch.dtype, ...] = (),
) -> Pull:
    """Nothing of the tensor: another rank holds it. The checkpoint is still held to have it, in this shape and type."""
    nothing = torch.empty(0, *shape[1:], dtype=dtype, device="cpu")
    return Pull(name, shape, (slice(0, 0),), nothing, convert=convert, accepts=accepts)


def pull_all(module: nn.Module, catalog: Catalog, prefix: str) -> Iterator[Pull]:
    """The pulls of every submodule that has a `pulls` method, by its attribute path under `prefix`."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if hasattr(child, "pulls"):
            yield from child.pulls(catalog, path)
        else:
            yield from pull_all(child, catalog, path)


def finalize(module: nn.Module, done: Container[nn.Module] = ()) -> None:
    """After loading: let every layer turn its weights into the device's form, one layer at a time; `done` have it."""
    for child in module.modules():
        if hasattr(child, "prepare") and child not in done:
            child.prepare()


def drained(pulls: list[Pull]) -> Iterator[Pull]:
    """All of them, and the list is left empty: whoever takes them has the only hold of what they fill."""
    pulls.reverse()
    while pulls:
        yield pulls.pop()


def local_bytes(pulls: Iterable[Pull]) -> int:
    """Bytes that these pulls ask of the checkpoint, counted in the dtype they are kept in."""
    return sum(pull.into.numel() * pull.into.element_size() for pull in pulls)


def empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter in the default dtype, on the default device; inside `deferred` without memory."""
    device = "meta" if _is_deferred else None
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


_is_deferred = False


@contextmanager
def deferred() -> Iterator[None]:
    """What `empty` makes inside has no memory before `materialise`: until then its scheme may still be chosen."""
    global _is_deferred
    before, _is_deferred = _is_deferred, True
    try:
        yield
    finally:
        _is_deferred = before


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the parameters that were made without memory theirs, uninitialised; what two layers share stays shared."""
    made: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                setattr(layer, name, made[id(parameter)])
