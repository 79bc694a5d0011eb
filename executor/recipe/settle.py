"""Everything about a recipe that can be settled before a rank starts: what this release runs, chip rules, degrees,
`auto` values, memory. Each finding is a UserError that says what would work.

`prepare` does it all in order and tells everything it finds at once; the pieces are pure functions of recipe and sizes,
and read no weights.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.checkpoint.description import Description, read_description
from executor.checkpoint.folder import find_checkpoint, is_hub_id, local_checkpoint, read_json
from executor.checkpoint.foreign import find_quantization, refuse_adapter
from executor.checkpoint.generation import read_generation_config
from executor.checkpoint.head import settle_head
from executor.checkpoint.parts import size_finding
from executor.checkpoint.settings import read_max_pixels
from executor.checkpoint.stored import StoredSizes, read_sizes
from executor.device.table import BACKENDS, CHIP_BYTES, having, named
from executor.errors import UserError
from executor.host.limits import host_memory_bytes, process_memory_bytes
from executor.recipe.device import compute_bytes, copies_head
from executor.recipe.disk_cache import disk_cache_findings, root_findings
from executor.recipe.draft import (
    Draft,
    draft_recipe,
    folder_findings,
    of_draft,
    section_findings,
    size_findings,
    weight_findings,
)
from executor.recipe.kv_cache import cache_findings, has_cache_scales, scales_finding
from executor.recipe.memory import MemoryEstimate, estimate
from executor.recipe.schema import Recipe
from executor.recipe.schemes import agrees, disagreement, float_twin, has_scheme, type_findings, word_findings
from executor.recipe.sizes import ModelShapes
from executor.recipe.unused import warn_of_unused
from models.registry import parse_config, read_shapes

logger = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 32768
NPU_DEVICES = named(npu=True)
GRAPH_DEVICES = {mode: having("exe_modes", mode) for mode in ("ge_graph", "npugraph_ex")}


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
    config: Mapping[str, Any] = field(repr=False)  # config.json, with a tie_word_embeddings that the weights bear out
    generation_config: dict[str, Any] = field(repr=False)  # generation_config.json, {} without one
    description: Description | None = field(default=None, repr=False)  # of quantized weights
    stored: StoredSizes | None = field(default=None, repr=False)  # theirs
    draft: Draft | None = None


def prepare(recipe: Recipe, local_ranks: int = 1) -> Prepared:
    """Settle and check everything about `recipe` but its data. A settled recipe comes back as it is.

    `local_ranks` share this machine's memory. Logs the values it settles. Raises one UserError with everything that
    keeps it from starting and can be known at once, a line each; what the device must be there for comes last.
    """
    recipe = resolve_device(recipe)
    warn_of_unused(recipe)
    findings = [*chip_findings(recipe), *release_findings(recipe), *section_findings(recipe.speculative)]
    findings += root_findings(recipe.scheduler.prefix_cache_path)
    missing = device_finding(recipe)
    found, draft = _checkpoint(recipe, findings, may_download=not missing), None
    if found:
        folder, config, quantization, shapes, description = found
        types = description.samples if description else {}
        findings += type_findings(recipe.model, types)
        try:
            recipe = resolve(recipe, shapes, quantization, types, has_cache_scales(description))
            findings += chip_findings(recipe)  # once more: the checkpoint may have brought a type or a scheme
        except UserError as error:
            findings.append(str(error))
        findings += degree_findings(recipe, shapes)
        compressed = size_finding(folder, quantization == "w8a8sc", recipe.attn_tp_size)
        findings += [compressed] if compressed else []
        draft = _draft(recipe, folder, shapes, findings, may_download=not missing)
        missing = [finding + _too_large_for_cpu(recipe, shapes) for finding in missing]
    refuse([*findings, *missing])
    assert found, "without a checkpoint there is a finding"
    picture_tokens = largest_picture_tokens(recipe, shapes, folder)
    size = compute_bytes(recipe)  # first: asking a CPU loads what the process holds from then on
    process_bytes = process_memory_bytes() if recipe.model.device != "npu" else 0
    stored = read_sizes(folder, shapes.tied_embeddings) if description else None
    memory = estimate(
        recipe,
        shapes,
        _memory_bytes(recipe, local_ranks),
        size,
        picture_tokens=picture_tokens,
        process_bytes=process_bytes,
        copies_head=copies_head(recipe),
        stored=stored,
        draft=draft,
    )
    generation_config = read_generation_config(folder)
    return Prepared(
        recipe, folder, shapes, memory, picture_tokens, config, generation_config, description, stored, draft
    )


def _draft(recipe: Recipe, folder: Path, shapes: ModelShapes, findings: list[str], may_download: bool) -> Draft | None:
    """The draft model of a recipe that has one, settled and judged beside the recipe's own in `folder`.

    None, and findings, where it cannot draft, or where the recipe is not settled.
    """
    if recipe.speculative.method != "draft" or recipe.speculative.model_path is None or findings:
        return None
    found = _checkpoint(draft_recipe(recipe), findings, may_download)
    if not found:
        findings[:] = map(of_draft, findings)
        return None
    draft_folder, config, quantization, draft_shapes, description = found
    alone, types = draft_recipe(recipe, quantization), description.samples if description else {}
    faults = [*size_findings(shapes, draft_shapes), *map(of_draft, type_findings(alone.model, types))]
    try:
        alone = resolve(alone, draft_shapes, quantization, types, has_cache_scales(description))
        faults += chip_findings(alone)
    except UserError as error:
        faults.append(of_draft(str(error)))
    faults = faults or folder_findings(folder, draft_folder, draft_shapes.name)
    findings += faults or weight_findings(draft_folder)
    stored = read_sizes(draft_folder, draft_shapes.tied_embeddings) if description else None
    return Draft(alone, draft_shapes, config, draft_folder, description, stored)


def _memory_bytes(recipe: Recipe, local_ranks: int) -> int:
    """What one rank may take before its device is open: a share of the host's memory, or a chip's as sold."""
    if recipe.model.device == "npu":
        return CHIP_BYTES[recipe.model.soc] if recipe.model.soc else max(CHIP_BYTES.values())
    return host_memory_bytes() // local_ranks


def largest_picture_tokens(recipe: Recipe, shapes: ModelShapes, folder: Path) -> int | None:
    """Visual tokens of the largest picture: by the recipe's max_pixels, else the checkpoint's."""
    found = recipe.data.max_pixels or read_max_pixels(folder)
    token_pixels = (shapes.vision.patch_size * shapes.vision.merge_size) ** 2
    return max(1, found // token_pixels) if found else None


def refuse(findings: Sequence[str]) -> None:
    """UserError with all findings, each once; nothing where there are none."""
    if findings:
        raise UserError("\n".join(dict.fromkeys(findings)))


def _checkpoint(
    recipe: Recipe, findings: list[str], may_download: bool
) -> tuple[Path, Mapping[str, Any], str, ModelShapes, Description | None] | None:
    """The checkpoint's folder, its config.json, its scheme, sizes and description of quantized weights.

    None, and a finding, where there is no such checkpoint.

    Nothing is downloaded for a recipe that cannot start.
    """
    path, hub = recipe.model.model_path, recipe.model.hub
    may_download = may_download and not findings
    try:
        folder = find_checkpoint(path, hub) if may_download or not is_hub_id(path) else local_checkpoint(path, hub)
        if folder is None:
            return None
        return folder, *read_folder(folder, path), read_description(folder)
    except UserError as error:
        word = recipe.model.quantization
        made = word not in ("auto", "none", "wint8") and "there is no folder" in str(error)
        findings.append(f"{error}{f'; docs/quantization.md says how {word} weights are made' if made else ''}")
        return None


def read_folder(folder: Path, name: str) -> tuple[Mapping[str, Any], str, ModelShapes]:
    """A checkpoint folder's config.json with its head settled, its quantization, and its sizes, known as `name`.

    Raises UserError for what is no model of this release: adapters, other quantizers' folders, odd values.
    """
    refuse_adapter(folder)
    config = read_json(folder, "config.json")
    quantization = find_quantization(folder, config)
    parsed = parse_config(config, f"{name}: config.json")
    for key in parsed.text.rope.unused:  # said here: the file is parsed more than once
        logger.warning("%s/config.json: %s is not used: its rope_type, or none, means default", folder, key)
    config = settle_head(folder, config, parsed.tie_word_embeddings)
    return config, quantization, read_shapes(config, name)


def release_findings(recipe: Recipe) -> list[str]:
    """What the schema knows and this release cannot start yet. The one place that decides it."""
    model, findings = recipe.model, []
    if model.device not in (*BACKENDS, "auto"):
        findings.append(
            f"model_config.device: the {model.device} backend is not part of this release yet; device: cpu runs "
            f"everywhere. Try:  {_that_runs(recipe)}"
        )
    return findings + word_findings(model)


def device_finding(recipe: Recipe) -> list[str]:
    """What this machine lacks for the recipe's device; looked for last, as it hides nothing that is wrong anywhere."""
    if recipe.model.device != "npu" or has_torch_npu():
        return []
    return [
        "model_config.device: npu needs torch_npu beside torch, and it is not installed in this environment: use "
        "the interpreter of the Ascend host (PYTHON=...), or pip install the torch_npu of your torch and CANN "
        "(python -m executor.commands.doctor says which). device: npu_emulated runs the same code on this CPU; "
        f"device: cpu is fast. Try:  {_that_runs(recipe)}"
    ]


