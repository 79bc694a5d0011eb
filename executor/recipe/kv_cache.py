"""What a recipe and its checkpoint say about the type of the KV cache, and what keeps it from being int8."""

from executor.checkpoint.description import Description
from executor.device.table import named
from executor.recipe.schema import ModelSection, Recipe

_ROWS = 32  # tokens of a block that an NPU's attention over int8 keys wants whole multiples of


def has_cache_scales(description: Description | None) -> bool:
    """Whether the checkpoint's description speaks of an int8 KV cache."""
    return description is not None and description.kv_cache is not None


def scales_finding(model: ModelSection, has_scales: bool) -> list[str]:
    """An int8 cache that is asked for and that the checkpoint has no scales for."""
    if model.kv_cache_dtype != "int8" or has_scales:
        return []
    return [
        f"model_config.kv_cache_dtype: int8 needs scales, and the checkpoint {model.model_path} has none (no "
        "kv_cache_type C8 in a quant_model_description*.json); set kv_cache_dtype: auto"
    ]


def cache_findings(recipe: Recipe) -> list[str]:
    """What an int8 cache lacks on an NPU."""
    model, block_size = recipe.model, recipe.scheduler.block_size
    if model.kv_cache_dtype != "int8" or not (model.device in named(npu=True) or model.soc):
        return []
    if model.soc == "atlas_300i_duo":
        return [
            "model_config.kv_cache_dtype: atlas_300i_duo has no documented attention over an int8 KV cache; set "
            "kv_cache_dtype: float (the scales of a C8 checkpoint are left then)"
        ]
    if block_size % _ROWS:
        return [
            f"scheduler_config.block_size: got {block_size}; a block of an int8 KV cache on NPUs has a multiple of "
            f"{_ROWS} tokens"
        ]
    return []
