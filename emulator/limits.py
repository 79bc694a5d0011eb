"""How a kernel says that a call is outside an op's documented limits: op, chip, limit, what came instead.

A kernel's checks look at shapes, dtypes and plain arguments only, so that they hold for meta tensors too;
what can be seen in the data alone is checked where the data is used. Knows no op.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from emulator import chips

_op: ContextVar[str] = ContextVar("op", default="op")
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class LimitError(RuntimeError):
    """A call that the chip's documentation rules out: on the device it fails, or silently computes something else."""


@contextlib.contextmanager
def naming(op: str) -> Iterator[None]:
    """Errors raised inside name `op`."""
    token = _op.set(op)
    try:
        yield
    finally:
        _op.reset(token)


def require(holds: bool, limit: str, got: object = None) -> None:
    """Raise LimitError with `limit` (a sentence about what must be) unless it `holds`."""
    if not holds:
        shown = "" if got is None else f"; got {_shown(got)}"
        raise LimitError(f"{_op.get()} on {chips.current()}: {limit}{shown}")


def require_dtype(name: str, x: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """`x`'s dtype is one of `allowed` and one that the chip has at all (310P has no bfloat16)."""
    chip = chips.current()
    usable = [d for d in allowed if d is not torch.bfloat16 or torch.bfloat16 in chip.dtypes]
    require(x.dtype in usable, f"{name} must be {' or '.join(_shown(d) for d in usable)}", x.dtype)


def require_same_dtype(first: str, x: Tensor, **others: Tensor | None) -> None:
    """Every one of `others` that is given has the dtype of `x`."""
    for name, other in others.items():
        require(
            other is None or other.dtype == x.dtype,
            f"{name} must have the dtype of {first}, {_shown(x.dtype)}",
            getattr(other, "dtype", None),
        )


def require_rank(name: str, x: Tensor, low: int, high: int | None = None) -> None:
    """`x` has between `low` and `high` dimensions (exactly `low` without `high`)."""
    high = low if high is None else high
    wanted = f"{low}" if low == high else f"{low} to {high}"
    require(low <= x.dim() <= high, f"{name} must have {wanted} dimensions", list(x.shape))


def require_shape(name: str, x: Tensor | None, *shape: int) -> None:
    """`x`, if given, has exactly this shape."""
    require(
        x is None or tuple(x.shape) == shape,
        f"{name} must have shape {list(shape)}",
        None if x is None else list(x.shape),
    )


def require_contiguous(**tensors: Tensor | None) -> None:
    """Each tensor given is contiguous."""
    for name, x in tensors.items():
        require(
            x is None or x.is_contiguous(), f"{name} must be contiguous", None if x is None else f"strides {x.stride()}"
        )


def refuse(**given: object) -> None:
    """Arguments that the documentation says must be left out here (or that this emulator has no semantics for)."""
    for name, value in given.items():
        require(value is None, f"{name} must be None here", value)


def _shown(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return f"a {_shown(value.dtype)} tensor {list(value.shape)}"
    return str(value)