def _too_large_for_cpu(recipe: Recipe, shapes: ModelShapes) -> str:
    """A warning where the advice to take the CPU would lead to another refusal, for want of memory."""
    alone = {"world_size": 1, "attn_tp_size": 1, "moe_ep_size": 1}
    scheme = recipe.model.quantization
    scheme = scheme if scheme != "auto" and has_scheme("cpu", scheme) else "none"
    model = {"device": "cpu", "soc": None, "dtype": "auto", "exe_mode": "eager", "quantization": scheme}
    try:
        resolved = resolve(recipe.replace(model=model, parallel=alone), shapes, scheme, (scheme,))
        estimate(resolved, shapes, host_memory_bytes())
    except UserError:
        return f"  (but {shapes.name} is too large for this machine's memory as it is: a smaller model, or an NPU)"
    return ""


def _has_graphs(recipe: Recipe) -> bool:
    """Whether the recipe's device has its decode mode."""
    return recipe.model.device in GRAPH_DEVICES.get(recipe.model.exe_mode, ())


def has_torch_npu() -> bool:
    """Whether torch_npu is installed; it is not imported."""
    return BACKENDS["npu"].is_installed


def _that_runs(recipe: Recipe) -> str:
    """The overrides that make the recipe one for this release, on its NPU where there is one, else on the CPU."""
    model = recipe.model
    stays = model.device == "npu_emulated" or model.device == "npu" and has_torch_npu()
    changes = {"model_config.device=cpu": not stays and model.device != "cpu"}
    changes["model_config.soc=null"] = not stays and model.soc is not None
    changes["model_config.exe_mode=eager"] = model.exe_mode != "eager" and not (stays and _has_graphs(recipe))
    changes["model_config.dtype=auto"] = not stays and model.dtype == "float16"
    changes["parallel_config.world_size=1"] = not stays and recipe.parallel.world_size > 1
    changes["parallel_config.attn_tp_size=1"] = not stays and (recipe.parallel.attn_tp_size or 1) > 1
    changes["parallel_config.moe_ep_size=1"] = not stays and recipe.parallel.moe_ep_size > 1
    lacks = not has_scheme(model.device if stays else "cpu", model.quantization)
    twin = [float_twin(model)] if model.quantization != "auto" and lacks else []
    return " ".join([*(f"--set {change}" for change, needed in changes.items() if needed), *twin])


