"""What the host reads of a chip: on a real one every read waits for all that is queued before it.

Emulated tensors lie in host memory, where a read costs nothing and goes unseen. `reading` counts the calls that bring
values to Python, or whose result's shape depends on values; a copy that was queued for a later look (Ops.read_back) is
one read when it is looked at. What kernels do for themselves is the chip's doing and is not counted.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from emulator import registry

_READS = (
    ("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique")
    + ("__bool__", "__int__", "__float__", "__index__", "__array__")
)  # fmt: skip
_INDEXED = ("__getitem__", "__setitem__")  # reads where a mask is the index


@contextlib.contextmanager
def reading() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Gives a list that grows by (method, shape) of every read made inside. For one thread, and code that is compiled
    already."""
    found: list[tuple[str, tuple[int, ...]]] = []
    inside = False

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or registry.is_computing() or (name in _INDEXED and not _has_mask(args[0])):
                return plain(self, *args, **kwargs)
            found.append((name, tuple(self.shape)))
            inside = True  # one read may be made of others
            try:
                return plain(self, *args, **kwargs)
            finally:
                inside = False

        return method

    methods = {name: getattr(torch.Tensor, name) for name in (*_READS, *_INDEXED)}
    own = {name for name in methods if name in vars(torch.Tensor)}
    for name, plain in methods.items():
        setattr(torch.Tensor, name, counted(name, plain))
    try:
        yield found
    finally:
        for name, plain in methods.items():
            if name in own:
                setattr(torch.Tensor, name, plain)
            else:
                delattr(torch.Tensor, name)


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)
