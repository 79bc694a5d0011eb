"""Who decides how tokens are chosen: request, recipe, checkpoint, greedy defaults, in this order."""

import json
import logging

import pytest

from dataset.options import generation_of
from executor.checkpoint.settings import read_generation_config
from executor.engine.params import check_params
from executor.errors import UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import GenerationSection, build_recipe
from executor.schedule.request import SamplingParams

# As published with Qwen3-VL and Qwen2.5-VL.
QWEN3 = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0}
QWEN2_5 = {"do_sample": True, "temperature": 1e-06, "repetition_penalty": 1.05}


def chosen(checkpoint=None, request=None, **recipe) -> SamplingParams:
    return sampling_params(GenerationSection(**recipe), checkpoint or {}, request)


def test_nobody_says_anything():
    assert chosen() == SamplingParams()


def test_the_checkpoint_speaks_where_nobody_else_does():
    params = chosen(QWEN3)
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 20, 0.8)
    assert chosen(QWEN2_5).repetition_penalty == 1.05


def test_the_recipe_wins_over_the_checkpoint_and_the_request_over_both():
    params = chosen(QWEN3, {"top_k": 5}, top_p=0.5, top_k=7)
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 5, 0.5)
    assert chosen(QWEN3, {"top_k": None}, top_k=7).top_k == 7


def test_temperature_zero_is_greedy_and_leaves_the_penalties():
    params = chosen(QWEN3 | {"repetition_penalty": 1.05}, temperature=0.0)
    assert params == SamplingParams(repetition_penalty=1.05)


def test_a_checkpoint_that_does_not_sample_is_greedy():
    assert chosen({"do_sample": False, "temperature": 0.7, "top_k": 20}) == SamplingParams()
    assert chosen({"temperature": 0.7}) == SamplingParams()
    assert chosen({"do_sample": False}, temperature=0.3).temperature == 0.3


def test_do_sample_of_a_request():
    assert chosen(QWEN3, {"do_sample": False}).temperature == 0
    assert chosen(QWEN3, {"do_sample": False, "temperature": 0.9}).temperature == 0
    assert chosen({}, {"do_sample": True}).temperature == 1.0
    assert chosen(QWEN3, {"do_sample": True}, temperature=0.0).temperature == 0.7
    assert chosen(QWEN3, {"do_sample": True, "temperature": 0.4}).temperature == 0.4


def test_do_sample_of_a_recipe():
    """As transformers and MindIE have it; a request's own temperature or do_sample outranks it."""
    assert chosen(QWEN3, do_sample=False).temperature == 0
    assert chosen(QWEN3, do_sample=False, temperature=0.9).temperature == 0
    assert chosen(QWEN3, {"temperature": 0.4}, do_sample=False).temperature == 0.4
    assert chosen(QWEN3, {"do_sample": True}, do_sample=False).temperature == 0.7
    assert chosen({}, do_sample=True).temperature == 1.0
    assert chosen({}, {"temperature": 0.0}, do_sample=True).temperature == 0


def test_a_sampling_checkpoint_without_a_temperature_samples_at_one():
    assert chosen({"do_sample": True}).temperature == 1.0


def test_old_max_length_is_not_taken_over():
    assert chosen({"max_length": 20}).max_new_tokens == SamplingParams().max_new_tokens
    assert chosen({"max_new_tokens": 77}).max_new_tokens == 77


def test_stops_of_any_form():
    params = chosen({}, {"stop": "END"}, stop_token_ids=[7])
    assert (params.stop, params.stop_token_ids) == (("END",), (7,))
    assert chosen({}, {"stop": ["a", "b"], "stop_token_ids": 3}).stop_token_ids == (3,)


def test_a_narrowing_that_cannot_matter_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        chosen({}, top_p=0.5, min_p=0.1)
    assert "top_p, min_p has no effect at temperature 0" in caplog.text


def test_an_unknown_parameter_is_named():
    with pytest.raises(UserError, match="unknown sampling parameter temprature; known: .*temperature"):
        chosen({}, {"temprature": 1})


ODD = {
    "repetition_penalty": [0, -1.0, 1e300, 1e-300, 1e-7, 1e7],
    "seed": [-1, 1.5, "1"],
    "ignore_eos": ["no", 1],
    "temperature": [-0.1, "hot", float("nan"), float("inf")],
    "top_p": [0, 1.5],
    "min_p": [-0.1, 2],
    "presence_penalty": [-2.5, 3],
    "logprobs": [21, -1],
    "n": [0, 129],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ODD.items() for value in values])
def test_recipes_rows_and_python_refuse_alike(name, value):
    calls = (
        lambda: build_recipe({"model_config": {"model_path": "x"}, "generation_config": {name: value}}),
        lambda: generation_of({"generation_config": {name: value}}),
        lambda: check_params(SamplingParams(**{name: value}), 100),
    )
    for call in calls:
        with pytest.raises(UserError, match=rf"generation_config\.{name}"):
            call()


@pytest.mark.parametrize("penalty, allowed", [(1e-6, True), (1e6, True), (1e300, False), (1e-300, False)])
def test_a_checkpoint_s_penalty_has_the_bounds_of_a_recipe_s(tmp_path, penalty, allowed):
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": penalty}))
    if allowed:
        assert read_generation_config(tmp_path)["repetition_penalty"] == penalty
        check_params(chosen({}, repetition_penalty=penalty), 100)
        return
    with pytest.raises(UserError, match=r"generation_config.json.*repetition_penalty.*from 0\.000001 to 1000000"):
        read_generation_config(tmp_path)