def check_chip(recipe: Recipe) -> None:
    """Refuse what contradicts itself on a chip."""
    refuse(chip_findings(recipe))


def chip_findings(recipe: Recipe) -> list[str]:
    """What contradicts itself on a chip: types, decode modes and schemes it does not have."""
    model, findings = recipe.model, []
    on_npu = model.device in NPU_DEVICES
    if model.soc and model.device not in ("auto", *NPU_DEVICES):
        here = f"on this machine:  {_that_runs(recipe)}" if model.device == "cpu" else "model_config.soc: null"
        npu = f"set device: npu, or {here}" if has_torch_npu() else f"set device: npu on an Ascend host, or {here}"
        findings.append(f"model_config.soc: {model.soc} is an NPU, but device is {model.device}; {npu}")
    if model.device == "npu_emulated" and not model.soc:
        findings.append("model_config.soc: npu_emulated needs a chip: atlas_800i_a2, atlas_800i_a3 or atlas_300i_duo")
    devices = GRAPH_DEVICES.get(model.exe_mode)
    if devices and model.device not in (*devices, "auto"):
        findings.append(
            f"model_config.exe_mode: {model.exe_mode} is for device {' or '.join(devices)}, "
            f"but device is {model.device}; set exe_mode: eager"
        )
    types = BACKENDS[model.device].dtypes if on_npu else ()
    if types and model.dtype not in ("auto", *types) and model.soc != "atlas_300i_duo":
        findings.append(
            "model_config.dtype: attention on NPUs computes in bfloat16 or float16, got float32; set dtype: bfloat16"
        )
    if model.soc == "atlas_300i_duo":
        if model.dtype not in ("auto", "float16"):
            findings.append(
                f"model_config.dtype: atlas_300i_duo computes in float16 only, got {model.dtype}; set dtype: auto"
            )
        if model.exe_mode != "eager" and (not devices or on_npu or model.device == "auto"):
            findings.append(
                f"model_config.exe_mode: atlas_300i_duo decodes eagerly only, got {model.exe_mode}; set exe_mode: eager"
            )
    elif model.quantization == "w8a8sc" and model.soc:
        findings.append(
            f"model_config.quantization: w8a8sc weights are unpacked by atlas_300i_duo only, got soc {model.soc}; "
            "use w8a8 weights"
        )
    return findings + cache_findings(recipe)


