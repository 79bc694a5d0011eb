"""The finished folder: stages packed into msmodelslim's v1 files, and everything else that a checkpoint needs.

quant_model_weights-0000i-of-0000N.safetensors, quant_model_weights.safetensors.index.json
quant_model_description.json
and all files of the source that are no weights: config.json, tokenizer, templates, processors
"""

import json
from pathlib import Path
from typing import Any

from executor.calibrate.files import put_json, put_tensors, shards
from executor.calibrate.work import Work
from executor.checkpoint.files import DESCRIPTIONS, OTHER_FORMATS
from executor.checkpoint.writing import copied_entry
from executor.errors import UserError

STEM = "quant_model_weights"
SHARD_BYTES = 4 << 30
VERSION = "1.0.0"  # of the description's form
_WEIGHT_FILES = (".safetensors", ".index.json", ".part", ".lock", *OTHER_FORMATS)


def pack(work: Work, num_stages: int, out: Path, model_quant_type: str, metadata: dict[str, Any]) -> None:
    """All stages' tensors as shards, an index and a description. Goes on with what an interrupted call has left."""
    sizes = [_plan(work, out, stage) for stage in range(num_stages)]
    groups = shards([sum(tensors.values()) for tensors in sizes], SHARD_BYTES)
    names = [f"{STEM}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    weight_map: dict[str, str] = {}
    types: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        for stage in group:
            types |= work.stage_kinds(stage)
            weight_map |= dict.fromkeys(work.stage_kinds(stage), name)
        if not work.has_shard(out / name):
            _check_stages(work, group, out / name)
            entries = [copied_entry(info) for stage in group for info in work.stage_tensors(stage)]
            put_tensors(out / name, entries)
            work.keep_shard(out / name)
        for stage in group:
            work.stage_file(stage).unlink(missing_ok=True)
    total = sum(sum(tensors.values()) for tensors in sizes)
    put_json(out / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    head = {
        "version": VERSION,
        "model_quant_type": model_quant_type,
        "metadata": metadata,
        "group_size": 0,
        "optional": {},
    }
    put_json(out / "quant_model_description.json", head | types)


def _check_stages(work: Work, group: list[int], shard: Path) -> None:
    """UserError where the file that they were packed into is gone or was changed."""
    if not all(work.stage_file(stage).is_file() for stage in group):
        raise UserError(
            f"--save_directory: {shard} was finished, and has been changed or removed since; empty {shard.parent} and "
            "start again"
        )


def _plan(work: Work, out: Path, stage: int) -> dict[str, int]:
    """Bytes of a stage's tensors by name; kept beside it, because packing drops its file."""
    plan = work.folder / "stages" / f"{stage:04d}.sizes.json"
    if not plan.is_file():
        put_json(plan, {info.original_name: info.num_bytes for info in work.stage_tensors(stage)})
    return json.loads(plan.read_text())


def is_other_file(name: Path) -> bool:
    """Whether a file of a float checkpoint is no weights and nothing said of them: it goes along as it is."""
    return not name.name.endswith(_WEIGHT_FILES) and not name.match(DESCRIPTIONS)
