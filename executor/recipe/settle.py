"""Everything about a recipe that can be settled before a rank starts: what this release runs, chip rules, degrees,
`auto` values, memory. Each finding is a UserError that says what would work.

`prepare` does it all in order; the pieces are pure functions of recipe and sizes, and read no weights.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.checkpoint.folder import find_checkpoint, read_json
from executor.errors import UserError
from executor.host.env import host_memory_bytes, process_memory_bytes
from executor.recipe.memory import MemoryEstimate, estimate
from executor.recipe.schema import Recipe
from executor.recipe.sizes import ModelShapes, read_shapes

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 32768
SUPPORTED_DEVICES = ("cpu", "npu", "npu_emulated")  # the backends of this release; `auto` without a chip is the first
NPU_DEVICES = ("npu", "npu_emulated")
GRAPH_DEVICES = {"ge_graph": NPU_DEVICES, "npugraph_ex": NPU_DEVICES, "compile": ("cpu", "cuda")}


@dataclass(frozen=True)
class Prepared:
    """A recipe that can start: every `auto` and null of it settled, its checkpoint found and judged.

    `memory` is for printing before the weights are loaded.
    """

    recipe: Recipe
    folder: Path
    shapes: ModelShapes
    memory: MemoryEstimate
    picture_tokens: int | None  # of the largest picture that the settings let through, None: they name no bound
    config: dict[str, Any] = field(repr=False)  # config.json
    generation_config: dict[str, Any] = field(repr=False)  # generation_config.json, {} without one


def prepare(recipe: Recipe, local_ranks: int = 1) -> Prepared:
    """Settle and check everything about `recipe` but its data. A settled recipe comes back as it is.

    `local_ranks` share this machine's memory. Logs the values it settles. Raises UserError for what cannot start.
    """
    check_chip(recipe)
    recipe = resolve_device(recipe)
    check_supported(recipe)
    folder = find_checkpoint(recipe.model.model_path, recipe.model.hub)
    config = read_json(folder, "config.json")
    shapes = read_shapes(config, recipe.model.model_path)
    recipe = resolve(recipe, shapes, quantization=find_quantization(folder, config))
    check_supported(recipe)  # once more: the checkpoint may have brought a scheme
    check_recipe(recipe, shapes)
    picture_tokens = largest_picture_tokens(recipe, shapes, folder)
    process_bytes = process_memory_bytes() if recipe.model.device != "npu" else 0
    memory = estimate(
        recipe,
        shapes,
        host_memory_bytes() // local_ranks,
        picture_tokens=picture_tokens,
        process_bytes=process_bytes,
    )
    generation_config = read_json(folder, "generation_config.json", required=False)
    return Prepared(recipe, folder, shapes, memory, picture_tokens, config, generation_config)


def largest_picture_tokens(recipe: Recipe, shapes: ModelShapes, folder: Path) -> int | None:
    """Visual tokens of the largest picture: by the recipe's max_pixels, else the checkpoint's."""
    found = recipe.data.max_pixels
    if found is None:
        section = read_json(folder, "preprocessor_config.json", required=False)
        sizes = section.get("size")
        sizes = sizes if isinstance(sizes, dict) else {}
        found = section.get("max_pixels") or sizes.get("longest_edge") or sizes.get("max_pixels")
    token_pixels = (shapes.vision.patch_size * shapes.vision.merge_size) ** 2
    # What is no number is refused where pictures are prepared.
    return max(1, found // token_pixels) if isinstance(found, int) and found > 0 else None


def check_supported(recipe: Recipe) -> None:
    """Refuse what the schema knows and this release cannot start yet. The one place that decides it."""
    model = recipe.model
    if model.device not in (*SUPPORTED_DEVICES, "auto"):
        raise UserError(
            f"model_config.device: the {model.device} backend is not part of this release yet; device: cpu runs "
            f"everywhere. Try:  {_that_runs(recipe)}"
        )
    if model.device == "npu" and not has_torch_npu():
        raise UserError(
            "model_config.device: npu needs torch_npu beside torch, and it is not installed in this environment: use "
            "the interpreter of the Ascend host (PYTHON=...), or pip install the torch_npu of your torch and CANN "
            "(python -m executor.commands.doctor says which). device: npu_emulated runs the same code on this CPU; "
            f"device: cpu is fast. Try:  {_that_runs(recipe)}"
        )
    if model.exe_mode == "compile":
        raise UserError(
            f"model_config.exe_mode: {model.exe_mode} is not part of this release yet; eager is. "
            f"Try:  {_that_runs(recipe)}"
        )
    if model.quantization not in ("auto", "none"):
        raise UserError(
            f"model_config.quantization: {model.quantization} weights are not part of this release yet; "
            "use the float checkpoint of the same model"
        )


def _has_graphs(recipe: Recipe) -> bool:
    """Whether the recipe's device has its decode mode."""
    return recipe.model.device in GRAPH_DEVICES.get(recipe.model.exe_mode, ())