def resolve_device(recipe: Recipe) -> Recipe:
    """Settle `device: auto`: the chip that is named, else the best backend of this release."""
    if recipe.model.device != "auto":
        return recipe
    device = "npu" if recipe.model.soc else next(iter(BACKENDS))
    logger.info("device: auto is %s", device)
    return recipe.replace(model={"device": device})


def resolve(
    recipe: Recipe,
    shapes: ModelShapes,
    quantization: str = "none",
    types: Collection[str] = (),
    has_scales: bool = False,
) -> Recipe:
    """The recipe with every `auto` and null that the checkpoint settles filled in, and logged.

    `quantization` is what the checkpoint says of itself, `types` what its weights have (both in the recipe's words),
    `has_scales` whether it has those of an int8 KV cache. Raises UserError for a scheme the recipe contradicts, or a
    context longer than the model was made for.
    """
    model, scheduler = recipe.model, recipe.scheduler
    settled: dict[str, dict[str, Any]] = {"model": {}, "parallel": {}, "scheduler": {}}
    if model.dtype == "auto":
        own = shapes.dtype.removeprefix("torch.")
        if own == "float32" and model.device in NPU_DEVICES:
            own = "bfloat16"
        settled["model"]["dtype"] = "float16" if model.soc == "atlas_300i_duo" else own
    findings = []
    if model.quantization == "auto":
        settled["model"]["quantization"] = quantization
    elif not agrees(model.quantization, quantization, types):
        findings.append(disagreement(model, quantization, types))
    if model.kv_cache_dtype == "auto":
        settled["model"]["kv_cache_dtype"] = "int8" if has_scales else "float"
    findings += scales_finding(model, has_scales)
    if recipe.parallel.attn_tp_size is None:
        settled["parallel"]["attn_tp_size"] = recipe.parallel.world_size
    if scheduler.max_model_len is None:
        settled["scheduler"]["max_model_len"] = min(DEFAULT_MAX_MODEL_LEN, shapes.max_position_embeddings)
    refuse([*findings, *_size_findings(recipe, shapes, settled["scheduler"].get("max_model_len"))])
    values = ", ".join(f"{key} {value}" for part in settled.values() for key, value in part.items())
    if values:
        logger.info("settled by the checkpoint %s: %s", shapes.name, values)
    return recipe.replace(**{section: fields for section, fields in settled.items() if fields})


