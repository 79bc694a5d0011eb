"""Which decode graphs a recipe has: one token a row, and lengths that drafts are verified in."""

import pytest

from executor.recipe.graph_sizes import FREE_TOKENS, VERIFY_TOKENS, decode_tokens, graph_shapes, spare_blocks
from executor.recipe.schema import Recipe, build_recipe


def recipe_of(num_drafts: int = 0, exe_mode: str = "ge_graph", **scheduler) -> Recipe:
    speculative = {"method": "ngram", "num_speculative_tokens": num_drafts} if num_drafts else {}
    return build_recipe(
        {
            "model_config": {"model_path": "any/Model", "exe_mode": exe_mode, "kv_cache_dtype": "float"},
            "scheduler_config": {"max_num_seqs": 16} | scheduler,
            "speculative_config": speculative,
        }
    )


def lengths(recipe: Recipe) -> dict[int, list[int]]:
    """Tokens of a row by rows, of the graphs that verify drafts."""
    found: dict[int, list[int]] = {}
    for rows, q_len in graph_shapes(recipe):
        if q_len > 1:
            found.setdefault(rows, []).append(q_len)
    return found


def test_without_drafts_every_row_has_one_token():
    assert graph_shapes(recipe_of()) == ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1))
    assert graph_shapes(recipe_of(graph_batch_sizes=(3,))) == ((3, 1),)
    assert graph_shapes(recipe_of(7, "eager")) == ()


@pytest.mark.parametrize(
    "num_drafts, found",
    [
        (1, {size: [2] for size in (1, 2, 4, 8, 16)}),
        (3, {1: [4], 2: [4], 4: [4], 8: [4], 16: [2, 4]}),
        (5, {1: [6], 2: [6], 4: [6], 8: [4, 6], 16: [2, 4, 6]}),
        (7, {1: [8], 2: [8], 4: [8], 8: [4, 8], 16: [2, 4, 8]}),
        (15, {1: [16], 2: [16], 4: [8, 16], 8: [4, 8, 16], 16: [2, 4, 8]}),  # 16 rows of 16 run eagerly
    ],
)
def test_graphs_that_verify_are_short_where_padding_costs(num_drafts, found):
    recipe = recipe_of(num_drafts)
    assert lengths(recipe) == found
    assert {shape for shape in graph_shapes(recipe) if shape.q_len == 1} == set(graph_shapes(recipe_of()))
    for rows, q_len in graph_shapes(recipe):
        assert q_len in (1, 1 + num_drafts) or FREE_TOKENS <= rows * q_len <= VERIFY_TOKENS


def test_an_int8_cache_has_no_graphs_that_verify():
    assert lengths(recipe_of(7).replace(model={"kv_cache_dtype": "int8"})) == {}


def test_a_step_has_as_many_tokens_as_its_requests_and_their_drafts():
    """What a decode step is, for products that are others in prefill: with drafts, or padded to a graph."""
    assert decode_tokens(recipe_of()) == 16 and decode_tokens(recipe_of(15)) == 256
    assert decode_tokens(recipe_of(3, graph_batch_sizes=(30,))) == 120
    assert spare_blocks(graph_shapes(recipe_of(7)), 16) == 8 and spare_blocks((), 16) == 0
