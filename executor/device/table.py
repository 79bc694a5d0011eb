"""Which backends there are, what each runs in this release, and how each is opened.

Importing it imports no backend and no torch: a recipe is settled with it before either is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from executor.errors import UserError

if TYPE_CHECKING:
    from executor.device.ops import Ops


@dataclass(frozen=True)
class DeviceSettings:
    """What a recipe says about its device, for whoever opens it."""

    dtype: str  # of the weights
    soc: str | None = None
    emulated: bool = False
    weight_nz: bool = True
    cpu_isa: str = "auto"
    index: int = 0  # which of the chips that this process sees
    decode_rows: int = 16  # the most rows of a decode step


@dataclass(frozen=True)
class Backend:
    """`opener`: "module:function" of DeviceSettings, imported when a device is opened. `package`: what it needs."""

    name: str
    dtypes: tuple[str, ...]
    exe_modes: tuple[str, ...]  # of those a recipe can name, the ones this backend has
    quantization: tuple[str, ...]
    opener: str
    compute_dtype: str | None = None  # "module:function" of DeviceSettings, where it is not the weights' own type
    copies_head: str | None = None  # the same, where a tied output head is not always a copy of the embedding
    rounds_head: str | None = None  # the same, where not every output head is worth int8 weights
    most_int8_outputs: int | None = None  # of one product by int8 weights; None: any number
    package: str | None = None
    is_npu: bool = False
    is_emulated: bool = False
    overlaps_steps: bool = False  # a decode step is queued before the host has read the tokens of the one before

    @property
    def is_installed(self) -> bool:
        """Whether its package is there; it is not imported."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def open(self, settings: DeviceSettings) -> Ops:
        """The backend. Raises UserError where this machine has not what it needs."""
        try:
            opener = _function(self.opener)
        except ImportError as error:
            if self.package is None:
                raise
            raise UserError(
                f"model_config.device: {self.name} needs {self.package} beside torch, and it does not import here: "
                f"{error}; python -m executor.commands.doctor says what is missing"
            ) from error
        return opener(settings)

    def computes_in(self, settings: DeviceSettings) -> str:
        """The type of activations and KV cache. Raises UserError where this machine has not what the settings force."""
        return _function(self.compute_dtype)(settings) if self.compute_dtype else settings.dtype

    def copies_tied_head(self, settings: DeviceSettings) -> bool:
        """Whether an output head that is the embedding is made a copy of it. Raises UserError as computes_in."""
        return _function(self.copies_head)(settings) if self.copies_head else True

    def takes_int8_head(self, settings: DeviceSettings, vocab_size: int) -> bool:
        """Whether an output head made int8 is one product here, and faster than 16 bits. Raises UserError as
        computes_in.

        By the whole vocabulary, however many ranks share it, so that the model is the same on any number of them.
        """
        if self.most_int8_outputs is not None and vocab_size > self.most_int8_outputs:
            return False
        return _function(self.rounds_head)(settings) if self.rounds_head else True


def _function(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


MOST_INT8_OUTPUTS = 65535
"""Of one product by int8 weights on a chip, by the pages of npu_quant_matmul and npu_weight_quant_batchmatmul."""
_NPU = {
    "exe_modes": ("eager", "ge_graph", "npugraph_ex"),
    "quantization": ("none", "w8a8", "w8a8s", "w8a8sc", "w8a8_dynamic", "w8a8_mix", "w8a16", "wint8", "w4a8_dynamic"),
    "opener": "executor.device.npu.ops:open_chip",
    "overlaps_steps": True,
    "package": "torch_npu",
    "is_npu": True,
    "most_int8_outputs": MOST_INT8_OUTPUTS,
}
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            dtypes=("float32", "bfloat16", "float16"),
            exe_modes=("eager",),
            quantization=("none", "w8a8", "w8a8s", "w8a8_dynamic", "w8a8_mix", "w8a16", "w4a8_dynamic", "wint8"),
            opener="executor.device.cpu.ops:open_cpu",
            compute_dtype="executor.device.cpu.ops:computes_in",
            copies_head="executor.device.cpu.ops:copies_head",
            rounds_head="executor.device.cpu.ops:rounds_head",
        ),
        # Which of them a chip has stands in executor/device/npu/soc.py.
        Backend("npu", ("bfloat16", "float16"), **_NPU),
        Backend("npu_emulated", ("bfloat16", "float16"), **_NPU, is_emulated=True),
    )
}
"""The first is what `auto` is on a machine without a chip."""


INT8_READ_TOKENS = 8192
"""Cached tokens of an int8 cache that an NPU turns into floats at a time, for prompts; more where one prompt has more.
"""

CHIP_BYTES = {"atlas_800i_a2": 64 << 30, "atlas_800i_a3": 64 << 30, "atlas_300i_duo": 43 * 10**9}
"""Memory of one die (A2, A3) or chip (300I DUO) as sold; what a card really has is asked when it is opened."""


def having(what: str, value: str) -> tuple[str, ...]:
    """Names of the backends that have `value` among their `what`: dtypes, exe_modes or quantization."""
    return tuple(backend.name for backend in BACKENDS.values() if value in getattr(backend, what))


def named(*, npu: bool) -> tuple[str, ...]:
    """Names of the backends that are NPUs, or that are not."""
    return tuple(backend.name for backend in BACKENDS.values() if backend.is_npu is npu)
