"""The name of compiled graphs changes with everything that they depend on."""

from types import SimpleNamespace

import torch

from executor.commands.build import graph_key
from executor.device.ops import KVLayer
from executor.recipe.schema import build_recipe


def key(shape=(64, 16, 2, 128), dtype=torch.bfloat16, layers=3, config="config", versions=None, **scheduler) -> str:
    recipe = build_recipe({"model_config": {"model_path": "x"}, "scheduler_config": scheduler})
    kv = [KVLayer(*(torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))) for _ in range(layers)]
    step = SimpleNamespace(model=SimpleNamespace(config=config), kv=kv, block_size=shape[1])
    found = {"torch": "2.7.1", "torch_npu": "2.7.1.post2", "torchair": "7.2", "cann": "8.5.0"} | (versions or {})
    return graph_key(recipe, step, SimpleNamespace(versions=lambda: found))


def test_the_key_is_of_the_cache_the_versions_and_the_sizes():
    changed = [
        key(shape=(65, 16, 2, 128)),  # another number of blocks, as another amount of free memory gives
        key(shape=(64, 32, 2, 128)),
        key(shape=(64, 16, 1, 128)),
        key(shape=(64, 16, 2, 64)),
        key(dtype=torch.float16),
        key(dtype=torch.int8),
        key(layers=4),
        key(config="another"),
        key(max_num_seqs=4),
        *(key(versions={name: "another"}) for name in ("torch", "torch_npu", "torchair", "cann")),
    ]
    assert key() == key()
    assert len({key(), *changed}) == 1 + len(changed)
