"""Linears whose weight stays compressed (W8A8SC), on the 300I DUO: the product unpacks it as it goes.

Legend: T tokens, k inputs, n outputs of one of the linears that are fused, m their sum.
"""

import torch
import torch_npu
from torch import Tensor, nn

from executor.device.npu.linear import frozen
from executor.device.npu.quant import QuantizedRows, StaticInput, packed
from executor.device.npu.soc import Soc
from executor.device.weights import CompressedInt8
from executor.errors import UserError

_CALL = "npu_matmul_compress_dequant"


class CompressedLinear(StaticInput):
    """`x [T, k] -> [T, m]` fp16: x is quantized once, the fused linears are multiplied one by one."""

    def __init__(self, weight: CompressedInt8, dtype: torch.dtype) -> None:
        super().__init__(weight.num_in, sum(weight.num_out), weight.input_scale, weight.input_offset, dtype)
        self.values = nn.ParameterList(map(frozen, weight.values))
        self.index = nn.ParameterList(map(frozen, weight.index))
        # The op's meta kernel and its page name uint64, where other products take the same bits as int64.
        scales = packed(weight.deq_scale).view(torch.uint64).split(weight.num_out)
        self.scale = nn.ParameterList(frozen(x.unsqueeze(0)) for x in scales)
        self.bias = nn.ParameterList(frozen(x.unsqueeze(0)) for x in weight.quant_bias.split(weight.num_out))

    def multiply(self, rows: QuantizedRows) -> Tensor:
        each = zip(self.values, self.index, self.bias, self.scale, strict=True)
        results = [torch_npu.npu_matmul_compress_dequant(rows.values, *weight) for weight in each]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def prepare(weight: CompressedInt8, soc: Soc, dtype: torch.dtype) -> CompressedLinear:
    """Raises UserError on a chip that does not unpack weights, and for a torch_npu without the call."""
    if soc.name != "atlas_300i_duo":
        raise UserError(
            f"model_config.quantization: w8a8sc weights are unpacked by atlas_300i_duo only, and this chip is "
            f"{soc.name}; use w8a8 weights"
        )
    if not hasattr(torch.ops.npu, _CALL):
        raise UserError(f"the installed torch_npu has no {_CALL}, which w8a8sc weights need; use w8a8s weights")
    return CompressedLinear(weight, dtype)