def has_torch_npu() -> bool:
    """Whether torch_npu is installed; it is not imported."""
    return importlib.util.find_spec("torch_npu") is not None


def _that_runs(recipe: Recipe) -> str:
    """The overrides that make the recipe one for this release, on its NPU where there is one, else on the CPU."""
    device = recipe.model.device
    stays = device == "npu_emulated" or device == "npu" and has_torch_npu()
    changes = {"model_config.device=cpu": not stays and device != "cpu"}
    changes["model_config.soc=null"] = not stays and recipe.model.soc is not None
    changes["model_config.exe_mode=eager"] = recipe.model.exe_mode != "eager" and not (stays and _has_graphs(recipe))
    changes["model_config.dtype=auto"] = not stays and recipe.model.dtype == "float16"
    changes["parallel_config.world_size=1"] = not stays and recipe.parallel.world_size > 1
    changes["parallel_config.attn_tp_size=1"] = not stays and (recipe.parallel.attn_tp_size or 1) > 1
    changes["parallel_config.moe_ep_size=1"] = not stays and recipe.parallel.moe_ep_size > 1
    return " ".join(f"--set {change}" for change, needed in changes.items() if needed)


def check_chip(recipe: Recipe) -> None:
    """Refuse what contradicts itself on a chip: types, decode modes and schemes it does not have."""
    model = recipe.model
    if model.soc and model.device not in ("auto", *NPU_DEVICES):
        elsewhere = f", or on this machine:  {_that_runs(recipe)}" if model.device == "cpu" else ""
        raise UserError(
            f"model_config.soc: {model.soc} is an NPU, but device is {model.device}; set device: npu{elsewhere}"
        )
    if model.device == "npu_emulated" and not model.soc:
        raise UserError("model_config.soc: npu_emulated needs a chip: atlas_800i_a2, atlas_800i_a3 or atlas_300i_duo")
    devices = GRAPH_DEVICES.get(model.exe_mode)
    if devices and model.device not in (*devices, "auto"):
        raise UserError(
            f"model_config.exe_mode: {model.exe_mode} is for device {' or '.join(devices)}, "
            f"but device is {model.device}; set exe_mode: eager"
        )
    if model.device in NPU_DEVICES and model.dtype == "float32" and model.soc != "atlas_300i_duo":
        raise UserError(
            "model_config.dtype: attention on NPUs computes in bfloat16 or float16, got float32; set dtype: bfloat16"
        )
    if model.soc == "atlas_300i_duo":
        if model.dtype not in ("auto", "float16"):
            raise UserError(f"model_config.dtype: atlas_300i_duo computes in float16 only, got {model.dtype}")
        if model.exe_mode != "eager":
            raise UserError(f"model_config.exe_mode: atlas_300i_duo decodes eagerly only, got {model.exe_mode}")
    elif model.quantization == "w8a8sc" and model.soc:
        raise UserError(
            f"model_config.quantization: w8a8sc weights are unpacked by atlas_300i_duo only, got soc {model.soc}; "
            "use w8a8 weights"
        )


def resolve_device(recipe: Recipe) -> Recipe:
    """Settle `device: auto`: the chip that is named, else the best backend of this release."""
    if recipe.model.device != "auto":
        return recipe
    device = "npu" if recipe.model.soc else SUPPORTED_DEVICES[0]
    logger.info("device: auto is %s", device)
    return recipe.replace(model={"device": device})


def find_quantization(folder: Path, config: dict[str, Any]) -> str:
    """The scheme the checkpoint's own files name, `none` for float weights."""
    for path in sorted(folder.glob("quant_model_description*.json")):
        named = str(read_json(folder, path.name).get("model_quant_type", "FLOAT")).lower()
        return "none" if named == "float" else named
    quantized = config.get("quantization_config")
    return str(quantized.get("quant_method", "unknown")).lower() if isinstance(quantized, dict) else "none"