def _size_findings(recipe: Recipe, shapes: ModelShapes, default_len: int | None) -> list[str]:
    """Sizes of a step and of the cache that contradict the model or one another."""
    scheduler, findings = recipe.scheduler, []
    longest = scheduler.max_model_len or default_len
    if longest > shapes.max_position_embeddings:
        findings.append(
            f"scheduler_config.max_model_len: got {scheduler.max_model_len}; {shapes.name} was made for at most "
            f"{shapes.max_position_embeddings} tokens"
        )
    if not scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < longest:
        findings.append(
            f"scheduler_config.max_num_batched_tokens: got {scheduler.max_num_batched_tokens}; without chunked "
            f"prefill a prompt is one step, so it must be at least max_model_len ({longest})"
        )
    findings += disk_cache_findings(recipe)
    if scheduler.kv_cache_gb is not None and scheduler.num_blocks is not None:
        findings.append(
            f"scheduler_config.kv_cache_gb: got {scheduler.kv_cache_gb:g} beside num_blocks {scheduler.num_blocks}; "
            "both give the size of the KV cache: set one of them to null"
        )
    return findings


def check_recipe(recipe: Recipe, shapes: ModelShapes) -> None:
    """Refuse what contradicts itself on a chip, and degrees that do not divide the model's sizes."""
    refuse([*chip_findings(recipe), *degree_findings(recipe, shapes)])


def degree_findings(recipe: Recipe, shapes: ModelShapes) -> list[str]:
    """Degrees that do not divide the model's sizes, or one another, each with those that would work."""
    world, tp, ep = recipe.parallel.world_size, recipe.attn_tp_size, recipe.parallel.moe_ep_size
    vision, findings = recipe.parallel.vision_parallel, []

    def divides(degree: int) -> bool:
        return not tp_faults(degree, shapes, vision)

    in_world = [degree for degree in range(1, world + 1) if world % degree == 0 and divides(degree)]
    if world % tp:
        findings.append(
            f"parallel_config.attn_tp_size: got {tp} in a world of {world}; it must divide world_size and the sizes of "
            f"{shapes.name}: {_join(in_world)}"
        )
    elif not divides(tp):
        hint = f"; attn_tp_size in this world of {world}: {_join(in_world)}"
        if vision == "tp" and not tp_faults(tp, shapes, "data"):
            hint += "; with parallel_config.vision_parallel: data it would work"
        findings.append(
            f"parallel_config.attn_tp_size: {shapes.name} cannot be split over {tp} ranks: "
            f"{'; '.join(tp_faults(tp, shapes, vision))}. Degrees that work: {_working(divides)}{hint}"
        )
    if ep > 1 and not shapes.num_experts:
        findings.append(f"parallel_config.moe_ep_size: got {ep}, but {shapes.name} has no experts; set it to 1")
    if shapes.num_experts and ep_faults(ep, world, shapes):
        working = _working(lambda degree: not ep_faults(degree, world, shapes))
        why = "; ".join(ep_faults(ep, world, shapes))
        findings.append(
            f"parallel_config.moe_ep_size: the experts of {shapes.name} cannot be dealt to {ep} groups of a world of "
            f"{world}: {why}. "
            + (f"Degrees that work: {working}" if working else "No degree works in this world: change world_size")
        )
    return findings


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
