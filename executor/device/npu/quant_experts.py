"""The products of quantized experts on a chip: int8 and four-bit weights over quantized rows, int8 over float ones.

Which call serves which stands in soc.py; sorting and summing rows are experts.py's. Limits are those of the calls'
pages: aclnnGroupedMatmulV4 and aclnnGroupedMatmulSwigluQuantV2 (A2, A3), aclnnQuantGroupedMatmulDequant (300I DUO).
Legend: n hidden size, E experts of this rank, I intermediate size on this rank, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch_npu
from torch import Tensor, nn

from executor.device.npu import layout
from executor.device.npu.experts import Product, grouped
from executor.device.npu.linear import frozen
from executor.device.npu.soc import GROUPED_SWIGLU, Soc
from executor.device.weights import (
    WORDS,
    DynamicInt4,
    DynamicInt8,
    MixedInt8,
    QuantizedWeight,
    WeightInt8,
    expert_form,
    unpack_int4,
)
from executor.errors import UserError

if TYPE_CHECKING:
    from executor.device.npu.ops import NpuOps

_FUSED_COLUMNS = 10240  # of gate and up together, in the product that is fused with its activation
_GROUP = 256  # inputs of four-bit weights come in multiples of this
_MOST_INPUTS = 18432  # of four-bit weights
_WORD = 8  # outputs of four-bit weights to an int32
_ALIGNED = 16  # 300I DUO
_CONVERT = "quantize the experts as W8A8_DYNAMIC, or use the float checkpoint of the same model"


def check(soc: Soc, form: type, hidden_size: int, intermediate_size: int) -> None:
    """UserError where `soc` has no product of experts of such weights, or none of these sizes."""
    if issubclass(form, Tensor):
        return
    form = DynamicInt8 if form is MixedInt8 else form
    served = (DynamicInt8, DynamicInt4, WeightInt8) if soc.routes_ranges else (DynamicInt8,)
    if form not in served:
        allowed = ", ".join(WORDS[each] for each in served)
        raise UserError(
            f"model_config.soc: {soc.name} has no kernel for {WORDS[form]} experts, allowed {allowed}; {_CONVERT}"
        )
    if form is DynamicInt4:
        fits = intermediate_size % _GROUP == 0 and intermediate_size <= _MOST_INPUTS and hidden_size % _GROUP == 0
        wanted = f"multiples of {_GROUP}, at most {_MOST_INPUTS}"
    else:
        fits = soc.routes_ranges or (hidden_size % _ALIGNED == 0 and intermediate_size % _ALIGNED == 0)
        wanted = f"multiples of {_ALIGNED}"
    if not fits:
        raise UserError(
            f"model_config.soc: {WORDS[form]} experts on {soc.name} want a hidden size and, on each rank, "
            f"an intermediate size that are {wanted}; got {hidden_size} and {intermediate_size}. Deal whole experts to "
            "the ranks (parallel_config.moe_ep_size) rather than slices of them"
        )


def product(gate_up: QuantizedWeight, down: QuantizedWeight, device: NpuOps) -> Product:
    """What `device` multiplies with, as its table chose. Raises UserError, see `check`."""
    gate_up, down = expert_form(gate_up), expert_form(down)
    hidden, inner = _sizes(gate_up)
    check(device.soc, type(gate_up), hidden, inner)
    if isinstance(gate_up, WeightInt8):
        return WeightInt8Product(gate_up, down, device)
    if not device.soc.routes_ranges:
        return DequantProduct(gate_up, down, device)
    is_int4 = isinstance(gate_up, DynamicInt4)
    fits = device.weight_nz and 2 * inner <= _FUSED_COLUMNS
    fused = fits and device.calls["int4_experts" if is_int4 else "int8_experts"] == GROUPED_SWIGLU
    return (Int4Product if is_int4 else Int8Product)(gate_up, down, device, fused)


def _sizes(gate_up: QuantizedWeight) -> tuple[int, int]:
    """`(n, I)`."""
    if isinstance(gate_up, DynamicInt4):
        return gate_up.packed.shape[-1], gate_up.packed.shape[-2]
    values = getattr(gate_up, "values", None)
    return (0, 0) if values is None else (values.shape[-1], values.shape[-2] // 2)


class _Product(nn.Module):
    """What they have in common. Sizes and types are those of the rank and the model."""

    takes_int8 = False

    def __init__(self, num_experts: int, device: NpuOps) -> None:
        super().__init__()
        self.num_experts, self.dtype, self.swiglu = num_experts, device.dtype, device.swiglu

    def _dequantized(
        self, rows: Tensor, w: Tensor, scale: Tensor, scales: Tensor, groups: Tensor, kind: int, **more: list[Tensor]
    ) -> Tensor:
        """Quantized rows by the weights of each group, in the model's type."""
        return grouped(
            rows, w, groups, kind, scale=[scale], per_token_scale=[scales], output_dtype=self.dtype, **more
        )  # fmt: skip

    def _activated(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant(self.swiglu(y))


class Int8Product(_Product):
    """A2 and A3, DynamicInt8. `fused`: the first product, its activation and the next quantization are one kernel.

    Beside bfloat16 the kernel that gives floats takes scales of that type.
    """

    takes_int8 = True

    def __init__(self, gate_up: DynamicInt8, down: DynamicInt8, device: NpuOps, fused: bool) -> None:
        super().__init__(len(gate_up.values), device)
        typed = torch.bfloat16 if self.dtype is torch.bfloat16 else torch.float32
        self.gate_up, self.down = (frozen(layout.weight(w.values, device.weight_nz)) for w in (gate_up, down))
        self.gate_up_scale = frozen(gate_up.scale if fused else gate_up.scale.to(typed))
        self.down_scale = frozen(down.scale.to(typed))
        self.fused = fused

    def forward(self, rows: Tensor, scales: Tensor, groups: Tensor, kind: int) -> Tensor:
        if self.fused:
            rows, scales = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
                rows, [self.gate_up], [self.gate_up_scale], scales, groups, group_list_type=kind
            )
        else:
            y = self._dequantized(rows, self.gate_up, self.gate_up_scale, scales, groups, kind)
            rows, scales = self._activated(y)
        return self._dequantized(rows, self.down, self.down_scale, scales, groups, kind)