def resolve(recipe: Recipe, shapes: ModelShapes, quantization: str = "none") -> Recipe:
    """The recipe with every `auto` and null that the checkpoint settles filled in, and logged.

    `quantization` is what the checkpoint says of itself. Raises UserError for a scheme the recipe contradicts, or a
    context longer than the model was made for.
    """
    model, scheduler = recipe.model, recipe.scheduler
    settled: dict[str, dict[str, Any]] = {"model": {}, "parallel": {}, "scheduler": {}}
    if model.dtype == "auto":
        own = shapes.dtype.removeprefix("torch.")
        if own == "float32" and model.device in NPU_DEVICES:
            own = "bfloat16"
        settled["model"]["dtype"] = "float16" if model.soc == "atlas_300i_duo" else own
    if model.quantization == "auto":
        settled["model"]["quantization"] = quantization
    elif model.quantization != quantization:
        raise UserError(
            f"model_config.quantization: the recipe says {model.quantization}, the checkpoint {model.model_path} is "
            f"{quantization}; set quantization: auto, or give the other checkpoint"
        )
    if recipe.parallel.attn_tp_size is None:
        settled["parallel"]["attn_tp_size"] = recipe.parallel.world_size
    if scheduler.max_model_len is None:
        settled["scheduler"]["max_model_len"] = min(DEFAULT_MAX_MODEL_LEN, shapes.max_position_embeddings)
    elif scheduler.max_model_len > shapes.max_position_embeddings:
        raise UserError(
            f"scheduler_config.max_model_len: got {scheduler.max_model_len}; {shapes.name} was made for at most "
            f"{shapes.max_position_embeddings} tokens"
        )
    if not scheduler.enable_chunked_prefill:
        longest = scheduler.max_model_len or settled["scheduler"]["max_model_len"]
        if scheduler.max_num_batched_tokens < longest:
            raise UserError(
                f"scheduler_config.max_num_batched_tokens: got {scheduler.max_num_batched_tokens}; without chunked "
                f"prefill a prompt is one step, so it must be at least max_model_len ({longest})"
            )
    values = ", ".join(f"{key} {value}" for part in settled.values() for key, value in part.items())
    if values:
        logger.info("settled by the checkpoint: %s", values)
    return recipe.replace(**{section: fields for section, fields in settled.items() if fields})


def check_recipe(recipe: Recipe, shapes: ModelShapes) -> None:
    """Refuse degrees that do not divide the model's sizes, naming those that do."""
    check_chip(recipe)
    world, tp, ep = recipe.parallel.world_size, recipe.attn_tp_size, recipe.parallel.moe_ep_size
    if world % tp:
        raise UserError(
            f"parallel_config.attn_tp_size: got {tp} in a world of {world}; it must divide world_size: "
            f"{_join(d for d in range(1, world + 1) if world % d == 0)}"
        )
    faults = tp_faults(tp, shapes, recipe.parallel.vision_parallel)
    if faults:
        working = _working(lambda degree: not tp_faults(degree, shapes, recipe.parallel.vision_parallel))
        hint = ""
        if recipe.parallel.vision_parallel == "tp" and not tp_faults(tp, shapes, "data"):
            hint = "; with parallel_config.vision_parallel: data it would work"
        raise UserError(
            f"parallel_config.attn_tp_size: {shapes.name} cannot be split over {tp} ranks: {'; '.join(faults)}. "
            f"Degrees that work: {working}{hint}"
        )
    if ep > 1 and not shapes.num_experts:
        raise UserError(f"parallel_config.moe_ep_size: got {ep}, but {shapes.name} has no experts; set it to 1")
    if shapes.num_experts and ep_faults(ep, world, shapes):
        working = _working(lambda degree: not ep_faults(degree, world, shapes))
        raise UserError(
            f"parallel_config.moe_ep_size: the experts of {shapes.name} cannot be dealt to {ep} groups of a world of "
            f"{world}: {'; '.join(ep_faults(ep, world, shapes))}. Degrees that work: {working}"
        )


def tp_faults(degree: int, shapes: ModelShapes, vision_parallel: str) -> list[str]:
    """What keeps attention, MLP, vocabulary (and vision under `tp`) from being split over `degree` ranks."""
    sizes = {"query heads": shapes.num_heads, "vocabulary": shapes.vocab_size}
    if not shapes.num_experts or shapes.num_dense_layers:
        sizes["intermediate size"] = shapes.intermediate_size
    if vision_parallel == "tp":
        sizes["vision heads"] = shapes.vision.num_heads
        sizes["vision intermediate size"] = shapes.vision.intermediate_size
    faults = [f"{size} {name} do not divide by {degree}" for name, size in sizes.items() if size % degree]
    if shapes.num_kv_heads % degree and degree % shapes.num_kv_heads:
        faults.append(f"{shapes.num_kv_heads} KV heads neither divide by {degree} nor into it")
    return faults


def ep_faults(degree: int, world: int, shapes: ModelShapes) -> list[str]:
    """What keeps the experts from being dealt to `degree` groups, each split over world / degree ranks."""
    if world % degree:
        return [f"{degree} does not divide the world"]
    faults = []
    if shapes.num_experts % degree:
        faults.append(f"{shapes.num_experts} experts do not divide by {degree}")
    if shapes.expert_intermediate_size % (world // degree):
        faults.append(f"expert size {shapes.expert_intermediate_size} does not divide by {world // degree}")
    return faults


def _working(works: Callable[[int], bool]) -> str:
    return _join(degree for degree in range(1, 65) if works(degree))


def _join(numbers: Any) -> str:
    return ", ".join(str(number) for number in numbers)
