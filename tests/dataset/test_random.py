"""Prompts drawn at random have exactly the tokens that are asked for, and share nothing that is not wanted."""

import io

import numpy as np
import pytest
from PIL import Image

from dataset.load import load_dataset
from dataset.random import ANSWER_TOKENS, NUM_SAMPLES
from executor.errors import UserError
from executor.prompt.options import media_options
from executor.recipe.schema import Recipe, build_recipe
from models.registry import family_runner
from tests.reference import REPO

FAMILIES = {
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", 28),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", 32),
}


def recipe_of(family: str = "qwen3_vl", generation: dict | None = None, **data) -> Recipe:
    tree = {
        "model_config": {"model_path": str(REPO / "models/tiny" / family), "device": "cpu"},
        "data_config": {"dataset": "random", **data},
        "generation_config": generation or {},
    }
    return build_recipe(tree)


def prompt_of(recipe: Recipe, sample):
    """As the engine reads it."""
    family = next(name for name in FAMILIES if recipe.model.model_path.endswith(name))
    runner = family_runner({"architectures": [FAMILIES[family][0]]})
    processor = runner.build_processor(recipe.model.model_path, media_options(recipe))
    return processor.build(list(sample.messages))


def samples_of(recipe: Recipe) -> list:
    return list(load_dataset(recipe.data, recipe))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [60, 1000, 8000])
def test_a_prompt_has_exactly_the_tokens_that_are_asked_for(family, tokens):
    recipe = recipe_of(family, random_tokens=tokens, limit=3)
    for sample in samples_of(recipe):
        assert len(prompt_of(recipe, sample).token_ids) == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_the_system_text_count(family):
    recipe = recipe_of(
        family, random_tokens=400, random_pictures=2, random_picture_size=[300, 200], limit=2, system_prompt="a word"
    )
    for sample in samples_of(recipe):
        prompt = prompt_of(recipe, sample)
        assert len(prompt.token_ids) == 400
        assert len(prompt.media) == 2 and sum(item.num_tokens for item in prompt.media) > 10
        sizes = [Image.open(io.BytesIO(part["image"])).size for part in sample.media_parts]
        assert sizes == [(300, 200)] * 2


@pytest.mark.parametrize(
    "family, tokens, size, picture_tokens",
    [  # the totals that PaddleMIX publishes its times of Qwen2.5-VL for: one picture, and a video's worth
        ("qwen2_5_vl", 997, (1008, 756), 972),
        ("qwen2_5_vl", 2725, (1680, 1260), 2700),
        ("qwen3_vl", 997, (1152, 864), 972),
        ("qwen3_vl", 2725, (1920, 1440), 2700),
    ],
)
def test_the_workloads_of_docs(family, tokens, size, picture_tokens):
    recipe = recipe_of(
        family, random_tokens=tokens, random_pictures=1, random_picture_size=list(size), limit=1,
        min_pixels=1, max_pixels=16777216,
    )  # fmt: skip
    (sample,) = samples_of(recipe)
    prompt = prompt_of(recipe, sample)
    assert len(prompt.token_ids) == tokens
    assert prompt.media[0].num_tokens == picture_tokens


def test_samples_share_nothing_but_the_template():
    recipe = recipe_of(random_tokens=200, random_pictures=1, random_picture_size=[64, 64], limit=6)
    prompts = [prompt_of(recipe, sample) for sample in samples_of(recipe)]
    assert len({item.digest for prompt in prompts for item in prompt.media}) == len(prompts)
    texts = [tuple(sample.question.split()) for sample in samples_of(recipe)]
    for number, first in enumerate(texts):
        for second in texts[number + 1 :]:
            equal = sum(a == b for a, b in zip(first, second, strict=True))
            assert equal < len(first) / 5  # as chance has it, with the tiny vocabulary's few words


def test_a_common_beginning_where_it_is_wanted():
    recipe = recipe_of(random_tokens=200, random_prefix_tokens=150, limit=3)
    prompts = [prompt_of(recipe, sample).token_ids for sample in samples_of(recipe)]
    common = [len(set(column)) == 1 for column in zip(*prompts, strict=True)]
    assert all(common[:150]) and not all(common[160:-5])


def test_a_seed_draws_the_same_and_another_one_something_else():
    def drawn(seed: int) -> list:
        recipe = recipe_of(random_tokens=100, random_pictures=1, random_picture_size=[64, 48], limit=3)
        recipe = recipe.replace(data={"random_seed": seed})
        return [sample.fingerprint() for sample in samples_of(recipe)]

    assert drawn(1) == drawn(1)
    assert not set(drawn(1)) & set(drawn(2))


def test_answers_have_a_length_of_their_own():
    (sample,) = samples_of(recipe_of(random_tokens=100, limit=1))
    assert sample.generation == {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    said = recipe_of(random_tokens=100, limit=1, generation={"max_new_tokens": 7, "ignore_eos": False})
    assert samples_of(said)[0].generation == {}


def test_there_are_as_many_as_the_recipe_says():
    recipe = recipe_of(random_tokens=100)
    assert len(load_dataset(recipe.data, recipe)) == NUM_SAMPLES
    more = recipe_of(random_tokens=100, limit=10_000)  # drawn when they are asked for
    assert load_dataset(more.data, more)[9_999].question


def test_a_picture_of_noise_is_no_even_field():
    (sample,) = samples_of(recipe_of(random_tokens=100, random_pictures=1, random_picture_size=[64, 64], limit=1))
    pixels = np.asarray(Image.open(io.BytesIO(sample.media_parts[0]["image"])))
    assert pixels.shape == (64, 64, 3) and pixels.std() > 20


@pytest.mark.parametrize(
    "data, words",
    [
        ({"random_tokens": 3}, r"random_tokens: got 3; \d+ are taken by the chat template, so that \d+ are the fewest"),
        (
            {"random_tokens": 30, "random_pictures": 2, "random_picture_size": [300, 200]},
            r"got 30; \d+ are taken by the chat template and 2 pictures of 300x200",
        ),
        ({"random_tokens": 100, "random_prefix_tokens": 99}, r"random_prefix_tokens: got 99; .* has \d+ of text"),
        (
            {"random_pictures": 1, "random_picture_size": [3000, 10]},
            "3000x10 pixels: one side is 300.0 times the other",
        ),
    ],
)
def test_what_no_prompt_could_be_is_refused_at_once(data, words):
    recipe = recipe_of(limit=2, **data)
    with pytest.raises(UserError, match=words):
        load_dataset(recipe.data, recipe)
