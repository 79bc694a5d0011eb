"""Whether a model's weights fit what its layers take: by headers, the description, scales, and other small tensors.

What loading refuses, and what other programs that read the same folder stumble over. Builds no model. Of weights it
reads those of four bits that stand one to a byte; executor/commands/check_folder.py does the folder around it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from executor.checkpoint.description import FLOAT_TYPE, Description
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.load import in_files
from executor.checkpoint.pull import Pull
from executor.checkpoint.strangers import check_unread, named
from executor.checkpoint.weights import converted, is_small_float, pull_faults
from executor.device.weights import DynamicInt4
from executor.errors import UserError, folded
from executor.layers.linear import Linear
from executor.layers.moe import Experts
from executor.quant.choose import choose_cache, choose_schemes
from executor.quant.fields import EACH, FieldScheme
from executor.quant.kv_cache import OFFSET
from executor.quant.values import shortest


def weight_faults(model: nn.Module, checkpoint: Checkpoint, description: Description | None) -> list[str]:
    """What keeps `model`, built without memory, from taking the weights. Hands its layers their schemes."""
    try:
        with torch.device("meta"):
            left = choose_schemes(model, checkpoint.catalog, description)
            left += choose_cache(model, checkpoint.catalog, description, int8=True)
            pulls = in_files(model.pulls(checkpoint.catalog), checkpoint)
    except UserError as error:
        return folded(str(error).splitlines())
    faults = pull_faults(pulls, checkpoint)
    ignore = [*left, *(("lm_head.weight",) if model.config.tie_word_embeddings else ())]
    try:
        check_unread(pulls, checkpoint, ignore)
    except UserError as error:
        faults.append(str(error))
    if not faults:  # shapes and types are what they should be
        faults += _values(pulls, checkpoint)
    if not faults and description is not None:
        faults += _inputs_that_differ(model, checkpoint)
    return folded(faults)


def weight_warnings(
    model: nn.Module, checkpoint: Checkpoint, description: Description | None, dtype: str, has_faults: bool
) -> Iterator[str]:
    """What is read here, and deserves a word. `model`: one that `weight_faults` has seen; `dtype`: config.json's."""
    if description is None:
        return
    yield from _limits(model)
    wanted = torch.int64 if dtype == "float16" else torch.float32
    scales = [name for name in checkpoint.catalog if name.endswith(".deq_scale")]
    odd = [name for name in scales if checkpoint.catalog[name].dtype in {torch.int64, torch.float32} - {wanted}]
    if odd:
        yield (
            f"{named(odd)} have type {checkpoint.catalog[odd[0]].dtype_name} in a {dtype} model. Both kinds are read "
            f"here; kernels that are handed them as they are give zeros where a {dtype} model does not have "
            f"{str(wanted).removeprefix('torch.')}. To convert: python -m executor.commands.cast_scales"
        )
    missing = _asked(model, checkpoint)
    absent = [name for name in description.types if name not in checkpoint.catalog and name not in missing]
    if absent:
        unasked = "" if has_faults else "; nothing asks for them"
        yield f"{description.file.name}: {named(absent)} are described and not in the files{unasked}"
    cache_offsets = [name for name in checkpoint.catalog if name.endswith(f".{OFFSET}")]
    shifted = [name for name, x in _read(cache_offsets, checkpoint).items() if bool(x.any())]
    if shifted:
        yield (
            f"{named(shifted)} are not zero: a CPU reads them, NPUs take an int8 KV cache with symmetric scales only "
            "(or model_config.kv_cache_dtype: float)"
        )
    if checkpoint.ignored:
        files = ", ".join(file.relative_to(checkpoint.folder).as_posix() for file in checkpoint.ignored)
        yield f"beside the quantized weights, and not read: {files}"


def _asked(model: nn.Module, checkpoint: Checkpoint) -> set[str]:
    """Names that the model asks for: those of them that are missing are faults."""
    try:
        return {pull.name for pull in model.pulls(checkpoint.catalog)}
    except UserError:  # a fault, too
        return set()


def _limits(model: nn.Module) -> Iterator[str]:
    """Weights that a CPU takes, and NPUs or some numbers of ranks do not."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear | Experts)]
    for size in sorted({size for layer in layers for size in layer.scheme.group_sizes.values()}):
        names = [layer.prefix for layer in layers if size in layer.scheme.group_sizes.values()]
        yield (
            f"{named(names, 'layers')} have scales for groups of {size} inputs: the CPU takes them, and Atlas 800I A2 "
            "and A3 where the size is a multiple of 32; the 300I DUO takes none, and ranks can only split between "
            "groups. By channel they run everywhere"
        )
    narrow = [layer.prefix for layer in layers if isinstance(layer, Linear) and layer.scheme.form is DynamicInt4]
    if narrow:
        yield (
            f"{named(narrow, 'layers')} outside of experts are W4A8_DYNAMIC: the CPU takes them, NPUs have no product "
            "by them. Quantize all but the experts as W8A8_DYNAMIC to run there"
        )


def _inputs_that_differ(model: nn.Module, checkpoint: Checkpoint) -> Iterator[str]:
    """Parts of one multiplication that were calibrated apart: they read the same activations."""
    for layer in model.modules():
        if not isinstance(layer, Linear) or not isinstance(layer.scheme, FieldScheme):
            continue
        parts = list(dict.fromkeys(name for name, _, _ in layer.share.named(layer.prefix)))
        for field in layer.scheme.fields:
            if field.dims != (EACH,) or len(parts) < 2:
                continue
            found = _read([f"{part}.{field.suffix}" for part in parts], checkpoint)
            values = {name: float(x.flatten()[0]) for name, x in found.items()}
            if len(set(values.values())) > 1:
                told = ", ".join(f"{name} {shortest(value)}" for name, value in values.items())
                yield (
                    f"{field.suffix} of linears that are multiplied together differ: {told}; they read the same "
                    "activations and were calibrated apart. Quantize the model again, all of them in one run"
                )


def _values(pulls: Iterable[Pull], checkpoint: Checkpoint) -> Iterator[str]:
    """Values that loading refuses: of scales, offsets and small float tensors. Reads what the pulls ask of those."""
    by_file: dict[Path, list[Pull]] = defaultdict(list)
    for pull in pulls:
        info = checkpoint.catalog[pull.name]
        if pull.into.numel() and (pull.judged or is_small_float(info)):
            by_file[info.file].append(pull)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as mapped:
            for pull in wanted:
                info = checkpoint.catalog[pull.name]
                if info.shape:
                    part = mapped.get_slice(info.original_name)[pull.file_index]
                else:
                    part = mapped.get_tensor(info.original_name)
                try:
                    converted(part, pull, info)
                except UserError as error:
                    yield str(error)


def _read(names: Iterable[str], checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Small tensors, by name."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[checkpoint.catalog[name].file].append(name)
    found = {}
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as mapped:
            for name in wanted:
                found[name] = mapped.get_tensor(checkpoint.catalog[name].original_name)
    return found


def described_counts(description: Description | None) -> dict[str, int]:
    """How many weights there are of each type."""
    return (
        {} if description is None else dict(sorted(description.kinds.items(), key=lambda item: item[0] == FLOAT_TYPE))
    )
