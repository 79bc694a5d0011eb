"""What a program calls: every npu and atb op with its arguments; and hiding ops, to run without them.

Works on CPU, meta and fake tensors alike. `Recorder(check=True)` also holds each call against the limits of the
emulated chip, which on CPU tensors the kernels do by themselves.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executor.emulator import registry

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
    """Context manager: collects `calls` made inside it, in order. All other ops are counted in `others`."""

    def __init__(self, check: bool = False) -> None:
        super().__init__()
        self.check = check
        self.calls: list[Call] = []
        self.others: Counter[str] = Counter()
        self.violations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.partition("::")[0] in NAMESPACES:
            qualified = name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
            self.calls.append(Call(qualified, args, dict(kwargs)))
            if self.check:
                registry.check_call(qualified, args, kwargs)
        else:
            self.others[name] += 1
        return func(*args, **kwargs)

    @property
    def counts(self) -> Counter[str]:
        """How often each npu and atb op was called, by bare name."""
        return Counter(call.bare for call in self.calls)


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
            raise AttributeError(f"{name} is hidden (executor.emulator.record.hide)")
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
