"""Which folder here runs which architecture of a config.json. The one place that says so."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from executor.errors import UserError
from executor.recipe.sizes import ModelShapes

FAMILIES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
}


def family_folder(config: Mapping[str, Any], file: str = "config.json") -> str:
    """The folder of the architecture that a config.json names; messages call it `file`. UserError for another one."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list | tuple) and named else named
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"{file} names architecture {architecture}; this release runs {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def parse_config(config: Mapping[str, Any], file: str = "config.json") -> Any:
    """The `Config` of its family: sizes, checked, with `shapes(name)`. UserError names `file` and the key."""
    return importlib.import_module(f"models.{family_folder(config, file)}.config").parse(config, file)


def read_shapes(config: Mapping[str, Any], name: str) -> ModelShapes:
    """The sizes of a config.json. `name` is the model's in messages."""
    return parse_config(config, f"{name}: config.json").shapes(name)


def family_runner(config: Mapping[str, Any]) -> ModuleType:
    """The runner module of a config.json that has been parsed."""
    return importlib.import_module(f"models.{family_folder(config)}.runner")
