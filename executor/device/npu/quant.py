"""Products by int8 weights on a chip, as modules: a graph takes their tensors for what they are, constants in it.

The arithmetic is that of executor/device/weights.py. What the kernels add to it, by their pages:
fp16 products without a scale for every row take the scales as int64, of which they keep the upper 19 bits
(npu_trans_quant_param); scales and offsets of weight-only products have the type of the activations.
Legend: T rows, n inputs, m outputs, g groups of inputs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor, nn

from executor.device.npu import layout
from executor.device.npu.linear import SummedLinear, frozen
from executor.device.table import MOST_INT8_OUTPUTS
from executor.device.weights import (
    WORDS,
    DynamicInt8,
    MixedInt8,
    QuantizedWeight,
    StaticInt8,
    WeightInt8,
)
from executor.errors import UserError

MOST_COLUMNS = MOST_INT8_OUTPUTS  # of one product
_TILE = 16  # divides both dims of a weight that the 300I DUO quantizes activations for
_GROUP = 32  # divides the inputs that share a scale
_STATIC, _DYNAMIC = 0, 1  # quant_mode of npu_dequant_swiglu_quant


class QuantizedRows(NamedTuple):
    """Activations in the form that an int8 product takes: quantized already, by the kernel before it."""

    values: Tensor  # int8 [T, n]
    scale: Tensor | None = None  # float32 [T]; None: quantized by the scale of the linear that reads them


@dataclass(frozen=True)
class Int8Products:
    """How one chip multiplies by int8 weights, in a model that computes in `dtype`.

    `nz`: weights in FRACTAL_NZ. `by_rows`: a weight in NZ is cast as [out, in] and read transposed (300I DUO).
    `dequantizes`: the product with a scale for every row quantizes its activations by itself (300I DUO), else it takes
    them as int8. `grouped`: weight-only products take scales of groups of inputs. `decode_rows`: see NpuOps.
    """

    chip: str
    dtype: torch.dtype
    nz: bool
    by_rows: bool
    dequantizes: bool
    grouped: bool
    decode_rows: int

    def linear(self, weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """The weight as a function of `x [T, n]` or QuantizedRows. Raises UserError where the chip has no product."""
        num_out = _num_out(weight)
        if num_out > MOST_COLUMNS:
            pieces = [slice(start, start + MOST_COLUMNS) for start in range(0, num_out, MOST_COLUMNS)]
            parts = [
                self.linear(_rows_of(weight, rows), None if bias is None else bias[rows].clone()) for rows in pieces
            ]
            return Pieces(parts)
        if isinstance(weight, StaticInt8):
            return StaticLinear(self, weight, self._values(weight.values))
        if isinstance(weight, DynamicInt8):
            return self._dynamic(weight, bias)
        if isinstance(weight, MixedInt8):
            dynamic = self._dynamic(weight.dynamic, bias)
            if self.dequantizes and _is_padded(weight.dynamic.values):
                return MixedLinear(StaticLinear(self, weight.static, self._values(weight.static.values)), dynamic, self)
            return MixedLinear(StaticLinear(self, weight.static, dynamic.weight), dynamic, self)
        if isinstance(weight, WeightInt8):
            self._check_groups(weight)
            return WeightLinear(self, weight, bias)
        raise UserError(
            f"model_config.quantization: {self.chip} has no product by {WORDS[type(weight)]} weights of a linear; "
            "quantize all linears outside of experts as W8A8_DYNAMIC, or run the model on the CPU"
        )

    def _dynamic(self, weight: DynamicInt8, bias: Tensor | None) -> "DynamicLinear | DequantizingLinear":
        if self.dequantizes:
            return DequantizingLinear(self, weight, bias)
        return DynamicLinear(self, weight, bias, self._values(weight.values))

    def _values(self, stored: Tensor) -> nn.Parameter:
        """`[out, in]` as the product reads it: `[in, out]`, or as it is where the chip transposes NZ itself."""
        return frozen(self.kept_by_rows(stored) if self.by_rows else layout.weight(stored, self.nz))

    def kept_by_rows(self, stored: Tensor) -> Tensor:
        """`[out, in]` in NZ, its shape unchanged."""
        return layout.weight(stored.transpose(-1, -2), self.nz)

    def _check_groups(self, weight: WeightInt8) -> None:
        groups, num_in = weight.scale.shape[1], weight.values.shape[1]
        if groups == 1:
            return
        if not self.grouped:
            raise UserError(
                f"model_config.quantization: {self.chip} multiplies by int8 weights with one scale for every output; "
                f"these have one for every {num_in // groups} inputs. Quantize the model by channel, or run it on "
                "Atlas 800I A2 or A3, or on the CPU"
            )
        if num_in % groups or num_in // groups % _GROUP:
            raise UserError(
                f"model_config.quantization: {self.chip} takes scales of groups whose size is a multiple of {_GROUP}; "
                f"got {groups} groups of {num_in} inputs. Quantize the model by channel, or in other groups"
            )


class Int8Linear(nn.Module):
    """What the products have in common: rows that are quantized already are multiplied, others quantized first."""

    def __init__(self, num_out: int) -> None:
        super().__init__()
        self.num_out = num_out

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if isinstance(x, QuantizedRows):
            return self.multiply(x)
        if not len(x):  # the kernels take no empty tensor
            return x.new_empty(0, self.num_out)
        return self.multiply(self.quantize(x))

    def quantize(self, x: Tensor) -> QuantizedRows:
        """`x [T, n]`, T > 0, as `multiply` takes it."""
        raise NotImplementedError

    def multiply(self, rows: QuantizedRows) -> Tensor:
        """-> `[T, m]` in the model's type."""
        raise NotImplementedError


