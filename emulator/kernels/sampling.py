"""npu_top_k_top_p: logits below the k best, and below the nucleus, become -inf.

Semantics and limits: the op's docstring in the torch_npu wheel, step by step.
"""

import torch
from torch import Tensor

from emulator.limits import FLOATS, require, require_dtype, require_rank, require_same_dtype, require_shape
from emulator.registry import kernel


def _check(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> None:
    require_dtype("logits", logits, FLOATS)
    require_rank("logits", logits, 2)
    require(p is not None or k is not None, "p and k must not both be None")
    require_same_dtype("logits", logits, p=p)
    require_shape("p", p, logits.shape[0])
    require_shape("k", k, logits.shape[0])
    if k is not None:
        require_dtype("k", k, (torch.int32,))


@kernel("npu_top_k_top_p", _check)
def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    values, order = logits.float().sort(dim=-1, stable=True)
    width = logits.shape[1]
    if k is not None:
        most = min(1024, width)
        require(bool(((k >= 1) & (k <= most)).all()), f"k must lie in [1, {most}]", k.tolist()[:32])
        threshold = values.gather(1, (width - k.long()).unsqueeze(1))
        values = values.masked_fill(values < threshold, float("-inf"))
    if p is not None:
        require(bool(((p >= 0) & (p <= 1)).all()), "p must lie in [0, 1]", p.tolist()[:32])
        below = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p.float().unsqueeze(1)
        below[:, -1] = False
        values = values.masked_fill(below, float("-inf"))
    return torch.empty_like(values).scatter_(1, order, values).to(logits.dtype)
