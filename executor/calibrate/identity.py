"""Which quantization this is: everything that decides its bytes, so that none goes on with what another one began."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from executor.calibrate.settings import Settings
from executor.checkpoint.weights import Checkpoint
from executor.checkpoint.writing import files_below
from executor.device.ops import Ops
from executor.host.env import code_digest

Identity = Mapping[str, Any]
"""settings: by name. files: digest of each that is copied, by its path. The others: a text, or a digest, each."""

_WORDS = {
    "weights": "other weights",
    "calibration": "another calibration set",
    "device": "another device or version of torch",
    "code": "another version of this program",
}


def identity(
    settings: Settings, checkpoint: Checkpoint, is_copied: Callable[[Path], bool], calibration: str, device: Ops
) -> Identity:
    """`calibration`: its fingerprint. `is_copied`: of files beside the weights, those that the result has too."""
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    tensors = [(name, info.shape, info.dtype_name) for name, info in checkpoint.catalog.items()]
    return {
        "settings": asdict(settings),
        "weights": hashlib.sha256(repr((weights, tensors)).encode()).hexdigest(),
        "files": {
            name.as_posix(): hashlib.sha256((checkpoint.folder / name).read_bytes()).hexdigest()
            for name in files_below(checkpoint.folder, is_copied)
        },
        "calibration": calibration,
        "device": computed_on(device),
        "code": code_digest(),
    }


def computed_on(device: Ops) -> str:
    """What decides the last bits of a product: the backend, the chip, torch and the instructions that it uses."""
    chip = getattr(device, "soc", None)
    words = [type(device).__name__, device.device.type, *(() if chip is None else (chip.name,))]
    return " ".join((*words, f"torch {torch.__version__}", torch.backends.cpu.get_cpu_capability()))


def differences(before: Identity, now: Identity) -> str:
    """What of them differs, in words; empty where they are one."""
    found = []
    for part, words in (("settings", "other settings"), ("files", "other files of the checkpoint")):
        held, given = before.get(part, {}), now[part]
        changed = sorted(name for name in {*held, *given} if held.get(name) != given.get(name))
        if changed:
            found.append(f"{words} ({', '.join(changed)})")
    found += (words for part, words in _WORDS.items() if before.get(part) != now[part])
    return ", ".join(found)
