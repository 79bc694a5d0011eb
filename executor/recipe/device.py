"""What a recipe's device makes of it: asked of the backend, before one is opened."""

from executor.device.table import BACKENDS, DeviceSettings
from executor.quant.sizes import FLOAT_BYTES, MADE_AT_LOAD
from executor.recipe.schema import ModelSection, Recipe


def device_settings(model: ModelSection, index: int = 0) -> DeviceSettings:
    """What a settled recipe says about its device; `index`: which of this machine's chips."""
    return DeviceSettings(
        model.dtype,
        soc=model.soc,
        emulated=BACKENDS[model.device].is_emulated,
        weight_nz=model.enable_weight_nz,
        cpu_isa=model.cpu_isa,
        index=index,
    )


def compute_bytes(recipe: Recipe) -> int:
    """Of a number of the activations and of the KV cache. Raises UserError for a CPU that the recipe forces in vain."""
    return FLOAT_BYTES[BACKENDS[recipe.model.device].computes_in(device_settings(recipe.model))]


def copies_head(recipe: Recipe) -> bool:
    """Whether a tied output head is made a copy of the embedding. Raises UserError as compute_bytes."""
    return BACKENDS[recipe.model.device].copies_tied_head(device_settings(recipe.model))


def takes_int8_head(recipe: Recipe, vocab_size: int) -> bool:
    """Whether the output head is made int8 while loading, as the text layers are. Raises UserError as compute_bytes.

    Only by a word that makes weights so, and where the device gains by it.
    """
    model = recipe.model
    if model.quantization not in MADE_AT_LOAD:
        return False
    return BACKENDS[model.device].takes_int8_head(device_settings(model), vocab_size)
