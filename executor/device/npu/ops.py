"""The op surface on NPUs: eager calls into torch_npu, the same on a chip and on CPU tensors under the emulator.

Which call serves an op on a chip stands in soc.py; where weights and caches lie stands in layout.py.
Legend: T tokens, H query heads, K kv heads, D head dim, E experts, I intermediate, k experts per token.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from executor.device.npu import (
    attention,
    compressed,
    experts,
    forms,
    graph,
    int8_cache,
    layout,
    linear,
    quant,
    quant_experts,
)  # fmt: skip
from executor.device.npu.profiler import NpuProfiler
from executor.device.npu.soc import COMPOSED, SOCS, Soc, chip_named, choose, soc_of
from executor.device.ops import HeadNorms, Heads, KVLayer, KVScales, Ops
from executor.device.table import BACKENDS, DeviceSettings
from executor.device.weights import CompressedInt8, Weight
from executor.errors import UserError
from executor.host.env import environment

_HEAD_DIMS = (64, 128)  # what rotary and packed attention take
_FUSED_DIM = 128  # of heads whose norm, rotation and write are one kernel
_FUSED_RANKS = (2, 4, 8)  # between which a product and its sum are one kernel


class NpuOps(Ops):
    """One chip. `weight_nz`: linear weights in FRACTAL_NZ also where the chip takes both.

    `cache`: "ND" or "NZ" for every cache; None: what suits the chip and the model. `decode_rows`: the most rows of a
    decode step, padded ones included. `dtype`: of the activations, which quantized weights do not tell; None: the
    chip's first.
    """

    name = "npu"
    overlaps_steps = BACKENDS["npu"].overlaps_steps
    takes_cache_offsets = False

    def __init__(
        self,
        soc: Soc,
        device: torch.device,
        *,
        weight_nz: bool = True,
        cache: str | None = None,
        decode_rows: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.soc = soc
        self.dtype = dtype or soc.dtypes[0]
        self.device = device
        self.weight_nz = weight_nz or soc.always_nz
        self.slot_dtype = soc.slot_dtype
        if device.type == "npu":
            self.collectives = "hccl"
        self.calls = choose(soc, _installed)
        self.cache = cache
        self.decode_rows = decode_rows
        self._domain: Any = None  # the one group that fused sums pass through
        if self.calls["attention"] == "_npu_paged_attention":
            self.attention = attention.AtbAttention(device, self.calls["chunk_attention"])
        else:
            self.attention = attention.FusedAttention(device)

    def send(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        if self.device.type == "cpu":
            return super().send(array, into)
        # From other memory the copy would be waited for. torch reuses pinned memory when copies from it have ended.
        pinned = torch.from_numpy(array).pin_memory()
        if into is None:
            return pinned.to(self.device, non_blocking=True)
        return into.copy_(pinned, non_blocking=True)

    def read_back(self, x: Tensor) -> Callable[[], Tensor]:
        if self.device.type == "cpu":
            return super().read_back(x)
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        copy.copy_(x, non_blocking=True)
        copied = torch_npu.npu.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return copy

        return wait

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return forms.RMS_NORM[self.calls["rms_norm"]](x, weight, eps)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        bias: Tensor | None = None,
        reader: Callable[..., Tensor] | None = None,
    ) -> tuple[Any, Tensor]:
        if residual is None or not len(x):  # the fused ops take no empty x
            return super().add_rms_norm(x, residual, weight, eps, bias)
        product = quant.reader_of(reader, len(x))
        if isinstance(product, quant.StaticInput) and self._has("add_rms_norm_static"):
            return quant.add_rms_norm_static(x, residual, weight, eps, bias, product)
        if isinstance(product, quant.DynamicLinear) and self._has("add_rms_norm_dynamic"):
            return quant.add_rms_norm_dynamic(x, residual, weight, eps, bias)
        if not self._has("add_rms_norm"):
            return super().add_rms_norm(x, residual, weight, eps, bias)
        y, total = forms.add_rms_norm(x, residual, weight, eps)
        return (y if bias is None else y + bias), total

    def _has(self, op: str) -> bool:
        """Whether a kernel serves the op here."""
        return self.calls.get(op, COMPOSED) != COMPOSED

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return forms.rotated(x, cos, sin)

    def rope_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        op = "rope_in_graph" if torch.compiler.is_compiling() else "rope"
        return forms.ROPE[self.calls[op]](q, k, cos, sin)

    def vision_head_dim(self, head_dim: int) -> int:
        """Rotary and packed attention have kernels for 64 and 128."""
        fitting = [size for size in _HEAD_DIMS if size >= head_dim]
        assert fitting, f"vision heads of {head_dim} are wider than {_HEAD_DIMS[-1]}"
        return fitting[0]

    def swiglu(self, gate_up: Tensor) -> Tensor:
        # 300I DUO: the fused op wants whole vectors; 3B's and 7B's vision MLP (2 * 3420) has none.
        fits = gate_up.shape[-1] % self.soc.swiglu_columns == 0
        return forms.SWIGLU[self.calls["swiglu"] if fits else COMPOSED](gate_up)

    def gated_mlp(self, x: Any, gate_up: Callable[..., Tensor], down: Callable[..., Tensor]) -> Tensor:
        num_rows = quant.num_rows_of(x)
        reader = quant.reader_of(down, num_rows)
        if reader is None or not num_rows or not self._has("swiglu_quantized"):
            return super().gated_mlp(x, gate_up, down)
        return down(quant.swiglu_quantized(x, gate_up, reader))

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def prepare_linear(
        self, weight: Weight, bias: Tensor | None, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if isinstance(weight, CompressedInt8):
            return compressed.prepare(weight, self.soc, self.dtype)
        if not isinstance(weight, Tensor):
            return self._products.linear(weight, bias)
        return linear.Linear(layout.weight(weight.detach(), self.weight_nz), bias)

    @property
    def _products(self) -> quant.Int8Products:
        return quant.Int8Products(
            chip=self.soc.name,
            dtype=self.dtype,
            nz=self.weight_nz,
            by_rows=self.soc.int8_by_rows,
            dequantizes=self.calls["dynamic_linear"] == "npu_quant_matmul_dequant",
            grouped=self.soc.weight_groups,
            decode_rows=self.decode_rows,
        )

    def prepare_summed_linear(
        self, weight: Weight, bias: Tensor | None, group: Any, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Quantized products are summed apart: the fused kernel is for prefill and rounds a bf16 model's scales."""
        if not isinstance(weight, Tensor) or not self._sums_fused(group):
            return linear.SummedLinear(self.prepare_linear(weight, bias), group)
        rows = self.decode_rows if self.calls["summed_linear_in_decode"] == COMPOSED else 0
        return linear.FusedSummedLinear(layout.weight(weight.detach(), self.weight_nz), bias, group, rows)

    def _sums_fused(self, group: Any) -> bool:
        """Whether products summed over `group` may be one kernel: the first such group's, and no other's."""
        if self.calls.get("summed_linear", COMPOSED) == COMPOSED or group.size not in _FUSED_RANKS:
            return False
        self._domain = self._domain or group.handle
        return group.handle is self._domain

    def prepare_experts(
        self, gate_up: Weight, down: Weight, first: int = 0, num_experts: int | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if isinstance(gate_up, Tensor):
            weights = (layout.weight(w.detach(), self.weight_nz) for w in (gate_up, down))
            product = experts.FloatProduct(*weights, self.swiglu)
        else:
            product = quant_experts.product(gate_up, down, self)
        kind = experts.Experts if self.soc.routes_ranges else experts.LocalExperts
        return kind(product, first, num_experts or product.num_experts)

    def check_experts(self, form: type, hidden_size: int, intermediate_size: int) -> None:
        quant_experts.check(self.soc, form, hidden_size, intermediate_size)

    def gate_topk(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """The softmax is the op's own, in fp32 inside; ids int32."""
        gate = forms.GATE[self.calls["gate_topk"]]
        if self.soc.gate_rows is None or len(logits) <= self.soc.gate_rows:
            weights, ids = gate(logits, k)
        else:
            parts = [gate(part, k) for part in logits.split(self.soc.gate_rows)]
            weights, ids = (torch.cat(each) for each in zip(*parts, strict=True))
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, ids

    def kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype,
        normed: bool = False, scales: Sequence[KVScales] = (),
    ) -> list[KVLayer]:  # fmt: skip
        if scales:
            sizes = num_layers, num_blocks, block_size, heads, dim
            layers = self.attention.caches(*sizes, dtype=torch.int8, form="ND")
            forms = (int8_cache.Int8Scales.of(each, dtype, self.device) for each in scales)
            return [replace(layer, scales=form) for layer, form in zip(layers, forms, strict=True)]
        fused = normed and dim == _FUSED_DIM and self.calls.get("qkv_norm_rope_write", COMPOSED) != COMPOSED
        form = self.cache or ("NZ" if fused else self.soc.cache)
        return self.attention.caches(num_layers, num_blocks, block_size, heads, dim, dtype=dtype, form=form)

    def most_blocks(self, block_size: int, heads: int, dim: int) -> int | None:
        """A cache's elements are counted in int32 by A2's and A3's attention."""
        return None if self.soc.cache_elements is None else self.soc.cache_elements // (block_size * heads * dim)

    def kv_write(self, k: Tensor, v: Tensor, cache: KVLayer, slots: Tensor) -> None:
        self.attention.write(k, v, cache, slots)

    def qkv_norm_rope_write(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms | None, cos: Tensor, sin: Tensor, cache: KVLayer,
        slots: Tensor,
    ) -> Tensor:  # fmt: skip
        composed = self.calls.get("qkv_norm_rope_write", COMPOSED) == COMPOSED
        if composed or norms is None or heads.dim != _FUSED_DIM or not layout.in_strips(cache):
            return super().qkv_norm_rope_write(qkv, heads, norms, cos, sin, cache, slots)
        return self.attention.norm_rope_write(qkv, heads, norms, cos, sin, cache, slots)

    @property
    def computes_behind(self) -> bool:
        return self.device.type != "cpu"

    def prepare_attention(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
    ) -> attention.Step:
        step = attention.prepare(q_lens, kv_lens, block_tables, block_size, self.send)
        return self.attention.complete(step, q_lens, kv_lens)

    def advance_attention(
        self, prepared: attention.Step, kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int,
        entered: Sequence[int],
    ) -> attention.Step:  # fmt: skip
        return self.attention.advanced(attention.advanced(prepared, kv_lens, block_tables, entered, self.send))

    def static_attention(
        self, q_len: int, kv_lens: Tensor | Sequence[int], block_table: Tensor, block_size: int
    ) -> attention.Step:
        return attention.static(q_len, kv_lens, block_table, block_size)

    def capture(self, decode: Callable[..., Tensor], mode: str, folder: Path) -> Callable[..., Tensor]:
        return graph.ge_graph(decode, folder) if mode == "ge_graph" else graph.acl_graph(decode, folder)

    def paged_attention(self, q: Tensor, cache: KVLayer, prepared: attention.Step, scale: float) -> Tensor:
        return self.attention.paged(q, cache, prepared, scale)

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        return self.attention.varlen(q, k, v, lengths, scale)

    def versions(self) -> dict[str, str]:
        chip = {} if self.device.type == "cpu" else {"cann": _cann_version()}
        return super().versions() | chip | {"torch_npu": torch_npu.__version__, "torchair": graph.version()}

    def group_options(self, buffer_mb: int) -> Any:
        if self.device.type != "npu" or "HCCL_BUFFSIZE" in environment():  # the user's own size holds
            return None
        options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": buffer_mb}
        return options

    def free_bytes(self) -> int | None:
        return None if self.device.type == "cpu" else torch_npu.npu.mem_get_info()[0]

    def restart_peak(self) -> None:
        if self.device.type != "cpu":
            torch_npu.npu.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        return None if self.device.type == "cpu" else torch_npu.npu.max_memory_reserved()

    def profiler(self, folder: Path, name: str) -> Any:
        return NpuProfiler(folder, name, on_chip=self.device.type != "cpu")

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch_npu.npu.synchronize()


def _installed(call: str) -> bool:
    """Whether the installed torch_npu has this op: ATB's have an underscore before their name."""
    return hasattr(torch.ops.atb if call.startswith("_npu") else torch.ops.npu, call)


def open_chip(settings: DeviceSettings) -> NpuOps:
    """The chip of a recipe. Raises UserError, see open_npu."""
    return open_npu(
        settings.soc,
        getattr(torch, settings.dtype),
        emulated=settings.emulated,
        weight_nz=settings.weight_nz,
        decode_rows=settings.decode_rows,
        index=settings.index,
    )


def _cann_version() -> str:
    """CANN's own word, where this torch_npu can ask for it, and the folder it was installed to, which names it too."""
    home = environment().get("ASCEND_HOME_PATH", "")
    ask = getattr(torch_npu.npu.utils, "get_cann_version", None)  # not in every release
    return f"{ask('CANN') if ask else 'unknown'} {Path(home).resolve() if home else 'no ASCEND_HOME_PATH'}"


def open_npu(
    name: str | None, dtype: torch.dtype, *, emulated: bool, weight_nz: bool, decode_rows: int, index: int = 0
) -> NpuOps:
    """The backend of the chip `name`, over CPU tensors where it is emulated; None: the chip that is there.

    `index`: which of the chips that this process sees. `decode_rows`: see NpuOps.

    Raises UserError where the machine has another chip, or the chip does not compute in `dtype`.
    """
    soc = soc_of(name) if emulated else _chip_here(name, index)
    if dtype not in soc.dtypes:
        allowed = ", ".join(str(each).removeprefix("torch.") for each in soc.dtypes)
        raise UserError(
            f"model_config.dtype: {soc.name} computes in {allowed}, got {str(dtype).removeprefix('torch.')}"
        )
    if emulated:
        return NpuOps(soc, torch.device("cpu"), weight_nz=weight_nz, decode_rows=decode_rows, dtype=dtype)
    logging.getLogger("torch_npu").setLevel(logging.WARNING)  # it reports every variable that it reads
    torch_npu.npu.set_device(index)
    torch_npu.npu.config.allow_internal_format = True  # else format casts are ignored
    return NpuOps(soc, torch.device("npu", index), weight_nz=weight_nz, decode_rows=decode_rows, dtype=dtype)


def _chip_here(name: str | None, index: int) -> Soc:
    found_name = torch_npu.npu.get_device_name(index)
    found = chip_named(found_name)
    if found is None:
        raise UserError(
            f"model_config.device: this release does not know the chip {found_name}; known: {', '.join(SOCS)}"
        )
    if name not in (None, found.name):
        raise UserError(
            f"model_config.soc: the recipe says {name}, this machine has {found_name}, which is {found.name}"
        )
    return found
