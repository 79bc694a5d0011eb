"""Which numbers the tensors of a quantized weight may hold: judged once, while they are read.

A scale of zero or below, or one that is no number, would make every answer wrong without a word.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor.errors import UserError

_LEAST = torch.finfo(torch.float32).tiny  # tools give rows of zeros 2^-23; what is below is no scale
_AGAIN = "quantize the model again"


@dataclass(frozen=True)
class Values:
    """`whole`: whole numbers only. Bounds are included."""

    least: float
    most: float
    whole: bool
    wanted: str

    def check(self, name: str, stored: Tensor, x: Tensor) -> Tensor:
        """`x`, which was made of `stored`, as the file has tensor `name`. Raises UserError for other numbers."""
        fine = (x >= self.least) & (x <= self.most)  # both are False for NaN
        if self.whole:
            fine &= x == x.round()
        if x.is_meta or bool(fine.all()):
            return x
        bits = ""
        if stored.dtype is torch.int64 and self is SCALES:
            bits = (
                ", the float32 in the low 32 bits of an int64 scale. Scales that are rounded to int64, or packed in "
                "another way, cannot be read"
            )
        raise UserError(f"tensor '{name}' must hold {self.wanted}, got {float(x[~fine][0]):g}{bits}; {_AGAIN}")


def shortest(value: float) -> str:
    """A float32 in as few digits, of 6 to 9, as tell it from its neighbours."""
    texts = (f"{value:.{digits}g}" for digits in range(6, 9))
    return next((text for text in texts if float(torch.tensor(float(text))) == value), f"{value:.9g}")


_MOST = torch.finfo(torch.float32).max
SCALES = Values(_LEAST, _MOST, False, "positive numbers that are no denormals")
FINITE = Values(-_MOST, _MOST, False, "finite numbers")
STEPS = Values(-128, 127, True, "whole numbers from -128 to 127")
ZEROS = Values(0, 0, False, "zeros, as weights of this type are symmetric")
