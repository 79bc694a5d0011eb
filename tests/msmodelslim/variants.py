"""A quantized folder with something changed: its names, its tensors, its description."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
DESCRIPTION = "quant_model_description.json"


def tensors_of(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("quant_model_weight*.safetensors")):
        found |= load_file(file)
    return found


def variant(
    source: Path,
    to: Path,
    change: Callable[[Tensors, dict], None] = lambda tensors, description: None,
    weights: str = "quant_model_weights.safetensors",
    description: str = DESCRIPTION,
    num_files: int = 1,
    index: str | None = None,
    **config: object,
) -> Path:
    """A copy under other names, `change` having changed tensors and description in place.

    weights: of more than one file with `{}` for its number. config: keys of config.json.
    """
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("quant_model*", "optional"))
    tensors, described = tensors_of(source), json.loads((source / DESCRIPTION).read_text())
    change(tensors, described)
    names = [weights.format(f"{number:05d}-of-{num_files:05d}") for number in range(1, num_files + 1)]
    placed = {name: names[place % num_files] for place, name in enumerate(tensors)}
    for file in names:
        held = {name: x.contiguous() for name, x in tensors.items() if placed[name] == file}
        save_file(held, to / file)
    if index is not None:
        (to / index).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (to / description).write_text(json.dumps(described))
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | config))
    return to
