"""Whether a checkpoint folder is whole and loads here: everything that is wrong with it at once, nothing loaded.

`quantize --check FOLDER` prints it. Reads JSON files, headers, scales, and other small tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.checkpoint.description import Description, read_description
from executor.checkpoint.folder import read_json
from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.part_pulls import open_checkpoint
from executor.checkpoint.parts import part_folders
from executor.checkpoint.settings import read_max_pixels
from executor.commands.tool import Document, checkpoint_folder
from executor.device.table import BACKENDS, DeviceSettings
from executor.errors import UserError
from executor.parallel.groups import Group, Parallel

TOKENIZER = ("tokenizer.json", "vocab.json with merges.txt")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
ORIGINAL = "copy it from the float checkpoint that was quantized: some tools forget it"


@dataclass
class FolderReport:
    """`faults` keep the folder from running here, a line each; `warnings` do not."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kinds: Mapping[str, int] = field(default_factory=dict)  # number of weights by type
    num_tensors: int = 0
    num_bytes: int = 0


def run_check(model_path: str) -> Document:
    """Print what a folder is; the JSON document. Raises UserError with everything that keeps it from running."""
    folder = checkpoint_folder(model_path, flag="--check")
    report = check_folder(folder)
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.faults:
        raise UserError("\n".join(report.faults))
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items()) or "float weights"
    print(f"{folder}: {kinds}; {report.num_tensors} tensors, {report.num_bytes / 1e6:,.1f} MB: complete")
    return {
        "folder": str(folder),
        "types": dict(report.kinds),
        "tensors": report.num_tensors,
        "bytes": report.num_bytes,
        "warnings": report.warnings,
    }


def check_folder(folder: Path, advice: str = ORIGINAL) -> FolderReport:
    """Judge a folder, quantized or not. `advice`: what to do where files beside the weights are missing."""
    report = FolderReport()
    config = _attempt(report, lambda: _config(folder))
    description = _attempt(report, lambda: read_description(folder))
    checkpoints = _attempt(report, lambda: _checkpoints(folder))
    _check_files(folder, config, report, advice)
    if checkpoints is None or config is None:
        return report
    for rank, checkpoint in enumerate(checkpoints):
        report.num_tensors += len(checkpoint.catalog)
        report.num_bytes += checkpoint.total_bytes
        _check_weights(folder, config, checkpoint, description, report, Group(rank, len(checkpoints)))
    return report


def _checkpoints(folder: Path) -> list[Checkpoint]:
    """Every rank's part of compressed weights; of another folder what one rank reads."""
    size = len(part_folders(folder)) or 1
    return [open_checkpoint(folder, rank, size) for rank in range(size)]


def _attempt(report: FolderReport, read: Any) -> Any:
    """What `read` gives; None, and a fault, where it refuses."""
    try:
        return read()
    except UserError as error:
        report.faults += (line for line in str(error).splitlines() if line not in report.faults)
        return None


def _config(folder: Path) -> Mapping[str, Any]:
    from executor.recipe.settle import read_folder

    return read_folder(folder, str(folder))[0]


def _check_files(folder: Path, config: Mapping[str, Any] | None, report: FolderReport, advice: str) -> None:
    """Files beside the weights that every published checkpoint has; then whether a processor is made of them."""

    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    def says(name: str, key: str) -> bool:
        return bool((_attempt(report, lambda: read_json(folder, name, required=False)) or {}).get(key))

    missing = []
    if not has("tokenizer.json") and not has("vocab.json", "merges.txt"):
        missing.append(" or ".join(TOKENIZER))
    if not any(has(name) for name in TEMPLATES) and not any(
        says(name, "chat_template") for name in ("processor_config.json", "tokenizer_config.json")
    ):
        missing.append(" or ".join(TEMPLATES))
    if not has("preprocessor_config.json") and not says("processor_config.json", "image_processor"):
        missing.append("preprocessor_config.json")
    report.faults += (f"{folder}: {name} is missing; {advice}" for name in missing)
    is_qwen3 = config is not None and "qwen3" in str(config.get("model_type", "")).lower()
    if is_qwen3 and not has("video_preprocessor_config.json") and not says("processor_config.json", "video_processor"):
        report.warnings.append(
            f"{folder}: video_preprocessor_config.json is missing: videos get the pictures' sizes; {advice}"
        )
    if not has("generation_config.json"):
        report.warnings.append(f"{folder}: generation_config.json is missing: answers are greedy; {advice}")
    if not missing and _attempt(report, lambda: (read_max_pixels(folder),)) == (None,):
        report.warnings.append(
            f"{folder}: preprocessor_config.json names no sizes of pictures (min_pixels and max_pixels, or size): "
            f"those of the family's class count, as for float weights; {advice}"
        )
    if not missing and config is not None:
        _attempt(report, lambda: _processor(folder, config))


def _processor(folder: Path, config: Mapping[str, Any]) -> Any:
    from executor.prompt.options import MediaOptions
    from models.registry import family_runner

    return family_runner(config).build_processor(folder, MediaOptions())


def _check_weights(
    folder: Path,
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    description: Description | None,
    report: FolderReport,
    group: Group,
) -> None:
    import torch

    from executor.checkpoint.load import build_on_meta
    from executor.device import ops
    from executor.quant.check import described_counts, weight_faults, weight_warnings
    from models.registry import family_runner, parse_config

    ops.bind(BACKENDS["cpu"].open(DeviceSettings("float32")))  # layers ask the device when they take a scheme
    report.kinds = described_counts(description)
    parsed = parse_config(config, f"{folder}/config.json")
    dtype = parsed.dtype.removeprefix("torch.")
    parallel = Parallel(text=group, world=group)
    model = build_on_meta(lambda: family_runner(config).build_model(config, parallel), getattr(torch, dtype))
    report.faults += (fault for fault in weight_faults(model, checkpoint, description) if fault not in report.faults)
    warnings = weight_warnings(model, checkpoint, description, dtype, bool(report.faults))
    report.warnings += (warning for warning in warnings if warning not in report.warnings)
