"""What a chip's recipes can be: types and schemes of weights, where these lie, and a recipe moved onto a chip."""

from executor.capacity.chips import Chip
from executor.checkpoint.folder import local_checkpoint
from executor.recipe.schema import ModelSection, Recipe
from models.published import published_name, published_shapes

DUO = "atlas_300i_duo"
PRECISIONS = ("none", "w8a8", "w8a8_dynamic", "w8a8sc")
"""Of the weights, best first: float ones, then eight bits."""
LEFT_OUT = ("Qwen3-VL-235B-A22B-Instruct",)  # sizes that are known and have no recipe


def published_models() -> tuple[str, ...]:
    """Names of the published models that there are recipes for."""
    return tuple(name for name in published_shapes() if name not in LEFT_OUT)


def float_type(chip: Chip) -> str:
    """The 16-bit type that a chip's recipes use."""
    return "bfloat16" if "bfloat16" in chip.flops_per_s else "float16"


def precision_word(chip: Chip, quantization: str) -> str:
    """The weights in a word: their 16-bit type, or the scheme."""
    return float_type(chip) if quantization == "none" else quantization


def precisions(chip: Chip, model_path: str, hub: str = "huggingface") -> tuple[str, ...]:
    """Recipe's words for the weights of a model that a chip takes, of PRECISIONS.

    A folder that is here has the type it has (`auto`); of a published model there are all types, compressed ones on
    300I DUO only and never of experts.
    """
    name = published_name(model_path)
    if name is None or local_checkpoint(model_path, hub) is not None:
        return ("auto",)
    found = [word for word in PRECISIONS[:3] if word == "none" or "int8" in chip.flops_per_s]
    has_experts = "num_experts" in published_shapes()[name]["text"]
    return (*found, *(("w8a8sc",) if chip.soc == DUO and not has_experts else ()))


def weights_path(model: ModelSection, quantization: str, ranks: int = 1) -> str:
    """Where the weights of a scheme lie: at the recipe's own place if they are its own, else as config/ has it.

    Compressed weights are made for a number of `ranks`.
    """
    path, name = model.model_path, published_name(model.model_path)
    if quantization == "auto" or name is None:
        return path
    if quantization == "none":
        return path if path.rstrip("/").endswith(name) else f"Qwen/{name}"
    if quantization == "w8a8sc":
        ending = f"-tp{ranks}"
        return path if path.endswith(ending) else f"weights/{name}-{quantization}{ending}"
    return path if model.quantization == quantization else f"weights/{name}-{quantization}"


def recipe_on(base: Recipe, chip: Chip, quantization: str, **scheduler: int | None) -> Recipe:
    """`base` on one rank of a chip, with `quantization`, one of its `precisions`, in the chip's decode mode.

    `scheduler`: sizes in place of those of `base`. The model of `base` stays, its other keys as well.
    """
    model = {
        "model_path": weights_path(base.model, quantization),
        "device": "npu",
        "soc": chip.soc,
        "dtype": "auto",
        "exe_mode": "eager" if chip.soc == DUO else "ge_graph",
        "quantization": quantization,
    }
    alone = {"world_size": 1, "attn_tp_size": None, "moe_ep_size": 1, "vision_parallel": "data"}
    sizes = {"num_blocks": None, "kv_cache_gb": None, "graph_batch_sizes": None, **scheduler}
    return base.replace(model=model, parallel=alone, scheduler=sizes)
