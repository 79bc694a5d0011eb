"""Weights to whole numbers: msmodelslim's rounding, GPTQ's, and the steps of each type.

Rounding is to nearest, ties to even. Everything is float32, as msmodelslim has it.
Legend: n outputs, k inputs of one linear.
Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), one step a row.
"""

import torch
from torch import Tensor

LEAST_SCALE = 2.0**-23
"""msmodelslim's: of a row of zeros."""
INT8 = (-128, 127)
INT4 = (-8, 7)
STEPS_IN_DEVIATION = 4
"""W8A8S: so many steps are a row's standard deviation. Its values then have 4.05 bits of entropy, whatever the row."""
DAMPING = 0.01
BLOCK = 128  # GPTQ's columns between two updates of all that follow


def row_scales(weight: Tensor) -> Tensor:
    """`[n, k]` -> the step of each row, `[n, 1]`: its largest value is 127 of them."""
    return (weight.abs().amax(1, keepdim=True) / 127).clamp_(min=LEAST_SCALE)


def low_entropy_scales(weight: Tensor) -> Tensor:
    """`[n, k]` -> steps `[n, 1]` by the spread of each row: most values are small numbers, which a compressor packs.

    A row whose largest value would not fit int8 has the step that makes it fit.
    """
    spread = weight.square().mean(1, keepdim=True).sqrt_() / STEPS_IN_DEVIATION
    return torch.maximum(spread, row_scales(weight))


def four_bit_scales(weight: Tensor) -> Tensor:
    """`[n, k]` -> steps `[n, 1]` for -8 to 7: of 20 shares of the row's largest value the one with the least error."""
    largest = weight.abs().amax(1, keepdim=True)
    best, least = (largest / 7).clamp_(min=LEAST_SCALE), torch.full_like(largest, torch.inf)
    for share in range(20):
        scale = (largest * (1 - 0.025 * share) / 7).clamp_(min=LEAST_SCALE)
        error = (nearest(weight, scale, INT4) * scale).sub_(weight).square_().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def nearest(weight: Tensor, scale: Tensor, bounds: tuple[int, int] = INT8) -> Tensor:
    """`[n, k]` in steps of `scale [n, 1]`: whole numbers, as float32."""
    return (weight / scale).round_().clamp_(*bounds)


def gptq(weight: Tensor, scale: Tensor, products: Tensor, bounds: tuple[int, int] = INT8) -> Tensor:
    """As `nearest`, but each column's error is made up for by the columns that are still to be rounded.

    `products [k, k]`: the sum of x xᵀ over the inputs x of the calibration. Columns that were never anything but zero
    are rounded to nearest.
    """
    inverse = _inverse_root(products)
    left, out = weight.clone(), torch.empty_like(weight)
    step = scale.squeeze(1)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), stop - start)
        for column in range(start, stop):
            value = left[:, column]
            rounded = (value / step).round_().clamp_(*bounds)
            out[:, column] = rounded
            error = (value - rounded * step) / inverse[column, column]
            errors[:, column - start] = error
            left[:, column:stop].addr_(error, inverse[column, column:stop], alpha=-1)
        left[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    return out


def _inverse_root(products: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `products`, damped."""
    damped = products.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
