"""The table of emulated ops, and their registration with torch for CPU (and, where torch_npu has none, meta) tensors.

A kernel is a pair: `check` sees the documented limits, `run` has the documented semantics. Both take the op's
own arguments. After `register` the unchanged call `torch_npu.<op>(...)` on CPU tensors runs check, then run.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from emulator import chips
from emulator.limits import naming, require


@dataclass(frozen=True)
class Kernel:
    """One emulated op; `name` is qualified and has its overload, as in `npu::npu_format_cast_.acl_format`."""

    name: str
    run: Callable[..., Any]
    check: Callable[..., None] | None
    meta: Callable[..., Any] | None


KERNELS: dict[str, Kernel] = {}
_NO_TENSORS = ("npu::empty_with_format",)
_libraries: list[torch.library.Library] = []
_open: list[str] = []  # kernels that run now, one inside the other


def kernel(
    name: str,
    check: Callable[..., None] | None = None,
    meta: Callable[..., Any] | None = None,
    namespace: str = "npu",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enter a function as the CPU semantics of op `name`. `meta` is used where torch_npu has none."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"{namespace}::{name}"
        assert qualified not in KERNELS, f"two kernels for {qualified}"
        KERNELS[qualified] = Kernel(qualified, run, check, meta)
        return run

    return enter


def load_kernels() -> dict[str, Kernel]:
    """Import every module under `kernels/`; each enters its ops in KERNELS."""
    package = importlib.import_module("emulator.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return KERNELS


def register() -> None:
    """Register all kernels with torch; once per process, after torch_npu has defined the ops."""
    if _libraries:
        return
    load_kernels()
    libraries = {namespace: torch.library.Library(namespace, "IMPL") for namespace in ("npu", "atb", "air")}
    _libraries.extend(libraries.values())
    for entry in KERNELS.values():
        namespace, _, name = entry.name.partition("::")
        if not _defined(entry.name):
            continue  # an older torch_npu: its users see the op as absent, as they should
        # An op without tensor arguments is dispatched by BackendSelect; torchair's own forms (air) refuse on CPU.
        key = "BackendSelect" if entry.name in _NO_TENSORS else "CPU"
        libraries[namespace].impl(name, _guarded(entry), key, allow_override=namespace == "air")
        if entry.meta is not None and not any(_has(entry.name, key) for key in ("Meta", "CompositeImplicitAutograd")):
            libraries[namespace].impl(name, entry.meta, "Meta")


def check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check one call against the current chip's limits without computing it (so also on meta tensors)."""
    entry = KERNELS.get(name)
    bare = name.partition("::")[2].partition(".")[0]
    with naming(bare):
        _check_chip(bare)
        if entry is not None and entry.check is not None:
            entry.check(*args, **kwargs)


def _guarded(entry: Kernel) -> Callable[..., Any]:
    bare = entry.name.partition("::")[2].partition(".")[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        with naming(bare):
            _check_chip(bare)
            _open.append(entry.name)
            try:
                if entry.check is not None:
                    entry.check(*args, **kwargs)
                return entry.run(*args, **kwargs)
            finally:
                _open.pop()

    return run


def is_computing() -> bool:
    """Whether a kernel runs now: what it does with tensors is the chip's doing, not the host's."""
    return bool(_open)


def _check_chip(bare: str) -> None:
    found = chips.support(bare, chips.current())
    require(found.allowed, f"the op is not available on this chip ({found.verdict}: {found.source})")


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _defined(name: str) -> bool:
    base, _, overload = name.partition(".")
    return any(schema.overload_name == overload for schema in torch._C._jit_get_schemas_for_operator(base))
