"""The calls that the table of soc.py names, each as a function of the surface's own arguments.

Legend: T tokens, H heads, D head dim, E experts, k experts per token.
"""

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from executor.device.npu.soc import COMPOSED


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def _rms_norm_composed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


RMS_NORM = {"npu_rms_norm": _rms_norm, COMPOSED: _rms_norm_composed}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(norm(x + residual), x + residual)` in one kernel."""
    y, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
    return y, total


def _rope_apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Works in place on its inputs. The layout is named: releases differ in its default."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch_npu.npu_apply_rotary_pos_emb(q, k, cos, sin, layout="TND", rotary_mode="half")


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H, D]`; the op takes [1, T, H, D] with angles [1, T, 1, D]."""
    r1, r2 = cos[None, :, None], sin[None, :, None]
    return torch_npu.npu_rotary_mul(x.unsqueeze(0), r1, r2, rotary_mode="half").squeeze(0)


def _rope_mul(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_mul(q, cos, sin), rotary_mul(k, cos, sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in plain torch."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def _rope_composed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(q, cos, sin), rotated(k, cos, sin)


ROPE = {"npu_apply_rotary_pos_emb": _rope_apply, "npu_rotary_mul": _rope_mul, COMPOSED: _rope_composed}


def _swiglu(gate_up: Tensor) -> Tensor:
    return torch_npu.npu_swiglu(gate_up, dim=-1)


def _swiglu_composed(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


SWIGLU = {"npu_swiglu": _swiglu, COMPOSED: _swiglu_composed}


def _gate(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(logits, finished=None, k=k)
    return weights, ids


def _gate_composed(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(torch.softmax(logits, dim=-1), k, dim=-1)
    return weights, ids.to(torch.int32)


GATE = {"npu_moe_gating_top_k_softmax": _gate, COMPOSED: _gate_composed}
