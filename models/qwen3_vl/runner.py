"""Qwen3-VL put together for inference: its ranks' groups, its processor, its model, its replica, its decode graphs.

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
from models.qwen3_vl.config import parse
from models.qwen3_vl.model import Model
from models.qwen3_vl.processor import Processor


def connect(recipe: Recipe, device: Ops) -> Parallel:
    """This process's place among the ranks, on the nodes that `IPs` of set_env.sh lists.

    `text`: attn_tp_size neighbouring ranks split heads, dense MLPs and vocabulary. With vision_parallel tp they split
    the encoder as well (`vision`), with data each encodes some of the pictures (`pictures`). The world's other ranks
    are replicas, each with requests of its own. Experts belong to the whole world: moe_ep_size groups of neighbouring
    ranks hold some of them each (`expert_groups`), and the ranks of a group a part of each (`expert_columns`).
    """
    return groups.connect(recipe, device)


def build_processor(folder: Path, options: MediaOptions) -> Processor:
    """From messages to prompts, as this checkpoint was trained."""
    return Processor(folder, options)


def build_model(config: Mapping[str, Any], parallel: Parallel = SINGLE) -> Model:
    """The model of a config.json, its weights uninitialised, on the default device in the default dtype."""
    return Model(parse(config), parallel)


def build_replica(model: Model, parallel: Parallel) -> Replica:
    """How the ranks of a replica keep in step. Replicas of a mixture of experts share them, so they step together."""
    return Replica(parallel, model.visual.cost, shares_experts=model.config.text.moe is not None)


decode_graphs = DecodeGraphs
"""Decode steps as graphs: a row is a token, M-RoPE's three axes are equal, and no step has DeepStack features."""
