"""Qwen3-VL for the applications: its model and its processor, by the two names every family's runner has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.parallel.groups import SINGLE, Parallel
from executor.prompt.options import MediaOptions
from models.qwen3_vl.config import parse
from models.qwen3_vl.model import Model
from models.qwen3_vl.processor import Processor


def build_model(config: Mapping[str, Any], parallel: Parallel = SINGLE) -> Model:
    """The model of a config.json, its weights uninitialised, on the default device in the default dtype."""
    return Model(parse(config), parallel)


def build_processor(folder: Path, options: MediaOptions) -> Processor:
    """From messages to prompts, as this checkpoint was trained."""
    return Processor(folder, options)
