"""W8A16: int8 weights by row (or by groups of a row), float activations."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from executor.device.weights import WeightInt8
from executor.quant.fields import IN, OUT, WEIGHT, FieldScheme, is_zero
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.w8a8_dynamic import OFFSET, SCALE


class W8A16(FieldScheme):
    """`group_size`: inputs that share a scale and an offset, `[n, k / group_size]` in the files; None: all of a row."""

    name = "w8a16"
    form = WeightInt8

    def __init__(self, group_size: int | None = None) -> None:
        self.group_size = group_size
        scales = (SCALE, OFFSET)
        if group_size is not None:
            scales = tuple(replace(x, dims=(OUT, IN), grouped=group_size, extra_dim=False) for x in scales)
        self.fields = (WEIGHT, *scales)

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> WeightInt8:
        scale, offset = tensors["weight_scale"], tensors["weight_offset"]
        if self.group_size is None:
            scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
        return WeightInt8(tensors["weight"], scale, None if is_zero(offset) else offset)
