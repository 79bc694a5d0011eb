"""Which folder here runs which architecture of a config.json. The one place that says so."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from executor.checkpoint.model_config import named_architecture
from executor.errors import UserError
from executor.recipe.sizes import ModelShapes

FAMILIES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
}


MODEL_TYPES = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_vl_moe": "qwen3_vl"}
"""The same by model_type, for files whose `architectures` says nothing."""


def family_folder(config: Mapping[str, Any], file: str = "config.json") -> str:
    """The folder of the architecture that a config.json names; messages call it `file`. UserError for another one.

    Where `architectures` is missing or null, model_type counts.
    """
    architecture, model_type = named_architecture(config), config.get("model_type")
    if architecture is None and isinstance(model_type, str) and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    if isinstance(architecture, str) and architecture in FAMILIES:
        return FAMILIES[architecture]
    if architecture is None:
        raise UserError(
            f"{file} names no architecture, and its model_type is {model_type!r}; write the model's own into it, "
            f"architectures: one of {', '.join(FAMILIES)}, or model_type: one of {', '.join(MODEL_TYPES)}"
        )
    raise UserError(f"{file} names architecture {architecture}; this release runs {', '.join(FAMILIES)}")


def parse_config(config: Mapping[str, Any], file: str = "config.json") -> Any:
    """The `Config` of its family: sizes, checked, with `shapes(name)`. UserError names `file` and the key."""
    return importlib.import_module(f"models.{family_folder(config, file)}.config").parse(config, file)


def read_shapes(config: Mapping[str, Any], name: str) -> ModelShapes:
    """The sizes of a config.json. `name` is the model's in messages."""
    return parse_config(config, f"{name}: config.json").shapes(name)


def family_runner(config: Mapping[str, Any]) -> ModuleType:
    """The runner module of a config.json that has been parsed."""
    return importlib.import_module(f"models.{family_folder(config)}.runner")
