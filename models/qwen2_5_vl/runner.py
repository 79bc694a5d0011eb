"""Qwen2.5-VL put together for inference: its ranks' groups, its processor, its model, its replica, its decode graphs.

executor.commands.build calls these in this order and joins what they return with a scheduler, a sampler and a KV cache;
between build_model and build_replica it reads the weights that the model asks for. A runner of your own is a module
with the same names: README.md shows one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.device.ops import Ops
from executor.engine.graphs import DecodeGraphs
from executor.engine.replica import Replica
from executor.parallel import groups
from executor.parallel.groups import SINGLE, Parallel
from executor.prompt.options import MediaOptions
from executor.recipe.schema import Recipe
from models.qwen2_5_vl.config import parse
from models.qwen2_5_vl.model import Model
from models.qwen2_5_vl.processor import Processor


def connect(recipe: Recipe, device: Ops) -> Parallel:
    """This process's place among the ranks, on the nodes that `IPs` of set_env.sh lists.

    `text`: attn_tp_size neighbouring ranks split heads, MLPs and vocabulary. With vision_parallel tp they split the
    encoder as well (`vision`), with data each encodes some of the pictures (`pictures`). The world's other ranks are
    replicas, each with requests of its own. A dense model asks for no groups of experts.
    """
    return groups.connect(recipe, device)


def build_processor(folder: Path, options: MediaOptions) -> Processor:
    """From messages to prompts, as this checkpoint was trained."""
    return Processor(folder, options)


def build_model(config: Mapping[str, Any], parallel: Parallel = SINGLE) -> Model:
    """The model of a config.json, its weights uninitialised, on the default device in the default dtype."""
    return Model(parse(config), parallel)


def build_replica(model: Model, parallel: Parallel) -> Replica:
    """How the ranks of a replica keep in step. Pictures are dealt out by what their windows cost."""
    return Replica(parallel, model.visual.cost, shares_experts=False)


decode_graphs = DecodeGraphs
"""Decode steps as graphs: a row is a token, M-RoPE's three axes are equal, and no step sees a picture."""
