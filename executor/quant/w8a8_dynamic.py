"""W8A8_DYNAMIC: int8 weights by row, int8 activations by each row's own largest value."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from executor.device.weights import DynamicInt8
from executor.quant.fields import FLOATS, NUMBERS, OUT, WEIGHT, Field, FieldScheme, as_float, require_symmetric
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.values import FINITE, SCALES, ZEROS

SCALE = Field("weight_scale", torch.float32, (OUT,), reader=as_float, extra_dim=True, accepts=FLOATS, allowed=SCALES)
OFFSET = Field("weight_offset", torch.float32, (OUT,), reader=as_float, extra_dim=True, accepts=NUMBERS, allowed=FINITE)
NO_OFFSET = replace(OFFSET, allowed=ZEROS)


class W8A8Dynamic(FieldScheme):
    """weight_offset stands in the files and is zero: it is read, and must be."""

    name = "w8a8_dynamic"
    fields = (WEIGHT, SCALE, NO_OFFSET)
    form = DynamicInt8

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> DynamicInt8:
        require_symmetric(tensors["weight_offset"], self.name)
        return DynamicInt8(tensors["weight"], tensors["weight_scale"])
