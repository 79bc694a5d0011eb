"""Randomness without state: noise is a hash of (seed, position, candidate), the same on its own and in any batch.

Knows nothing of requests or logits. A change here changes every seeded answer.
Legend: N rows, K candidates of a row.
"""

import numpy as np
import torch

MASK_64 = (1 << 64) - 1
GOLDEN_64 = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB
ROUGHNESS = 1e-3  # many times the error of a score's distance and noise in float32, within the noise's range
HIGHEST_NOISE = 22.88  # of 32 bits: -log(-log(1 - 2**-33)) is 22.8739


def child_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of n; the first answer has the request's own, so n changes nothing for it."""
    return seed if index == 0 else noise_key(seed, -index) >> 1


def noise_key(seed: int, position: int) -> int:
    """A well mixed number of 64 bits from a request's seed and a token's position."""
    return _mix(mixed_seed(seed) + position * GOLDEN_64)


def mixed_seed(seed: int) -> int:
    """What `noise_keys` takes of a request's seed."""
    return _mix((seed + GOLDEN_64) & MASK_64)


def noise_keys(mixed_seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`noise_key` of many at once: uint64 [N] as `mixed_seed` gives them, and positions [N] -> int64 [N]."""
    state = mixed_seeds + positions.astype(np.uint64) * np.uint64(GOLDEN_64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX_A)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX_B)
    return (state ^ (state >> np.uint64(31))).view(np.int64)


def _mix(state: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    state &= MASK_64
    state = ((state ^ (state >> 30)) * MIX_A) & MASK_64
    state = ((state ^ (state >> 27)) * MIX_B) & MASK_64
    return state ^ (state >> 31)


def noise_bits(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """keys int64 [N], ids int64 [N, K] or [1, K] -> int64 [N, K] from 0 to 2**32 - 1: splitmix64 of (key, id).

    Multiplication of int64 wraps around; shifts are arithmetic, hence the masks.
    """
    state = ids * as_int64(GOLDEN_64) + keys[:, None]
    for shift, factor in ((30, MIX_A), (27, MIX_B)):
        state ^= (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        state *= as_int64(factor)
    state ^= (state >> 31).bitwise_and_((1 << 33) - 1)
    return state.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)


def gumbel_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float64 [N, K]: the noise of the bits as a uniform number, between -3.13 and 22.88."""
    uniform = noise_bits(keys, ids).double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def rough_noise(keys: torch.Tensor, count: int) -> torch.Tensor:
    """float32 [N, count]: `gumbel_noise` of the candidates 0, 1, ..., in error by a small part of ROUGHNESS."""
    bits = noise_bits(keys, torch.arange(count, device=keys.device)[None])
    # Of a uniform number near 1 what it lacks is a number of its own: float32 has no digits for both.
    is_low = bits < 1 << 31
    low = bits.float().add_(0.5).mul_(2.0**-32).log_()
    lack = bits.neg_().add_(1 << 32).float().sub_(0.5).mul_(-(2.0**-32)).log1p_()
    return torch.where(is_low, low, lack).neg_().log_().neg_()


def least_bits(noise: torch.Tensor) -> torch.Tensor:
    """float64 -> int64: all bits whose noise is `noise` or more are this or more, 2**32 where there are none."""
    # One less than the inverse gives, for its rounding.
    bits = noise.neg().exp_().neg_().exp_().mul_(2.0**32).sub_(1.5).floor_().clamp_(min=0).long()
    return bits.masked_fill_(noise > HIGHEST_NOISE, 1 << 32)


def may_reach(keys: torch.Tensor, first: torch.Tensor, count: int, least: torch.Tensor) -> torch.Tensor:
    """bool [N, count]: false where the bits of (key, first + 0, 1, ...) are less than `least`, keys, first, least [N].

    True for one bit pattern in 2**31 too many: the last mixing of splitmix64 leaves the 31 highest bits as they are, so
    that these alone tell, and the rest is not computed.
    """
    state = (first * as_int64(GOLDEN_64) + keys)[:, None] + torch.arange(count, device=keys.device) * as_int64(
        GOLDEN_64
    )
    work = torch.empty_like(state)
    for shift, factor in ((30, MIX_A), (27, MIX_B)):
        torch.bitwise_right_shift(state, shift, out=work)
        state ^= work.bitwise_and_((1 << (64 - shift)) - 1)
        state *= as_int64(factor)
    # Unsigned comparison: with the sign turned over, signed numbers are in the same order.
    lowest = ((least >> 1) << 33) ^ as_int64(1 << 63)
    state ^= as_int64(1 << 63)
    return state >= lowest[:, None]


def as_int64(value: int) -> int:
    """The signed number with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
