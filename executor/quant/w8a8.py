"""W8A8 and W8A8S: int8 weights, int8 activations by a scale measured beforehand. W8A8S differs in its values alone,
which a compressor can pack; uncompressed it is the same arithmetic.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from executor.device.weights import StaticInt8
from executor.quant.fields import (
    EACH,
    FLOATS,
    NUMBERS,
    OUT,
    SCALE_BITS,
    WEIGHT,
    Field,
    FieldScheme,
    as_float,
    one_of_all,
    scale_of_bits,
)
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.values import SCALES, STEPS

STATIC_FIELDS = (
    Field("deq_scale", torch.float32, (OUT,), reader=scale_of_bits, accepts=SCALE_BITS, allowed=SCALES),
    Field("quant_bias", torch.int32, (OUT,), added_once=True),
    Field("input_scale", torch.float32, (EACH,), reader=as_float, accepts=FLOATS, allowed=SCALES),
    Field("input_offset", torch.float32, (EACH,), reader=as_float, accepts=NUMBERS, allowed=STEPS),
)


def static_weight(share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> StaticInt8:
    """Raises UserError where fused parts have other input scales or offsets."""
    return StaticInt8(
        tensors["weight"],
        tensors["deq_scale"],
        tensors["quant_bias"],
        one_of_all(tensors["input_scale"], share, "input_scale"),
        one_of_all(tensors["input_offset"], share, "input_offset"),
    )


class W8A8(FieldScheme):
    """quant_bias holds the bias: one that stands beside it is not added again."""

    fields = (WEIGHT, *STATIC_FIELDS)
    takes_bias = False
    left = ("bias", "weight_scale", "weight_offset")
    form = StaticInt8

    def __init__(self, name: str) -> None:
        self.name = name

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> StaticInt8:
        return static_weight(share, tensors)
