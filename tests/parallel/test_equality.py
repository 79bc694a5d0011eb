"""Greedy tokens of every degree are those of one rank, over processes that torchrun starts; collectives counted."""

from typing import Any

import pytest

from tests.cases import mostly_long
from tests.parallel.jobs import case, run_ranks

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
LAYERS = 3  # of each tiny model

# name -> family, degrees, collectives of a decode step
TWO_RANKS = {
    **{f"{family}_tp2": (family, {}, 2 * LAYERS + 2) for family in FAMILIES},
    **{f"{family}_vision_data": (family, {"vision_parallel": "data"}, 2 * LAYERS + 2) for family in FAMILIES},
    "prompts_scored": ("qwen2_5_vl", {"prompt_logprobs": 1}, 2 * LAYERS + 2),
    "dense_replicas": ("qwen2_5_vl", {"attn_tp_size": 1}, 0),
    "moe_ep2": ("qwen3_vl_moe", {"moe_ep_size": 2}, 2 * LAYERS + 2),
    "moe_dp2_ep2": ("qwen3_vl_moe", {"moe_ep_size": 2, "attn_tp_size": 1}, 2 * LAYERS),
    "moe_dp2_tp_experts": ("qwen3_vl_moe", {"attn_tp_size": 1}, 2 * LAYERS),
    "drafts_tp2": ("qwen2_5_vl", {"num_drafts": 7}, 2 * LAYERS + 2),
    "drafts_moe_dp2_ep2": ("qwen3_vl_moe", {"num_drafts": 7, "moe_ep_size": 2, "attn_tp_size": 1}, 2 * LAYERS),
}
# With a draft model, beside the case without: the leader alone runs it, in none of the model's collectives.
DRAFTING = {
    "draft_tp2": ("qwen3_vl", {"num_drafts": 7, "draft": "qwen3_vl"}, "qwen3_vl_tp2"),
    "draft_dense_replicas": (
        "qwen2_5_vl",
        {"attn_tp_size": 1, "num_drafts": 7, "draft": "qwen2_5_vl"},
        "dense_replicas",
    ),
    "draft_moe_ep2": ("qwen3_vl_moe", {"moe_ep_size": 2, "num_drafts": 7, "draft": "qwen3_vl_moe"}, "moe_ep2"),
    "draft_moe_dp2_ep2": (
        "qwen3_vl_moe",
        {"moe_ep_size": 2, "attn_tp_size": 1, "num_drafts": 7, "draft": "qwen3_vl_moe"},
        "moe_dp2_ep2",
    ),
}
TWO_RANKS |= {name: (family, degrees, TWO_RANKS[twin][2]) for name, (family, degrees, twin) in DRAFTING.items()}
# And the tokens' broadcast, in a step whose tokens the host has not read, where a replica has several ranks.
OVERLAPPED = {
    "tp2": ("qwen3_vl", {"overlaps": True}, 2 * LAYERS + 2),
    "moe_dp2_ep2": ("qwen3_vl_moe", {"overlaps": True, "moe_ep_size": 2, "attn_tp_size": 1}, 2 * LAYERS),
}
# The tiny encoders have two heads: four ranks take whole pictures.
FOUR_RANKS = {
    **{f"{family}_tp4": (family, {"vision_parallel": "data"}, 2 * LAYERS + 2) for family in FAMILIES},
    **{f"{family}_dp2_tp2": (family, {"attn_tp_size": 2}, 2 * LAYERS + 2) for family in FAMILIES[:2]},
    "moe_tp4_ep4": ("qwen3_vl_moe", {"moe_ep_size": 4, "vision_parallel": "data"}, 2 * LAYERS + 2),
    "moe_dp2_tp2_ep1": ("qwen3_vl_moe", {"attn_tp_size": 2}, 3 * LAYERS + 2),
    "moe_dp2_tp2_ep2": ("qwen3_vl_moe", {"attn_tp_size": 2, "moe_ep_size": 2}, 3 * LAYERS + 2),
    "moe_dp2_tp2_ep4": ("qwen3_vl_moe", {"attn_tp_size": 2, "moe_ep_size": 4}, 3 * LAYERS + 2),
    "moe_dp4_ep4": ("qwen3_vl_moe", {"attn_tp_size": 1, "moe_ep_size": 4}, 2 * LAYERS),
}
# Two families less of what four ranks do with every family; drafts with degrees that a case beside them has.
TWO_ALWAYS = [
    name
    for name in TWO_RANKS
    if name not in ("qwen3_vl_vision_data", "qwen3_vl_moe_vision_data", "draft_dense_replicas", "draft_moe_ep2")
]
DRAFTING_ALWAYS = [name for name in DRAFTING if name in TWO_ALWAYS]
# Each number of groups of experts once, and each family.
FOUR_ALWAYS = ["qwen2_5_vl_tp4", "qwen3_vl_dp2_tp2", *(name for name in FOUR_RANKS if name.startswith("moe_"))]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Found:
    found = run_ranks(1, [case(family, prompt_logprobs=1) for family in FAMILIES], tmp_path_factory.mktemp("one"))
    return dict(zip(FAMILIES, found, strict=True))


