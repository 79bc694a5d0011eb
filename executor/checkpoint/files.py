"""Which files of a folder hold its weights: those of an index, or one file, or numbered ones that are all there.

Where msmodelslim's description lies in the folder, its weights count (`quant_model_weight*`), in the names of either
generation of the tool; a float model beside them is left. Reads no header: headers.py does.
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from executor.errors import UserError

DESCRIPTIONS = "quant_model_description*.json"
QUANTIZED = "quant_model_weight"
"""How the names of descriptions, and of msmodelslim's weights and their index, look: `quant_model_weights-0000i-of-N`
(its version 1), `quant_model_weight_w8a8`, numbered or not (version 0 and for MindIE)."""
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class WeightFiles:
    """`weight_map`: of the index, tensor name as stored -> file name; None without an index."""

    files: tuple[Path, ...]
    index_file: Path | None
    weight_map: Mapping[str, str] | None
    is_described: bool  # whether msmodelslim's description of quantized weights lies in the folder
    ignored: tuple[Path, ...]  # safetensors beside quantized weights that are not read, in sub-folders too


def find_weights(folder: Path) -> WeightFiles:
    """Raises UserError for a folder without weights, without some of them, or that cannot be read."""
    try:
        return _found_weights(folder)
    except OSError as error:
        raise UserError(unreadable(Path(error.filename or folder), error)) from error


def unreadable(file: Path, error: OSError) -> str:
    """What to do about a file of weights, or a folder, that cannot be opened."""
    if file.is_symlink() and isinstance(error, FileNotFoundError):
        reason = f"a link to {file.readlink()}, which is not there: copy the folder with the files that its links name"
    elif isinstance(error, PermissionError):
        reason = "no permission: let this user read it (chmod, or another owner)"
    elif isinstance(error, IsADirectoryError):
        reason = "a folder, and a file of weights is expected under this name: copy it again from where it came"
    else:
        reason = f"{error.strerror or error}: is the disk sound, and the download complete?"
    return f"{file}: cannot be read: {reason}"


def _found_weights(folder: Path) -> WeightFiles:
    _check_folder(folder)
    if not os.access(folder, os.R_OK | os.X_OK):  # patterns would find nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    has_description = any(folder.glob(DESCRIPTIONS))
    quantized = has_description and any(folder.glob(f"{QUANTIZED}*.safetensors*"))
    index_file = _find_index(folder, quantized)
    weight_map = _read_index(index_file) if index_file else None
    files = _shards_of_folder(folder, quantized) if index_file is None else _shards_of_index(index_file, weight_map)
    lying_here = {*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")} if has_description else set()
    return WeightFiles(tuple(files), index_file, weight_map, has_description, tuple(sorted(lying_here - set(files))))


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"checkpoint folder '{folder}' does not exist; set model_config.model_path to a local folder")
    if not folder.is_dir():
        raise UserError(f"checkpoint '{folder}' is a file; give the folder that holds config.json and *.safetensors")


def _find_index(folder: Path, quantized: bool) -> Path | None:
    usual = folder / "model.safetensors.index.json"
    if usual.exists() and not quantized:
        return usual
    found = sorted(folder.glob(f"{QUANTIZED if quantized else ''}*.safetensors.index.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: more than one index ({names}); keep the one of the weights to load")
    return found[0] if found else None


def _read_index(index_file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index_file}: not an index with a 'weight_map' ({error!r}); download it again") from error
    outside = sorted({file for file in entries.values() if Path(file).name != file})
    if outside:
        raise UserError(f"{index_file}: names '{outside[0]}', which is not a file name in the same folder")
    return entries


def _shards_of_index(index_file: Path, weight_map: Mapping[str, str]) -> list[Path]:
    files = [index_file.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists() and not file.is_symlink()]  # links: when they are read
    _refuse_missing(index_file, missing, len(files))
    return files


def _shards_of_folder(folder: Path, quantized: bool) -> list[Path]:
    single = folder / "model.safetensors"
    pattern = f"{QUANTIZED if quantized else ''}*.safetensors"
    files = [single] if single.exists() and not quantized else sorted(folder.glob(pattern))
    if not files:
        raise UserError(_describe_no_weights(folder))
    names = {file.name for file in files}
    for name in sorted(names):
        numbered = re.fullmatch(r"(.*-)(\d{5})(-of-)(\d{5})(\.safetensors)", name)
        if numbered:
            stem, _, of, count, suffix = numbered.groups()
            wanted = [f"{stem}{number:05d}{of}{count}{suffix}" for number in range(1, int(count) + 1)]
            _refuse_missing(folder, [name for name in wanted if name not in names], len(wanted))
    return files


def _refuse_missing(source: Path, missing: list[str], num_files: int) -> None:
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise UserError(f"{source}: {len(missing)} of {num_files} shards are missing: {shown}; download them again")


def _describe_no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS)
    if others:
        return (
            f"{folder}: no *.safetensors, but '{others[0]}'; only safetensors are read. Convert to safetensors: "
            f"AutoModelForImageTextToText.from_pretrained('{folder}').save_pretrained('NEW_FOLDER') of transformers"
        )
    held = sorted(path.name for path in folder.iterdir())[:8]
    return f"{folder}: no *.safetensors; the folder holds {', '.join(held) or 'nothing'}. Is the download complete?"
