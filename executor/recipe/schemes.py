"""What the schemes of weights ask of a device: the recipe's word, and the types that the checkpoint's folder holds.

A folder may hold several types (attention W8A8, experts W8A8_DYNAMIC): the device must have each of them. The recipe's
word may be the folder's label or any type inside; `auto` is the usual case and takes the label.
"""

from collections.abc import Collection, Mapping
from typing import get_args

from executor.device.table import BACKENDS, having
from executor.quant.sizes import MADE_AT_LOAD
from executor.recipe.schema import ModelSection, Quantization
from models.published import published_name

READ = tuple(word for word in get_args(Quantization) if word not in ("auto", "none", *MADE_AT_LOAD))
"""Types that checkpoints are read in, in the recipe's words."""


def has_scheme(device: str, word: str) -> bool:
    """Whether the device has the scheme; of one that is not known here, or still open, whether any device has."""
    return word in BACKENDS[device].quantization if device in BACKENDS else bool(having("quantization", word))


def word_findings(model: ModelSection) -> list[str]:
    """What the recipe's own word asks for and its device does not have."""
    word = model.quantization
    return [] if word == "auto" or has_scheme(model.device, word) else [_lacking(model, f"{word} weights", word)]


def type_findings(model: ModelSection, types: Mapping[str, str]) -> list[str]:
    """Types of the folder (lower case, each with the name of a weight that has it) that the device does not have."""
    findings = []
    for kind, weight in sorted(types.items()):
        if kind not in READ:
            findings.append(
                f"model_config.model_path: {weight} of {model.model_path} is {kind.upper()}, which this project does "
                f"not read; it reads {', '.join(READ)}. Use the float checkpoint of the same model:  "
                f"{float_twin(model)}"
            )
        elif not has_scheme(model.device, kind) and kind != model.quantization:
            findings.append(_lacking(model, f"{kind} weights ({weight} of {model.model_path})", kind))
    return findings


def agrees(word: str, label: str, types: Collection[str]) -> bool:
    """Whether a recipe's word fits a folder that calls itself `label` and holds `types`."""
    return word == label or word in types or (word in MADE_AT_LOAD and label == "none")


def disagreement(model: ModelSection, label: str, types: Collection[str]) -> str:
    """The finding for a word that does not fit the folder."""
    held = ", ".join(sorted(types))
    holds = f" (it holds {held})" if held and held != label else ""
    if model.quantization in MADE_AT_LOAD:
        what = f"{model.quantization} is made of float weights, and the checkpoint {model.model_path} is {label}"
    else:
        what = f"the recipe says {model.quantization}, the checkpoint {model.model_path} is {label}"
    if label == "none":
        return (
            f"model_config.quantization: {what}: its weights are float; set quantization: auto, or give the folder of "
            "quantized weights (python -m executor.commands.quantize makes one)"
        )
    return f"model_config.quantization: {what}{holds}; set quantization: auto, or give the other checkpoint"


def float_twin(model: ModelSection) -> str:
    """The overrides that take the float checkpoint of a quantized one, found by the published name."""
    folder = model.model_path.rstrip("/").rpartition("/")[2]
    name = published_name(folder)
    path = f"--set model_config.model_path=Qwen/{name} " if name and folder != name else ""
    return f"{path}--set model_config.quantization=auto"


def _lacking(model: ModelSection, what: str, word: str) -> str:
    where = having("quantization", word)
    if not where or model.device not in BACKENDS:
        runs = f"{what} are not part of this release yet"
    else:
        runs = f"{what} do not run on {model.device}; they run on {', '.join(where)}"
    if word == "w8a8sc":
        return f"model_config.quantization: {runs}; use the w8a8s weights that they were compressed from"
    return f"model_config.quantization: {runs}; use the float checkpoint of the same model:  {float_twin(model)}"