def _asked(request: pytest.FixtureRequest, cases: dict[str, tuple[str, dict[str, Any], int]]) -> dict[str, Any]:
    """Those of the cases that some chosen test is about, and what it compares them with."""
    names = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names |= {DRAFTING[name][2] for name in names if name in DRAFTING}
    return {name: each for name, each in cases.items() if name in names}


def _run(size: int, cases: dict[str, tuple[str, dict[str, Any], int]], folder: Any) -> Found:
    found = run_ranks(size, [case(family, size, **degrees) for family, degrees, _ in cases.values()], folder)
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def two(request, tmp_path_factory) -> Found:
    return _run(2, _asked(request, TWO_RANKS), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(request, tmp_path_factory) -> Found:
    return _run(4, _asked(request, FOUR_RANKS), tmp_path_factory.mktemp("four"))


def _check(found: dict[str, Any], wanted: dict[str, Any], num_ranks: int, collectives: int) -> None:
    _check_answers(found, wanted, num_ranks)
    assert found["steps"] and {count for count, *_ in found["steps"]} == {collectives}


def _check_answers(found: dict[str, Any], wanted: dict[str, Any], num_ranks: int) -> None:
    assert found["status"] == wanted["status"] == 0
    assert found["answers"] == wanted["answers"]
    assert found["token_ids"] == wanted["token_ids"]
    assert all(len(ids) == 40 for ids in found["token_ids"])
    for ours, theirs in zip(found["logprobs"], wanted["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for prompt, scores in found["prompt_logprobs"].items():
        assert scores == pytest.approx(wanted["prompt_logprobs"][prompt], abs=1e-4) and len(scores) > 10
    assert len(found["loads"]) == num_ranks
    for read, estimated, _ in found["loads"]:
        assert read <= 1.05 * estimated / 2, "the files hold bfloat16, the estimate is of float32"


@pytest.mark.parametrize("name", mostly_long(TWO_RANKS, TWO_ALWAYS))
def test_two_ranks(name, two, alone) -> None:
    family, _, collectives = TWO_RANKS[name]
    _check(two[name], alone[family], 2, collectives)
    assert any(num_drafts for *_, num_drafts, _, _ in two[name]["steps"]) == name.startswith("draft")
    assert bool(two[name]["prompt_logprobs"]) == (name == "prompts_scored")


@pytest.mark.parametrize("name", mostly_long(DRAFTING, DRAFTING_ALWAYS))
def test_a_draft_model_saves_steps(name, two) -> None:
    """It is the model itself, and right: each step of a request yields eight tokens."""
    _, _, twin = DRAFTING[name]
    assert len(two[name]["steps"]) < len(two[twin]["steps"]) / 4


def test_two_ranks_whose_next_step_is_queued_before_the_tokens_are_read(tmp_path, alone) -> None:
    for name, found in _run(2, OVERLAPPED, tmp_path).items():
        family, _, collectives = OVERLAPPED[name]
        _check_answers(found, alone[family], 2)
        num_more = int(name == "tp2")
        for count, *_, continues in found["steps"]:
            assert count == collectives + continues * num_more
        assert 2 * sum(continues for *_, continues in found["steps"]) > len(found["steps"])


@pytest.mark.parametrize("name", mostly_long(FOUR_RANKS, FOUR_ALWAYS))
def test_four_ranks(name, four, alone) -> None:
    family, _, collectives = FOUR_RANKS[name]
    _check(four[name], alone[family], 4, collectives)
