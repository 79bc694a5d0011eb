"""What is to be compressed: the checkpoint, checked before anything is written, and each rank's share of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from executor.checkpoint.description import Description, read_description
from executor.checkpoint.folder import read_json
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.load import build_on_meta, default_dtype
from executor.checkpoint.part_pulls import WHOLE, Bounds, taken
from executor.checkpoint.parts import part_folders
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.parallel.groups import Group, Parallel
from executor.prompt.options import MediaOptions
from executor.quant.check import weight_faults
from executor.quant.choose import COMPRESSED_TYPE
from executor.recipe.settle import read_folder, tp_faults
from executor.recipe.sizes import ModelShapes
from models.registry import family_runner

SPARSE = "w8a8s"
DTYPE = torch.float16  # the 300I DUO's


@dataclass(frozen=True)
class Job:
    """A W8A8S checkpoint and the number of ranks to compress it for."""

    folder: Path
    size: int
    config: Mapping[str, Any]
    description: Description
    described: Mapping[str, Any]  # the description's entries that are about the whole model
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Share:
    """What one rank takes. `linears`: (n, k) of every weight to compress, by its linear's name."""

    rank: int
    taken: Mapping[str, tuple[tuple[Bounds, ...], ...]]
    linears: Mapping[str, tuple[int, int]]


def open_job(folder: Path, size: int) -> Job:
    """Raises UserError for a folder that is no whole W8A8S checkpoint, or cannot be split over `size` ranks."""
    if part_folders(folder):
        raise UserError(f"--model_path: {folder} is compressed already; give the w8a8s weights it was made of")
    config, label, shapes = read_folder(folder, str(folder))
    description = read_description(folder)
    sparse = [] if description is None else [name for name, kind in description.types.items() if kind == SPARSE.upper()]
    if not sparse or description is None:
        held = f"{label} weights" if label != "none" else "float weights"
        raise UserError(
            f"--model_path: {folder} has {held}; what is compressed are {SPARSE} weights, which a calibration made "
            "sparse for it"
        )
    if all(name.startswith(WHOLE) for name in sparse):
        raise UserError(
            f"--model_path: {folder} has {SPARSE} weights in the vision encoder alone, which is not compressed; run it "
            "as it is"
        )
    check_sizes(folder, size, shapes)
    family_runner(config).build_processor(folder, MediaOptions())  # names files of the tokenizer that are missing
    raw = read_json(description.file.parent, description.file.name)
    described = {key: value for key, value in raw.items() if "." not in key and key not in ("metadata", "optional")}
    return Job(folder, size, config, description, described, Checkpoint(folder))


def check_sizes(folder: Path, size: int, shapes: ModelShapes) -> None:
    """UserError for a model that cannot be compressed for `size` ranks."""
    if shapes.num_experts:
        raise UserError(
            f"--model_path: {folder} is a mixture of experts, and there is no product by compressed experts; run its "
            "quantized weights as they are"
        )
    if faults := tp_faults(size, shapes, "data"):
        works = [degree for degree in range(1, 65) if not tp_faults(degree, shapes, "data")]
        raise UserError(
            f"{shapes.name} cannot be split over {size} ranks: {'; '.join(faults)}. Degrees that work: "
            f"{', '.join(map(str, works))}"
        )


def share_of(job: Job, rank: int, checkpoint: Checkpoint, description: Description) -> Share:
    """The rank's share of the job, by the pulls of the model that is built for it; of `checkpoint`, which may be the
    rank's part, with its `description`. Raises UserError for tensors that are missing, too many or of another form.
    """
    group = Group(rank, job.size)
    parallel = Parallel(text=group, world=group)
    model = build_on_meta(lambda: family_runner(job.config).build_model(job.config, parallel), DTYPE)
    with default_dtype(DTYPE):
        if faults := weight_faults(model, checkpoint, description):
            raise UserError("\n".join(faults))
    linears = {}
    for layer in model.modules():
        sparse = isinstance(layer, Linear) and layer.scheme.name in (SPARSE, COMPRESSED_TYPE.lower())
        if sparse and not layer.prefix.startswith(WHOLE):
            named = layer.share.named(layer.prefix)
            linears |= {name: (part.num_local, layer.share.num_columns) for name, part, _ in named}
    return Share(rank, taken(model.pulls(checkpoint.catalog)), linears)


def config_of(job: Job) -> dict[str, Any]:
    """config.json for the compressed weights, but for its dtype."""
    config = json.loads(json.dumps(job.config))
    return config | ({"quantize": COMPRESSED_TYPE.lower()} if "quantize" in config else {})
