"""All ten real sizes build on the meta device from their true config, with the published parameter count."""

from typing import Any

import pytest
import torch

from executor.checkpoint.load import build_on_meta
from executor.checkpoint.pull import local_bytes
from executor.checkpoint.weights import check_complete
from executor.parallel.groups import SINGLE, groups
from models.published import published_config, published_shapes
from models.registry import family_runner

SHAPES = published_shapes()


def build(name: str, parallel: Any) -> torch.nn.Module:
    config = published_config(name)
    family = family_runner(config)
    return build_on_meta(lambda: family.build_model(config, parallel), torch.bfloat16)


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_is_the_published_one(name):
    model = build(name, SINGLE)
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["parameters"]
    assert sum(p.numel() for p in model.visual.parameters()) == SHAPES[name]["vision_parameters"]


@pytest.mark.parametrize("name", SHAPES)
def test_pulls_cover_every_parameter_exactly_once(name):
    model = build(name, SINGLE)
    check_complete(model, model.pulls({}))


@pytest.mark.parametrize(
    "name, degree",
    [
        ("Qwen2.5-VL-3B-Instruct", 4),
        ("Qwen2.5-VL-7B-Instruct", 4),
        ("Qwen3-VL-2B-Instruct", 8),
        ("Qwen3-VL-30B-A3B-Instruct", 8),
    ],
)
def test_ranks_share_the_weights(name, degree):
    """Every rank's share is complete, and the ranks' linears together are the whole model, KV heads apart."""
    shape = SHAPES[name]
    total = 0
    for rank in range(degree):
        parallel = groups(degree, degree, 1, "data", rank, new_group=lambda ranks, buffer_mb: None)
        model = build(name, parallel)
        pulls = list(model.pulls({}))
        check_complete(model, pulls)
        total += local_bytes(pulls)
    text, vision = shape["text"], shape["vision_parameters"]
    sharded = 2 * (shape["parameters"] - vision)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    copies = max(1, degree // text["num_key_value_heads"]) - 1
    extra_kv = 2 * 2 * copies * text["num_key_value_heads"] * head_dim * text["num_hidden_layers"]
    extra_kv *= text["hidden_size"] + (0 if "head_dim" in text else 1)
    per_layer = 2 * text["hidden_size"] + (2 * text["head_dim"] if "head_dim" in text else 0)
    per_layer += text.get("num_experts", 0) * text["hidden_size"]
    replicated = 2 * (degree - 1) * (text["num_hidden_layers"] * per_layer + text["hidden_size"])
    assert total == sharded + 2 * vision * degree + extra_kv + replicated
