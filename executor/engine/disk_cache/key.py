"""The name of all that stored bytes depend on besides tokens, positions and pixels: another one, another folder."""

import hashlib
import json
from dataclasses import asdict

from executor.device.ops import Ops
from executor.engine.step import ModelStep
from executor.host.env import code_digest
from executor.recipe.schema import Recipe

_MODEL = ("device", "soc", "dtype", "exe_mode", "quantization", "kv_cache_dtype", "enable_weight_nz", "cpu_isa")
_PARALLEL = ("attn_tp_size", "moe_ep_size", "vision_parallel")


def cache_key(recipe: Recipe, checkpoint: str, step: ModelStep, device: Ops) -> str:
    """Hex. `recipe` is settled; `checkpoint`: digest of its bytes (executor.checkpoint.content).

    Pixels' own settings are part of a media item's digest, where the tokens stand of a block's.
    """
    cpu = getattr(device, "capability", None)
    parts = {
        "checkpoint": checkpoint,
        "model": {name: getattr(recipe.model, name) for name in _MODEL},
        "parallel": {name: getattr(recipe.parallel, name) for name in _PARALLEL},
        "cache": [(tuple(x.shape[1:]), str(x.dtype)) for layer in step.kv for x in (layer.k, layer.v)],
        "block_size": step.block_size,
        "activations": str(step.dtype),
        "cpu": None if cpu is None else asdict(cpu),
        "versions": device.versions(),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_sorted).encode()).hexdigest()[:32]


def _sorted(types: frozenset) -> list[str]:
    return sorted(map(str, types))