class StaticInput(Int8Linear):
    """Activations `[T, n]` by one scale and offset."""

    def __init__(self, num_in: int, num_out: int, input_scale: Tensor, input_offset: Tensor, dtype: torch.dtype):
        super().__init__(num_out)
        self.dtype = dtype
        self.input_scale = frozen(input_scale)
        self.input_offset = frozen(input_offset)
        self.zero_point = frozen(input_offset.to(torch.int32))
        self.norm_scale, self.norm_zero_point = map(frozen, self._for_norms(num_in))

    def _for_norms(self, n: int) -> tuple[Tensor, Tensor]:
        """Scale and offset `[n]` as the norm that quantizes takes them.

        In bf16 its page names bf16 for both; where that would change the scale, float32 and int32, which the kernel
        has too.
        """
        scale, offset = self.input_scale.data, self.zero_point.data
        if self.dtype is torch.bfloat16 and not scale.is_meta and torch.equal(scale.bfloat16().float(), scale):
            scale, offset = scale.bfloat16(), offset.bfloat16()
        return scale.expand(n).contiguous(), offset.expand(n).contiguous()

    def quantize(self, x: Tensor) -> QuantizedRows:
        return QuantizedRows(torch_npu.npu_quantize(x, self.input_scale, self.zero_point, torch.qint8, -1, True))


