"""W8A8_MIX: int8 weights with the tensors of both W8A8 and W8A8_DYNAMIC; the kind of step decides which count."""

from collections.abc import Mapping

from torch import Tensor

from executor.device.weights import DynamicInt8, MixedInt8
from executor.quant.fields import WEIGHT, FieldScheme, require_symmetric
from executor.quant.scheme import ExpertShare, LinearShare
from executor.quant.w8a8 import STATIC_FIELDS, static_weight
from executor.quant.w8a8_dynamic import NO_OFFSET, SCALE


class W8A8Mix(FieldScheme):
    """The bias beside it is the dynamic form's: quant_bias holds it for the static one."""

    name = "w8a8_mix"
    fields = (WEIGHT, SCALE, NO_OFFSET, *STATIC_FIELDS)
    form = MixedInt8

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> MixedInt8:
        require_symmetric(tensors["weight_offset"], self.name)
        return MixedInt8(static_weight(share, tensors), DynamicInt8(tensors["weight"], tensors["weight_scale"]))