class Int4Product(_Product):
    """A2 and A3, DynamicInt4. The kernels multiply the two halves of each int8 activation by four-bit weights and need
    `8 * sum(weights) * scale` of each output for that. Eight outputs are an int32; scales are float32 bits in an int64.
    """

    takes_int8 = True

    def __init__(self, gate_up: DynamicInt4, down: DynamicInt4, device: NpuOps, fused: bool) -> None:
        super().__init__(len(gate_up.packed), device)
        self.gate_up, self.down = (frozen(_words(w.packed, device.weight_nz)) for w in (gate_up, down))
        self.gate_up_sums, self.down_sums = (frozen(_eightfold_sums(w)) for w in (gate_up, down))
        # The one kernel takes a scale by output, the other by group of inputs and output: one group.
        self.gate_up_scale = frozen(_bits(gate_up.scale if fused else gate_up.scale.unsqueeze(1)))
        self.down_scale = frozen(_bits(down.scale.unsqueeze(1)))
        self.fused = fused

    def forward(self, rows: Tensor, scales: Tensor, groups: Tensor, kind: int) -> Tensor:
        if self.fused:
            rows, scales = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
                rows,
                [self.gate_up],
                [self.gate_up_scale],
                scales,
                groups,
                weight_assist_matrix=[self.gate_up_sums],
                group_list_type=kind,
            )
        else:
            sums = [self.gate_up_sums]
            y = self._dequantized(rows, self.gate_up, self.gate_up_scale, scales, groups, kind, bias=sums)
            rows, scales = self._activated(y)
        return self._dequantized(rows, self.down, self.down_scale, scales, groups, kind, bias=[self.down_sums])


class WeightInt8Product(_Product):
    """A2 and A3, WeightInt8 by row: activations stay float. Plain: no page has these weights in NZ."""

    def __init__(self, gate_up: WeightInt8, down: WeightInt8, device: NpuOps) -> None:
        super().__init__(len(gate_up.values), device)
        if gate_up.scale.shape[-1] > 1 or down.scale.shape[-1] > 1:
            raise UserError(f"int8 weights of experts with scales by groups of inputs have no kernel; {_CONVERT}")
        self.gate_up, self.down = (frozen(layout.weight(w.values, nz=False)) for w in (gate_up, down))
        self.gate_up_scale, self.down_scale = (frozen(w.scale.squeeze(-1).to(self.dtype)) for w in (gate_up, down))
        # The kernel adds its offset, and its page knows none that is left out.
        offsets = (torch.zeros_like(w.scale) if w.offset is None else -w.offset for w in (gate_up, down))
        self.gate_up_offset, self.down_offset = (frozen(x.squeeze(-1).to(self.dtype)) for x in offsets)

    def forward(self, rows: Tensor, scales: None, groups: Tensor, kind: int) -> Tensor:
        scale, offset = [self.gate_up_scale], [self.gate_up_offset]
        y = grouped(rows, self.gate_up, groups, kind, antiquant_scale=scale, antiquant_offset=offset)
        scale, offset = [self.down_scale], [self.down_offset]
        return grouped(self.swiglu(y), self.down, groups, kind, antiquant_scale=scale, antiquant_offset=offset)


class DequantProduct(_Product):
    """300I DUO, DynamicInt8: the product quantizes its rows by itself. Weights `[E, out, in]`; groups by totals."""

    def __init__(self, gate_up: DynamicInt8, down: DynamicInt8, device: NpuOps) -> None:
        super().__init__(len(gate_up.values), device)
        self.gate_up, self.down = (
            frozen(layout.weight(w.values.transpose(-1, -2), device.weight_nz)) for w in (gate_up, down)
        )
        self.gate_up_scale, self.down_scale = frozen(gate_up.scale), frozen(down.scale)

    def forward(self, rows: Tensor, scales: None, groups: Tensor, kind: int) -> Tensor:
        multiply = torch_npu.npu_quant_grouped_matmul_dequant
        y = multiply(rows, self.gate_up, self.gate_up_scale, groups, quant_mode="pertoken")
        return multiply(self.swiglu(y), self.down, self.down_scale, groups, quant_mode="pertoken")


def _words(packed: Tensor, nz: bool) -> Tensor:
    """`[E, out / 2, in]` of two outputs to a byte -> int32 `[E, in, out / 8]`, as npu_convert_weight_to_int4pack packs.

    In NZ a strip is 32 bytes whatever they hold: cast as bytes, then read as words.
    """
    assert packed.shape[1] % (_WORD // 2) == 0, f"{2 * packed.shape[1]} outputs are no whole words"
    return layout.weight(packed, nz).view(torch.int32)


def _eightfold_sums(weight: DynamicInt4) -> Tensor:
    """float32 `[E, out]`; one expert at a time, as its unpacked weights take twice the memory."""
    sums = [unpack_int4(packed).sum(-1, dtype=torch.int32) for packed in weight.packed]
    return 8 * torch.stack(sums).float() * weight.scale


def _bits(scale: Tensor) -> Tensor:
    """The bits of a float32 in an int64."""
    return scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
