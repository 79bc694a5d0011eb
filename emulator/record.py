"""What a program calls: every npu and atb op with its arguments; and hiding ops, to run without them.

Works on CPU, meta and fake tensors alike: a step traced on meta tensors costs nothing at any size. On CPU tensors the
kernels check the chip's limits by themselves; `Recorder(check=...)` does it everywhere.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulator import registry
from emulator.limits import LimitError

NAMESPACES = ("npu", "atb", "air")


@dataclass(frozen=True)
class Call:
    """One call: the qualified op (`npu::npu_rms_norm`, with `.overload` if it has one) and the arguments as given."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def bare(self) -> str:
        """The op's name without namespace and overload."""
        return self.op.partition("::")[2].partition(".")[0]

    def bound(self) -> dict[str, Any]:
        """Every argument by name, defaults included."""
        schema = schema_of(self.op)
        values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        values.update(zip((a.name for a in schema.arguments), self.args, strict=False))
        return values | self.kwargs


class Recorder(TorchDispatchMode):
    """Context manager: collects `calls` made inside it, in order; `kernels` counts every op that does work.

    `check` holds each npu and atb call against the emulated chip's limits: True raises at the first that breaks one,
    "collect" writes it to `violations` and goes on, as far as the op's meta kernel lets it.
    """

    def __init__(self, check: bool | Literal["collect"] = False) -> None:
        super().__init__()
        self.check = check
        self.calls: list[Call] = []
        self.kernels: Counter[str] = Counter()
        self.violations: list[str] = []
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.name.partition("::")[0] in NAMESPACES:
            qualified = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
            self.calls.append(Call(qualified, args, dict(kwargs)))
            self._hold_against_limits(qualified, args, kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and schema.name not in _NO_WORK:
            self.kernels[schema.name] += 1
            self.moved_bytes += sum(_bytes(x) for x in tree_leaves((args, kwargs, out)))
        return out

    def _hold_against_limits(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.check:
            return
        try:
            registry.check_call(op, args, kwargs)
        except LimitError as error:
            if self.check != "collect":
                raise
            if str(error) not in self.violations:
                self.violations.append(str(error))

    @property
    def counts(self) -> Counter[str]:
        """How often each npu and atb op was called, by bare name."""
        return Counter(call.bare for call in self.calls)

    @property
    def collectives(self) -> Counter[str]:
        """Those of the kernels that talk to other ranks."""
        return Counter({k: n for k, n in self.kernels.items() if "c10d" in k or "all_reduce" in k})


# Ops that are no kernel on a device, beside views.
_NO_WORK = frozenset(
    f"aten::{name}"
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "_unsafe_view",
        "detach",
        "detach_",
        "lift_fresh",
        "is_pinned",
    )
)


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


def schema_of(op: str) -> Any:
    """The installed schema of a qualified op."""
    base, _, overload = op.partition(".")
    return next(s for s in torch._C._jit_get_schemas_for_operator(base) if s.overload_name == overload)


class _Without:
    """A namespace or module that denies some of its names."""

    def __init__(self, inner: Any, hidden: frozenset[str]) -> None:
        self.__dict__.update(_inner=inner, _hidden=hidden)

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"{name} is hidden (emulator.record.hide)")
        return getattr(self._inner, name)

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._inner) if name not in self._hidden]


@contextlib.contextmanager
def hide(*names: str) -> Iterator[None]:
    """Inside, `hasattr(torch.ops.npu, name)` is False for each of `names` (also in torch.ops.atb and torch_npu).

    For code that looks ops up when it is called or bound inside; a reference taken before stays usable.
    """
    import torch_npu

    hidden = frozenset(names)
    spaces = {space: getattr(torch.ops, space) for space in ("npu", "atb")}
    removed = {name: getattr(torch_npu, name) for name in hidden if hasattr(torch_npu, name)}
    for space, inner in spaces.items():
        setattr(torch.ops, space, _Without(inner, hidden))
    for name in removed:
        delattr(torch_npu, name)
    try:
        yield
    finally:
        for space, inner in spaces.items():
            setattr(torch.ops, space, inner)
        for name, value in removed.items():
            setattr(torch_npu, name, value)
