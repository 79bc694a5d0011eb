"""Quantized weights as values: what a scheme (executor/quant) hands a backend to multiply with.

Arithmetic as msmodelslim's files mean it; rounding is to nearest, ties to even; sums of products are int32, exact.
Legend: m outputs and n inputs of this rank. Of experts every tensor has a first dim more, E experts of this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StaticInt8:
    """W8A8: activations by one scale and offset, measured beforehand.

    `xq = clamp(round(x / input_scale + input_offset), -128, 127)`, `y = (xq · valuesᵀ + quant_bias) * deq_scale`.
    quant_bias holds the linear's bias and the offset's part already: such a linear has no bias beside it.
    """

    values: Tensor  # int8 [m, n]
    deq_scale: Tensor  # float32 [m]
    quant_bias: Tensor  # int32 [m]; zeros on a rank whose part of the sum leaves it to another
    input_scale: Tensor  # float32 [1]
    input_offset: Tensor  # float32 [1], a whole number


@dataclass(frozen=True, eq=False)
class DynamicInt8:
    """W8A8_DYNAMIC: every row of activations by its own largest value.

    `s = max|x| / 127`, `xq = round(x / s)`, `y = (xq · valuesᵀ) * s * scale + bias`; a row of zeros stays zeros.
    """

    values: Tensor  # int8 [m, n]
    scale: Tensor  # float32 [m]


@dataclass(frozen=True, eq=False)
class MixedInt8:
    """W8A8_MIX: static in steps of few rows (decode), dynamic in steps of many (prefill), over the same values.

    The bias beside it is the dynamic form's; the static form has it in quant_bias.
    """

    static: StaticInt8
    dynamic: DynamicInt8


@dataclass(frozen=True, eq=False)
class WeightInt8:
    """W8A16 and wint8: activations stay float. `W = (values - offset) * scale`, by row or by g groups of a row."""

    values: Tensor  # int8 [m, n]
    scale: Tensor  # float32 [m, g]
    offset: Tensor | None = None  # float32 [m, g], whole numbers; None: zeros


@dataclass(frozen=True, eq=False)
class DynamicInt4:
    """W4A8_DYNAMIC: as DynamicInt8, over weights of -8 to 7, two to a byte along m: row 2i in the low four bits.

    What files call scale_bias, `8 * sum(weights) * scale` of each row, is an operand of the chips' kernel, which splits
    activations into halves of four bits; it follows from the weights: a backend that needs it calculates it.
    """

    packed: Tensor  # int8 [m / 2, n]
    scale: Tensor  # float32 [m]


@dataclass(frozen=True, eq=False)
class CompressedInt8:
    """W8A8SC: StaticInt8 whose values stay compressed, in CANN's codec; the product unpacks them.

    Linears that are fused were compressed one by one: the results of all `values` stand side by side.
    """

    values: tuple[Tensor, ...]  # int8 [c], of each of them
    index: tuple[Tensor, ...]  # int8, 8 bytes for a tile of 256 inputs by 128 outputs
    num_in: int
    num_out: tuple[int, ...]  # outputs of each; m is their sum
    deq_scale: Tensor  # float32 [m]
    quant_bias: Tensor  # int32 [m]
    input_scale: Tensor  # float32 [1]
    input_offset: Tensor  # float32 [1]


QuantizedWeight = StaticInt8 | DynamicInt8 | MixedInt8 | WeightInt8 | DynamicInt4 | CompressedInt8
Weight = Tensor | QuantizedWeight
WORDS: dict[type, str] = {
    StaticInt8: "W8A8",
    DynamicInt8: "W8A8_DYNAMIC",
    MixedInt8: "W8A8_MIX",
    WeightInt8: "W8A16",
    DynamicInt4: "W4A8_DYNAMIC",
    CompressedInt8: "W8A8SC",
}
"""What descriptions call each: for messages."""


def experts_of(weight: Weight) -> list[Weight]:
    """The experts of stacked weights, one by one, as views."""
    if isinstance(weight, Tensor):
        return list(weight)
    count = len(next(iter(_tensors(weight))))
    return [_mapped(weight, lambda x, index=index: x[index]) for index in range(count)]


def expert_form(weight: Weight) -> Weight:
    """What experts are multiplied by: of W8A8_MIX the dynamic form, as an expert's rows are few in any step."""
    return weight.dynamic if isinstance(weight, MixedInt8) else weight


def unpack_int4(packed: Tensor) -> Tensor:
    """`[..., m / 2, n]` of two rows to a byte (see DynamicInt4) as int8 `[..., m, n]`."""
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-2).flatten(-3, -2)


def pack_int4(values: Tensor) -> Tensor:
    """int8 `[..., m, n]` of -8 to 7, m even, as `[..., m / 2, n]`: the inverse of unpack_int4."""
    low, high = values.unflatten(-2, (-1, 2)).unbind(-2)
    return (low & 0xF) | (high << 4)


def _tensors(weight: QuantizedWeight) -> list[Tensor]:
    held = [getattr(weight, field.name) for field in fields(weight)]
    return [x for x in held if isinstance(x, Tensor)] or _tensors(held[0])


def _mapped(weight: QuantizedWeight, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    """The same weight with every tensor changed, those of nested weights as well."""
    held = {field.name: getattr(weight, field.name) for field in fields(weight)}
    changed = {
        name: change(x) if isinstance(x, Tensor) else _mapped(x, change)
        for name, x in held.items()
        if isinstance(x, Tensor | QuantizedWeight)
    }
    return replace(weight, **changed)
