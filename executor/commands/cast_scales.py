"""`python -m executor.commands.cast_scales --model_path A --save_directory B [--to int64|float32] [--plain]`.

A copy of a statically quantized checkpoint whose deq_scale tensors have the other type: models in float16 have them as
int64, models in bfloat16 as float32. Files of weights are written anew: all other tensors keep their bytes, where they
stand in a file may change. Other files are copied as they are, but for the dtype in config.json. Needs no NPU.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from executor.checkpoint.folder import read_json
from executor.checkpoint.headers import Checkpoint, TensorInfo
from executor.checkpoint.parts import part_folders
from executor.checkpoint.writing import (
    CONFIG,
    Entry,
    check_apart,
    computed_entry,
    copied_entry,
    copy_files,
    new_folder,
    read_metadata,
    with_dtype,
    write_json,
    write_safetensors,
)
from executor.commands.tool import Document, ToolParser, checkpoint_folder, run_tool
from executor.errors import UserError
from executor.quant.fields import scale_of_bits

SCALE = "deq_scale"
MODEL_DTYPES = {"int64": "float16", "float32": "bfloat16"}
"""The model's dtype that goes with each type of the scales."""
_MARK = 1 << 46  # npu_trans_quant_param sets it
_KEPT_BITS = 0xFFFFE000  # of a float32 in its encoding: sign, exponent, 10 bits


def bits_of_scale(scale: Tensor, plain: bool) -> Tensor:
    """float32 -> int64, as npu_trans_quant_param packs a scale, or `plain`: its 32 bits as a number."""
    bits = scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return bits if plain else bits & _KEPT_BITS | _MARK


def work(argv: Sequence[str]) -> Document:
    parser = ToolParser(
        "cast_scales",
        "Copy a W8A8 checkpoint with deq_scale tensors of the other type; files of weights are written anew, "
        "all other tensors keep their bytes.",
    )
    parser.add("model_path", required=True, metavar="FOLDER", help="a statically quantized checkpoint (W8A8, W8A8S)")
    parser.add("save_directory", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    parser.add("to", choices=tuple(MODEL_DTYPES), default="int64", help="int64 (the default) for models in float16")
    parser.add("plain", action="store_true", help="int64: all 32 bits, as msmodelslim writes them, not the chips' 19")
    told = parser.parse_args(list(argv))
    if told.plain and told.to != "int64":
        raise UserError("--plain is a form of int64 scales; with --to float32 there is none")
    source, target = checkpoint_folder(told.model_path), Path(told.save_directory).expanduser()
    return cast(source, target, told.to, told.plain)


def cast(source: Path, target: Path, to: str, plain: bool = False) -> Document:
    """Write the copy. Raises UserError for a folder without such scales, or whose scales all have the type already."""
    checkpoints = {folder: Checkpoint(folder) for folder in part_folders(source) or (source,)}
    scales = [info for each in checkpoints.values() for info in each.catalog.values() if is_scale(info)]
    if not scales:
        raise UserError(
            f"--model_path: {source} has no {SCALE} tensors: only static schemes have them (W8A8, W8A8S, W8A8SC, "
            "W8A8_MIX). Other checkpoints run as they are, in either dtype"
        )
    odd = next((info for info in scales if not _is_readable(info)), None)
    if odd is not None:
        raise UserError(f"{odd.file}: '{odd.original_name}' has type {odd.dtype_name}; scales are F32 or I64")
    changed = {(info.file, info.original_name) for info in scales if not _is_cast(info, to, plain)}
    if not changed:
        forms = {"float32": "float32", "int64": "plain int64" if plain else "int64 as npu_trans_quant_param packs them"}
        raise UserError(
            f"--model_path: all {len(scales)} {SCALE} tensors of {source} are {forms[to]} already: nothing to do"
        )
    config = with_dtype(read_json(source, CONFIG), MODEL_DTYPES[to])
    weights = [file.relative_to(source) for each in checkpoints.values() for file in each.files]
    indices = [path.relative_to(source) for folder in checkpoints for path in folder.glob("*.safetensors.index.json")]
    check_apart(source, target)
    with new_folder(target) as staging:
        copy_files(source, staging, lambda name: name not in (*weights, *indices, Path(CONFIG)))
        for folder, checkpoint in checkpoints.items():
            written = staging / folder.relative_to(source)
            written.mkdir(exist_ok=True)
            for file in checkpoint.files:
                held = [info for info in checkpoint.catalog.values() if info.file == file]
                entries = [
                    _cast_entry(info, to, plain) if (file, info.original_name) in changed else copied_entry(info)
                    for info in held
                ]
                write_safetensors(written / file.name, entries, read_metadata(file))
            for index in folder.glob("*.safetensors.index.json"):
                write_json(written / index.name, _resized(read_json(folder, index.name), checkpoint, changed, to))
        write_json(staging / CONFIG, config)
    print(f"{target}: {len(changed)} of {len(scales)} {SCALE} tensors are {to} now, dtype {MODEL_DTYPES[to]}")
    return {"save_directory": str(target), "to": to, "cast": len(changed), "scales": len(scales)}


def is_scale(info: TensorInfo) -> bool:
    return SCALE in info.original_name


def _is_readable(info: TensorInfo) -> bool:
    return info.dtype is not None and (info.dtype is torch.int64 or info.dtype.is_floating_point)


def _is_cast(info: TensorInfo, to: str, plain: bool) -> bool:
    if to == "float32" or info.dtype is not torch.int64:
        return info.dtype is getattr(torch, to)
    packed = _values(info) & _MARK != 0
    return not bool(packed.any()) if plain else bool(packed.all())


def _cast_entry(info: TensorInfo, to: str, plain: bool) -> Entry:
    def values() -> tuple[Tensor]:
        scale = scale_of_bits(_values(info).reshape(-1))
        return (bits_of_scale(scale, plain) if to == "int64" else scale,)

    return computed_entry(info.original_name, getattr(torch, to), info.shape, values)


def _values(info: TensorInfo) -> Tensor:
    with safe_open(info.file, framework="pt") as file:
        return file.get_tensor(info.original_name)


def _resized(index: Document, checkpoint: Checkpoint, changed: set[tuple[Path, str]], to: str) -> Document:
    """The index with the size of the weights as they are now, where it names one."""
    metadata = index.get("metadata")
    if not isinstance(metadata, dict) or "total_size" not in metadata:
        return index
    width = getattr(torch, to).itemsize
    grown = sum(
        info.num_bytes // info.dtype.itemsize * (width - info.dtype.itemsize)
        for info in checkpoint.catalog.values()
        if (info.file, info.original_name) in changed
    )
    return {**index, "metadata": {**metadata, "total_size": checkpoint.total_bytes + grown}}


if __name__ == "__main__":
    sys.exit(run_tool("cast_scales", work))
