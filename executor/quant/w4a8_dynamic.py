"""W4A8_DYNAMIC: weights of four bits by row, two rows to a byte; int8 activations by each row's own largest value."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from executor.device.weights import DynamicInt4
from executor.quant.fields import WEIGHT, FieldScheme, require_symmetric
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.w8a8_dynamic import NO_OFFSET, SCALE


class W4A8Dynamic(FieldScheme):
    """scale_bias, `[outputs, 1]` or in 16 parts of the inputs, follows from the weights: see DynamicInt4.

    Weights that have a second scale by groups of inputs (weight_scale_second) are refused: no chip's kernel takes them
    with these scales.
    """

    name = "w4a8_dynamic"
    fields = (replace(WEIGHT, packed=2), SCALE, NO_OFFSET)
    left = ("scale_bias",)
    refused = {"weight_scale_second": "it scales groups of inputs: quantize the model by channel"}
    form = DynamicInt4

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> DynamicInt4:
        require_symmetric(tensors["weight_offset"], self.name)
        return DynamicInt4(tensors["weight"], tensors["weight_scale"])
