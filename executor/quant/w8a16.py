"""W8A16: int8 weights by row (or by groups of a row), float activations."""

from collections.abc import Mapping

from torch import Tensor

from executor.device.weights import WeightInt8
from executor.quant.fields import WEIGHT, FieldScheme, is_zero
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.w8a8_dynamic import OFFSET, SCALE


class W8A16(FieldScheme):
    name = "w8a16"
    fields = (WEIGHT, SCALE, OFFSET)
    form = WeightInt8

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> WeightInt8:
        offset = tensors["weight_offset"]
        return WeightInt8(
            tensors["weight"],
            tensors["weight_scale"].unsqueeze(-1),
            None if is_zero(offset) else offset.unsqueeze(-1),
        )
