"""C8: keys and values as int8, with a scale and an offset for every channel (`kv_cache_type` of a description).

What is quantized is what the cache holds, and so what attention reads: keys behind their norm and rotation, values as
projected. msmodelslim's pipeline (v1) means the same: it observes what DynamicCache.update is given. Its older
Calibrator (v0) observes the outputs of k_proj and v_proj and writes them under the same names, which for a rotated or
normalised key is another tensor; of these models it writes nothing usable, see `faults`.
`q = clamp(round(x / scale + offset), -128, 127)`, read as `(q - offset) * scale`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from executor.errors import UserError

C8 = "C8"
SCALE, OFFSET = SUFFIXES = ("kv_cache_scale", "kv_cache_offset")
_LEAST_SCALE = 2.0**-23  # of a channel that is always zero, as msmodelslim has it for weights


def tensor_names(attention: str) -> list[str]:
    """What `attention` ("...layers.0.self_attn") has in the checkpoint."""
    return [f"{attention}.{linear}.{suffix}" for linear in ("k_proj", "v_proj") for suffix in SUFFIXES]


def is_cache_tensor(name: str) -> bool:
    return name.endswith(SUFFIXES)


def faults(catalog: Mapping[str, Any], attentions: Iterable[str], channels: int) -> Iterator[str]:
    """What keeps a checkpoint's C8 tensors from being used; by names and shapes alone.

    `catalog`: name to something with `.shape`. `channels`: key/value heads times head dim, of the whole model.
    """
    wanted = [name for attention in attentions for name in tensor_names(attention)]
    missing = [name for name in wanted if name not in catalog]
    strangers = sorted(name for name in catalog if is_cache_tensor(name) and name not in set(wanted))
    if missing:
        yield f"missing: {_some(missing)}"
    if strangers:
        yield f"of no attention layer: {_some(strangers)}"
    odd = [name for name in wanted if name in catalog and tuple(catalog[name].shape) != (channels,)]
    if odd:
        shape = list(catalog[odd[0]].shape)
        yield f"of shape {shape} instead of [{channels}], a number for every channel of all heads: {_some(odd)}"


UNUSABLE = (
    "the description says C8 (int8 KV cache), and its tensors are not usable: {}. msmodelslim (to 26.1.0) writes none "
    "or empty ones for vision-language models. Quantize without C8"
)


def _some(names: list[str]) -> str:
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"


def checked(name: str, takes_offsets: bool, x: Tensor) -> Tensor:
    """A scale or an offset as a file has it (offsets are integers in some) as float32.

    Raises UserError for scales that are no positive numbers, offsets that are no whole numbers of int8, and any offset
    where the device takes none.
    """
    x = x.float()
    if name.endswith(SCALE):
        fine, wanted = torch.isfinite(x) & (x >= torch.finfo(x.dtype).tiny), "positive numbers"
    else:
        fine, wanted = (x == x.round()) & (x >= -128) & (x <= 127), "whole numbers from -128 to 127"
    if not bool(fine.all()):
        raise UserError(
            f"tensor '{name}' must hold {wanted}, got {x[~fine][0]:g}; quantize the model again, or set "
            "model_config.kv_cache_dtype: float, which leaves it"
        )
    if name.endswith(OFFSET) and not takes_offsets and bool(x.any()):
        raise UserError(
            f"tensor '{name}' has offsets other than zero, and NPUs take an int8 KV cache without them here (no "
            "page says which sign their attention gives an offset); quantize again with a symmetric cache, or set "
            "model_config.kv_cache_dtype: float"
        )
    return x


# ---- making them


class Extremes:
    """The least and the largest number of every channel over all tensors `observe` has seen, `[..., C]` each."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def scales_of(low: Tensor, high: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """(kv_cache_scale, kv_cache_offset), float32 `[C]` each, of channels that were seen between `low` and `high`.

    Symmetric: `scale = max(|low|, |high|) / 127`, offset 0: what NPUs take (executor/device/npu/int8_cache.py).
    Else `scale = (high - low) / 255` and `offset = round(-low / scale) - 128`, over a range that holds zero.
    """
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()).float() / 127
        return scale.clamp_(min=_LEAST_SCALE), torch.zeros_like(scale)
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = ((high - low) / 255).clamp_(min=_LEAST_SCALE)
    return scale, (-low / scale).round() - 128


def cache_tensors(attention: str, keys: Extremes, values: Extremes, symmetric: bool = True) -> dict[str, Tensor]:
    """The four tensors of one attention layer ("...layers.0.self_attn") as a checkpoint has them, `[K * D]` each.

    `keys` have observed rows `[..., K * D]` behind norm and rotation, `values` as projected.
    """
    found = [x for each in (keys, values) for x in scales_of(each.low, each.high, symmetric)]
    return dict(zip(tensor_names(attention), found, strict=True))


def describe(tensors: Iterable[str]) -> dict[str, str]:
    """What these tensors add to a quant_model_description.json."""
    return {"kv_cache_type": C8, "kv_quant_type": C8, **dict.fromkeys(tensors, C8)}