class StaticLinear(StaticInput):
    """By one scale and offset. `weight`: the values as the chip reads them."""

    def __init__(self, products: Int8Products, weight: StaticInt8, values: nn.Parameter) -> None:
        num_in = weight.values.shape[1]
        super().__init__(num_in, _num_out(weight), weight.input_scale, weight.input_offset, products.dtype)
        self.by_rows = products.by_rows
        self.weight = values
        self.scale = frozen(weight.deq_scale)
        self.packed_scale = frozen(packed(weight.deq_scale)) if self.dtype is torch.float16 else None
        self.bias = frozen(weight.quant_bias)

    def multiply(self, rows: QuantizedRows) -> Tensor:
        return self._product(rows, self.scale if self.packed_scale is None else self.packed_scale, self.dtype)

    def sums(self, rows: QuantizedRows) -> Tensor:
        """Without the scale: int32 `[T, m]`, the bias in it."""
        return self._product(rows, self.scale, torch.int32)

    def _product(self, rows: QuantizedRows, scale: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.weight.t() if self.by_rows else self.weight
        return torch_npu.npu_quant_matmul(rows.values, weight, scale, bias=self.bias, output_dtype=dtype)


class DynamicLinear(Int8Linear):
    """By a scale for every row. `values`: as the chip reads them."""

    def __init__(self, products: Int8Products, weight: DynamicInt8, bias: Tensor | None, values: nn.Parameter) -> None:
        super().__init__(_num_out(weight))
        self.dtype = products.dtype
        self.weight, self.scale, self.bias = values, frozen(weight.scale), frozen(bias)

    def quantize(self, x: Tensor) -> QuantizedRows:
        return QuantizedRows(*torch_npu.npu_dynamic_quant(x))

    def multiply(self, rows: QuantizedRows) -> Tensor:
        return torch_npu.npu_quant_matmul(
            rows.values, self.weight, self.scale, pertoken_scale=rows.scale, bias=self.bias, output_dtype=self.dtype
        )

    def sums(self, rows: QuantizedRows) -> Tensor:
        """Without scales and bias: int32 `[T, m]`."""
        return torch_npu.npu_quant_matmul(rows.values, self.weight, self.scale, output_dtype=torch.int32)


class DequantizingLinear(Int8Linear):
    """By a scale for every row, which the kernel finds itself. It wants both dims of a weight in whole tiles: zeros."""

    def __init__(self, products: Int8Products, weight: DynamicInt8, bias: Tensor | None) -> None:
        super().__init__(_num_out(weight))
        rows, columns = (-size % _TILE for size in weight.values.shape)
        self.columns = columns
        self.weight = frozen(products.kept_by_rows(F.pad(weight.values, (0, columns, 0, rows))))
        self.scale, self.bias = frozen(F.pad(weight.scale, (0, rows))), frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.num_out)
        x = F.pad(x, (0, self.columns)) if self.columns else x
        y = torch_npu.npu_quant_matmul_dequant(x, self.weight, self.scale, quant_mode="pertoken")[:, : self.num_out]
        return y if self.bias is None else y + self.bias


class MixedLinear(Int8Linear):
    """Static in steps of no more rows than a decode step has, dynamic in others."""

    def __init__(
        self, static: StaticLinear, dynamic: "DynamicLinear | DequantizingLinear", products: Int8Products
    ) -> None:
        super().__init__(static.num_out)
        self.static, self.dynamic, self.decode_rows = static, dynamic, products.decode_rows

    def chosen(self, num_rows: int) -> nn.Module:
        """The one of the two that multiplies so many rows."""
        return self.static if num_rows <= self.decode_rows else self.dynamic

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if isinstance(x, QuantizedRows):
            return (self.static if x.scale is None else self.dynamic).multiply(x)
        return self.chosen(len(x))(x)


class WeightLinear(Int8Linear):
    """By weights that the kernel makes float again. Plain layout: NZ is documented for graphs alone.

    The kernel adds the offset to the values that weights.py subtracts it from.
    """

    def __init__(self, products: Int8Products, weight: WeightInt8, bias: Tensor | None) -> None:
        super().__init__(_num_out(weight))
        groups, dtype = weight.scale.shape[1], products.dtype
        self.group_size = 0 if groups == 1 else weight.values.shape[1] // groups
        self.weight = frozen(layout.weight(weight.values, nz=False))
        self.scale = frozen(weight.scale.t().to(dtype).contiguous())
        self.offset = None if weight.offset is None else frozen(-weight.offset.t().to(dtype).contiguous())
        self.bias = None if bias is None else frozen(bias.float() if dtype is torch.bfloat16 else bias)

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.num_out)
        return torch_npu.npu_weight_quant_batchmatmul(
            x,
            self.weight,
            self.scale,
            antiquant_offset=self.offset,
            bias=self.bias,
            antiquant_group_size=self.group_size,
        )


