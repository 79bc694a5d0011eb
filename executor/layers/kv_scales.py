"""The scales of one attention layer's int8 cache, as a checkpoint has them.

Names and shapes: `self_attn.{k,v}_proj.kv_cache_scale` and `.kv_cache_offset`, `[K * D]` of all heads; a rank reads
those of its own. They are of what the cache holds: keys behind norm and rotation (executor/quant/kv_cache.py).
Legend: K key/value heads of this rank, D head dim.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from executor.checkpoint.pull import Catalog, Pull, empty
from executor.device import ops
from executor.device.ops import KVScales
from executor.parallel.partition import Part
from executor.quant.fields import FLOATS, NUMBERS
from executor.quant.kv_cache import SCALE, SUFFIXES, checked


class CacheScales(nn.Module):
    """`parts`: those of k_proj and v_proj, whose outputs are the channels."""

    def __init__(self, parts: tuple[Part, Part], head_dim: int) -> None:
        super().__init__()
        self.parts = parts
        self.head_dim = head_dim
        for name, part in zip("kv", parts, strict=True):
            for suffix in SUFFIXES:
                self.register_parameter(f"{name}_{suffix}", empty(part.num_local, dtype=torch.float32))

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        attention, takes_offsets = prefix.rpartition(".")[0], ops.bound().takes_cache_offsets
        for name, part in zip("kv", self.parts, strict=True):
            for suffix in SUFFIXES:
                into = getattr(self, f"{name}_{suffix}")
                full = f"{attention}.{part.name}.{suffix}"
                reader, accepts = partial(checked, full, takes_offsets), FLOATS if suffix == SCALE else NUMBERS
                yield Pull(full, (part.num_rows,), (part.rows,), into, convert=reader, accepts=accepts, judged=True)

    @property
    def values(self) -> KVScales:
        """By head, `[K, D]`."""
        found = (getattr(self, f"{name}_{suffix}").data.view(-1, self.head_dim) for name in "kv" for suffix in SUFFIXES)
        return KVScales(*found)
