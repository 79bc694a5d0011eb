"""What fits: the sizes found are the largest that the memory's own arithmetic allows, and faults say what to change."""

import re

import pytest

from executor.capacity.fits import MOST_SEQUENCES, deployment_on, fewest_ranks, fit, holds_one
from executor.capacity.workload import Workload, asked_workload, picture_grid
from executor.errors import UserError
from executor.recipe.memory import estimate
from executor.recipe.on_paper import settle_on_paper
from executor.recipe.schema import build_recipe

MODEL = "Qwen/Qwen3-VL-8B-Instruct"


def deployed(memory_bytes: int = 64 << 30, path: str = MODEL, world: int = 1, **sections):
    model = {"model_path": path, "device": "npu", "soc": "atlas_800i_a2", **sections.pop("model", {})}
    tree = {"model_config": model, "parallel_config": {"world_size": world, "vision_parallel": "data"}}
    recipe = build_recipe(tree | {f"{name}_config": keys for name, keys in sections.items()})
    return deployment_on(settle_on_paper(recipe, "plan"), memory_bytes)


def test_the_memory_of_what_is_asked_is_that_of_the_recipes_arithmetic():
    deployment = deployed(plan={"users": 4, "pictures": 1, "input_tokens": 100, "output_tokens": 50})
    workload = asked_workload(deployment.paper)
    found = fit(deployment, workload)
    whole = estimate(
        deployment.recipe,
        deployment.paper.shapes,
        64 << 30,
        picture_tokens=deployment.paper.largest_picture_tokens,
    )
    assert workload.request_tokens == 100 + 34 * 60 + 2 + 50
    assert found.memory.num_blocks == 4 * -(-workload.request_tokens // 128)
    assert found.memory.by_part() == whole.by_part() | {"kv_cache": found.memory.kv_bytes}
    assert found.fits and found.faults == ()


@pytest.mark.parametrize("world, memory_gib", [(1, 64), (1, 32), (2, 24), (4, 64)])
def test_the_largest_sizes_fit_and_one_more_does_not(world, memory_gib):
    deployment = deployed(memory_gib << 30, world=world, scheduler={"max_model_len": 8192, "max_num_seqs": 8})
    found = fit(deployment, Workload(4, 1000, 2, (34, 60), 1000))
    full = deployment.blocks(8192)

    def holds(num_blocks: int, **sizes: int) -> bool:
        return deployment.account(num_blocks, **sizes).fits

    assert 0 < found.max_num_seqs < MOST_SEQUENCES
    assert holds(found.max_num_seqs * full, max_num_seqs=found.max_num_seqs)
    assert not holds((found.max_num_seqs + 1) * full, max_num_seqs=found.max_num_seqs + 1)
    length = found.max_model_len
    assert length % 128 == 0 and holds(8 * length // 128, max_model_len=length)
    if length < deployment.paper.shapes.max_position_embeddings:
        assert not holds(8 * (length // 128 + 1), max_model_len=length + 128)
    each = deployment.blocks(found.workload.request_tokens)
    assert holds(found.max_users * each, max_num_seqs=found.max_users)
    assert not holds((found.max_users + 1) * each, max_num_seqs=found.max_users + 1)


def test_more_users_than_the_memory_holds_do_not_fit():
    deployment = deployed(32 << 30, scheduler={"max_num_seqs": 512, "max_model_len": 8192})
    most = fit(deployment, Workload(1, 7000, 0, (1, 1), 1000)).max_users
    found = fit(deployment, Workload(4 * most, 7000, 0, (1, 1), 1000))
    assert not found.fits and not found.memory.fits
    assert re.search(r"GiB more than .* [248] ranks hold it", found.faults[0])


def test_the_ranks_that_are_named_hold_it():
    deployment = deployed(path="Qwen/Qwen2.5-VL-72B-Instruct")
    found = fit(deployment, Workload(4, 1000, 0, (1, 1), 1000))
    named = int(re.search(r"(\d+) ranks hold it", found.faults[-1])[1])
    assert fit(deployment.on_ranks(named), found.workload).fits
    assert not fit(deployment.on_ranks(named // 2), found.workload).fits
    assert found.max_num_seqs == found.max_model_len == found.max_users == 0


@pytest.mark.parametrize(
    "workload, key",
    [
        (Workload(4, 5000, 0, (1, 1), 1000), "max_model_len=6000"),
        (Workload(9, 100, 0, (1, 1), 100), "max_num_seqs=9"),
        (Workload(1, 10**6, 0, (1, 1), 100), "ask for fewer tokens"),
    ],
)
def test_what_goes_beyond_the_recipe_is_said_with_what_to_set(workload, key):
    deployment = deployed(scheduler={"max_model_len": 4096, "max_num_seqs": 8})
    found = fit(deployment, workload)
    assert not found.fits and key in found.faults[0]


def test_what_to_set_makes_it_fit():
    before = {"max_model_len": 4096, "max_num_seqs": 8}
    workload = Workload(9, 5000, 0, (1, 1), 1000)
    faults = " ".join(fit(deployed(scheduler=before), workload).faults)
    after = {key: int(value) for key, value in re.findall(r"--set scheduler_config\.(\w+)=(\d+)", faults)}
    assert after.keys() == before.keys() and fit(deployed(scheduler=after), workload).fits


def test_blocks_that_the_recipe_names_bound_what_it_holds():
    found = fit(deployed(scheduler={"num_blocks": 300}), Workload(16, 2000, 0, (1, 1), 1000))
    assert "num_blocks: the requests take 384 blocks, the recipe has 300" in found.faults[0]


def test_replicas_share_the_users():
    recipe = {"parallel": {"world_size": 4, "attn_tp_size": 2}, "plan": {"users": 7}}
    two = build_recipe(
        {
            "model_config": {"model_path": MODEL, "device": "npu", "soc": "atlas_800i_a2"},
            **{f"{name}_config": keys for name, keys in recipe.items()},
        }
    )
    deployment = deployment_on(settle_on_paper(two, "plan"))
    found = fit(deployment, asked_workload(deployment.paper))
    assert found.memory.num_blocks == 4 * deployment.blocks(2000)
    assert found.max_users % 2 == 0


def test_fewest_ranks_skips_degrees_that_do_not_divide():
    deployment = deployed(path="Qwen/Qwen2.5-VL-7B-Instruct")
    assert deployment.on_ranks(8) is None and deployment.on_ranks(4) is not None
    assert fewest_ranks(deployment, holds_one) == 1
    assert fewest_ranks(deployment, lambda spread: False) is None


@pytest.mark.parametrize(
    "path, size, grid",
    [
        (MODEL, (1920, 1080), (34, 60)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", (1920, 1080), (39, 69)),
        (MODEL, (50, 50), (8, 8)),
    ],
)
def test_a_picture_is_as_large_as_the_processor_makes_it(path, size, grid):
    """The published least and most pixels hold: 50x50 is enlarged to 65,536 pixels."""
    assert picture_grid(deployed(path=path).paper, *size) == grid


def test_pictures_obey_the_recipes_bounds():
    paper = deployed(data={"max_pixels": 32 * 32 * 100}).paper
    rows, columns = picture_grid(paper, 1920, 1080)
    assert rows * columns <= 100 and paper.largest_picture_tokens == 100
    with pytest.raises(UserError, match="one side is"):
        picture_grid(paper, 10_000, 10)


@pytest.mark.parametrize(
    "memory_gib, sizes",
    [(32, {"max_model_len": 262144}), (64, {"num_blocks": 10**9}), (64, {"kv_cache_gb": 1e9})],
)
def test_what_the_start_refuses_does_not_fit(memory_gib, sizes):
    deployment = deployed(memory_gib << 30, scheduler=sizes)
    with pytest.raises(UserError, match="does not fit"):
        estimate(deployment.recipe, deployment.paper.shapes, memory_gib << 30)
    found = fit(deployment, Workload(1, 1000, 0, (1, 1), 1000))
    assert not found.fits and found.faults[0].startswith("start:")


def test_requests_beyond_the_named_cache_do_not_fit():
    deployment = deployed(scheduler={"kv_cache_gb": 5})
    assert "kv_cache_gb" in fit(deployment, Workload(16, 10000, 0, (1, 1), 1000)).faults[0]