class Pieces(nn.Module):
    """Outputs side by side, where they are more than one product has."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def reader_of(linear: object, num_rows: int) -> StaticInput | DynamicLinear | None:
    """Of what `linear` is made, that which takes QuantizedRows in a step of `num_rows`; None: it takes float rows."""
    if isinstance(linear, SummedLinear):
        linear = linear.product
    if isinstance(linear, MixedLinear):
        linear = linear.chosen(num_rows)
    return linear if isinstance(linear, StaticInput | DynamicLinear) else None


def num_rows_of(x: Tensor | QuantizedRows) -> int:
    return len(x.values if isinstance(x, QuantizedRows) else x)


def add_rms_norm_static(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None, reader: StaticInput
) -> tuple[QuantizedRows, Tensor]:
    """`(norm(x + residual) + bias` as the reader takes it, `x + residual)` in one kernel."""
    values, _, total = torch_npu.npu_add_rms_norm_quant(
        x, residual, weight, reader.norm_scale, reader.norm_zero_point, bias, epsilon=eps
    )
    return QuantizedRows(values), total


def add_rms_norm_dynamic(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None
) -> tuple[QuantizedRows, Tensor]:
    """The same for a reader that takes a scale for every row."""
    values, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(x, residual, weight, beta=bias, epsilon=eps)
    return QuantizedRows(values, scale), total


def swiglu_quantized(
    x: Tensor | QuantizedRows, gate_up: nn.Module, reader: StaticInput | DynamicLinear
) -> QuantizedRows:
    """`swiglu(gate_up(x))` as the reader takes it, in one kernel behind the product.

    Where the product has nothing to add behind its scales, the kernel takes its int32 sums and the scales, and the
    halves are never rounded. A float bias it takes by no page: then the product comes in the model's type.
    """
    product, options = reader_of(gate_up, num_rows_of(x)), {}
    has_sums = isinstance(product, StaticLinear | DynamicLinear)
    if not has_sums or (isinstance(product, DynamicLinear) and product.bias is not None):
        sums = gate_up(x)
    else:
        rows = x if isinstance(x, QuantizedRows) else product.quantize(x)
        sums = product.sums(rows)
        options = {"weight_scale": product.scale.unsqueeze(0), "activation_scale": rows.scale}
    if isinstance(reader, StaticInput):
        options |= {"quant_scale": reader.input_scale, "quant_offset": reader.input_offset, "quant_mode": _STATIC}
    else:
        options |= {"quant_mode": _DYNAMIC}
    values, scale = torch_npu.npu_dequant_swiglu_quant(sums, activate_left=True, **options)
    return QuantizedRows(values, None if isinstance(reader, StaticInput) else scale)


def packed(scale: Tensor) -> Tensor:
    """float32 scales as npu_trans_quant_param packs them, int64: 19 bits of each, rounded to the nearest, ties to even.

    The op itself cuts the others off; a scale that it has packed before stays as it is.
    """
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000) | (1 << 46)


def _num_out(weight: QuantizedWeight) -> int:
    if isinstance(weight, MixedInt8):
        return _num_out(weight.static)
    values = getattr(weight, "values", None)
    return len(values) if isinstance(values, Tensor) and values.dim() == 2 else 0


def _rows_of(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some of the outputs, with memory of their own."""
    if isinstance(weight, MixedInt8):
        return MixedInt8(_rows_of(weight.static, rows), _rows_of(weight.dynamic, rows))
    by_output = {"values", "deq_scale", "quant_bias", "scale", "offset"}
    held = {name: getattr(weight, name) for name in by_output if getattr(weight, name, None) is not None}
    return replace(weight, **{name: x[rows].clone() for name, x in held.items()})


def _is_padded(values: Tensor) -> bool:
    return any(size % _TILE for size in values.shape)
