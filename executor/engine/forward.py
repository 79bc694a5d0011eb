"""What one model step takes besides its token embeddings. Built once per step, read by every layer.

Legend: T tokens of the step, R rows that want logits, D head dim, P visual tokens of the step, n hidden size.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from executor.device.ops import KVLayer


@dataclass(frozen=True)
class DeepStack:
    """Visual features that are added to the hidden states after the first layers (Qwen3-VL)."""

    index: Tensor  # int64 [P]: where in the step the visual tokens stand
    features: Tensor  # [P, taps, n]


@dataclass(frozen=True)
class ForwardMeta:
    cos: Tensor  # [T, D], merged over the three axes
    sin: Tensor
    slots: Tensor  # [T] of the backend's slot_dtype, block * block_size + offset
    attention: Any  # what the backend's prepare_attention made of this step
    kv: list[KVLayer]
    select: Tensor | None  # int64 [R]: the tokens whose logits are wanted; None: all
    deepstack: DeepStack | None = None
    padded_tokens: int | None = None  # what every replica brings to this step's experts; None: as many as this one
