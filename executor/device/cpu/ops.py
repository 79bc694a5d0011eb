"""The CPU backend: the reference that defines every op, and a full backend in its own right.

How linear weights are kept depends on what the CPU can do (capability.py, linear.py); the plain copy is dropped by the
caller. Attention over the KV cache: attention.py.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from executor.device.cpu import attention, int8
from executor.device.cpu.capability import PACKED_FP16, REORDERED, Capability, capability
from executor.device.cpu.int8_cache import Int8Cache, RowBuffer
from executor.device.cpu.linear import Expanded, PackedFp16, Plain, Reordered, Scratch, Shared, exact_scale
from executor.device.cpu.threads import let_idle_threads_sleep
from executor.device.cpu.tiled_attention import is_worth_tiles, tiled_attention
from executor.device.ops import KVLayer, KVScales, Ops
from executor.device.table import DeviceSettings
from executor.device.weights import Weight, expert_form, experts_of

logger = logging.getLogger(__name__)

_TILE_ELEMENTS = 1 << 17


class CpuOps(Ops):
    """`found`: what the CPU can do; None asks it. `decode_rows`: the most rows of a decode step."""

    name = "cpu"
    device = torch.device("cpu")
    prepares_in_any_order = True

    def __init__(self, found: Capability | None = None, decode_rows: int = 16) -> None:
        self.capability = found or capability()
        self.decode_rows = decode_rows
        self.scratch = Scratch()
        self.copies = attention.Copies()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = torch.rsqrt(squares.div_(x.shape[-1]).add_(eps))
        if x.numel() <= _TILE_ELEMENTS:
            return _scaled(x, scale).mul_(weight)
        # In tiles that stay in the cache: five times as fast as whole fp32 copies of a picture's patches.
        out, rows = torch.empty_like(x), max(1, _TILE_ELEMENTS // x.shape[-1])
        for tile, part, into in zip(x.split(rows), scale.split(rows), out.split(rows), strict=True):
            torch.mul(_scaled(tile, part), weight, out=into)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        first, second, sin = x[..., :half], x[..., half:], sin.unsqueeze(-2)
        out = x * cos.unsqueeze(-2)
        out[..., :half].addcmul_(second, sin[..., :half], value=-1)
        out[..., half:].addcmul_(first, sin[..., half:])
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gated_mlp(self, x: Tensor, gate_up: Callable[..., Tensor], down: Callable[..., Tensor]) -> Tensor:
        """Where both are int8, in tiles of rows: what lies between them stays near the CPU, and is rounded there."""
        if not (len(x) and isinstance(gate_up, int8.Int8Linear) and isinstance(down, int8.Int8Linear)):
            return super().gated_mlp(x, gate_up, down)
        results = gate_up.results(gate_up.rounded(x), x.dtype)
        rows = int8.pass_rows(len(x), down.num_in)
        tiles = (part for some in results for part in some.split(rows))
        return down.multiply(down.collected(map(self.swiglu, tiles), len(x), x.dtype), x.dtype)

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.capability.compute_dtype(dtype)

    def prepare_linear(
        self, weight: Weight, bias: Tensor | None, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        if not isinstance(weight, Tensor):
            return int8.prepare(weight, bias, self.capability.int8, self.decode_rows, many_rows)
        weight, form = weight.detach(), self.capability.form(weight.dtype)
        if weight.is_meta:
            return Plain(weight, bias)
        if form == REORDERED:
            return Reordered(weight, bias)
        if form != PACKED_FP16:
            return Plain(weight, bias)
        scale = None if many_rows else exact_scale(weight)
        return Expanded(weight, bias, self.scratch) if scale is None else PackedFp16(weight, bias, scale)

    def prepare_summed_linear(
        self, weight: Weight, bias: Tensor | None, group: Any, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        multiply = self.prepare_linear(weight, bias, many_rows)
        if isinstance(multiply, int8.Int8Linear):
            return int8.Summed(multiply, group)
        return lambda x: group.all_reduce(multiply(x))

    def prepare_tied_head(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Read where the embedding has it, unless that is far slower than a copy (Capability.copies_tied_head)."""
        if self.copies_tied_head(weight.dtype):
            return self.prepare_linear(weight, None)
        return Shared(weight.detach())

    def copies_tied_head(self, dtype: torch.dtype) -> bool:
        return self.capability.copies_tied_head(dtype)

    def prepare_experts(
        self, gate_up: Weight, down: Weight, first: int = 0, num_experts: int | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        up_fns = [self.prepare_linear(w, None) for w in experts_of(expert_form(gate_up))]
        down_fns = [self.prepare_linear(w, None) for w in experts_of(expert_form(down))]
        num_experts = num_experts or len(up_fns)
        # By its own largest value a row is the same whole numbers for every expert: it is rounded once.
        rounds_once = all(isinstance(fn, int8.Dynamic) for fn in up_fns)

        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            flat = ids.flatten()
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=num_experts).tolist()
            tokens, scale = order // ids.shape[1], weights.flatten()[order]
            start = sum(counts[:first])
            rounded = up_fns[0].rounded(x) if rounds_once and len(x) else None
            for expert, count in enumerate(counts[first : first + len(up_fns)]):
                if not count:
                    continue
                rows = tokens[start : start + count]
                up = up_fns[expert]
                between = up(x[rows]) if rounded is None else up.multiply(rounded.at(rows), x.dtype)
                y = down_fns[expert](self.swiglu(between))
                out.index_add_(0, rows, y * scale[start : start + count, None])
                start += count
            return out

        return run

    def gate_topk(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), ids

    def kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype,
        normed: bool = False, scales: Sequence[KVScales] = (),
    ) -> list[KVLayer]:  # fmt: skip
        shape = (num_blocks, block_size, heads, dim)
        buffers = RowBuffer(), RowBuffer()
        forms = [Int8Cache.of(each, dtype, buffers) for each in scales] or [None] * num_layers
        held = torch.int8 if scales else dtype
        # Never zeroed: only written slots are read, and an idle cache takes no memory.
        return [
            KVLayer(torch.empty(shape, dtype=held), torch.empty(shape, dtype=held), scales=form)
            for _, form in zip(range(num_layers), forms, strict=True)
        ]

    def kv_write(self, k: Tensor, v: Tensor, cache: KVLayer, slots: Tensor) -> None:
        if cache.scales is not None:
            k, v = cache.scales.quantized(k, v)
        cache.k.flatten(0, 1).index_copy_(0, slots, k)
        cache.v.flatten(0, 1).index_copy_(0, slots, v)

    def prepare_attention(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
    ) -> attention.Step:
        return attention.prepare(q_lens, kv_lens, block_tables, block_size)

    def advance_attention(
        self, prepared: attention.Step, kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int,
        entered: Sequence[int],
    ) -> attention.Step:  # fmt: skip
        prepared.advance(block_tables, entered)
        return prepared

    def paged_attention(self, q: Tensor, cache: KVLayer, prepared: attention.Step, scale: float) -> Tensor:
        return attention.attend(q, cache, prepared, scale, self.copies.buffers, self.capability.tiles_attention)

    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        out, start, index = torch.empty_like(q), 0, 0
        while index < len(lengths):
            # Neighbouring segments of one length are a batch: windows and frames mostly are.
            length, count = lengths[index], 1
            while index + count < len(lengths) and lengths[index + count] == length:
                count += 1
            end = start + count * length
            if self.capability.tiles_attention and is_worth_tiles(length, length, q.dtype):
                for first in range(start, end, length):
                    own = slice(first, first + length)
                    heads = (x[own].transpose(0, 1) for x in (k, v))
                    y = tiled_attention(q[own].transpose(0, 1).unsqueeze(1), *heads, scale, causal=False)
                    out[own].copy_(y.squeeze(1).transpose(0, 1))
                start, index = end, index + count
                continue
            batch = (x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(*batch, scale=scale)
            out[start:end].unflatten(0, (count, length)).copy_(y.transpose(1, 2))
            start, index = end, index + count
        return out.flatten(1)

    def synchronize(self) -> None:
        """Every CPU op has ended when its call returns."""


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """`x * scale`, fp32 `scale`, as a new tensor in the type of `x`."""
    return x * scale if x.dtype is torch.float32 else x.float().mul_(scale).to(x.dtype)


def open_cpu(settings: DeviceSettings) -> CpuOps:
    """The CPU, or the part of it that the settings force. Raises UserError where it has not what is forced."""
    found = capability(settings.cpu_isa)
    let_idle_threads_sleep(torch.get_num_threads())
    logger.info("device: cpu, %s", found.describe(getattr(torch, settings.dtype)))
    return CpuOps(found, settings.decode_rows)


def computes_in(settings: DeviceSettings) -> str:
    """The type of activations beside weights of `settings.dtype`. Raises UserError as open_cpu."""
    dtype = getattr(torch, settings.dtype)
    return str(capability(settings.cpu_isa).compute_dtype(dtype)).removeprefix("torch.")


def copies_head(settings: DeviceSettings) -> bool:
    """Whether a tied output head of `settings.dtype` is a copy. Raises UserError as open_cpu."""
    return capability(settings.cpu_isa).copies_tied_head(getattr(torch, settings.dtype))


def rounds_head(settings: DeviceSettings) -> bool:
    """Whether an output head may be made int8. Raises UserError as open_cpu."""
    return capability(settings.cpu_isa).rounds_head
