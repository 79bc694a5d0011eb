"""What the schema refuses, and that every refusal says what, got and allowed; what overrides do."""

import pytest

from executor.config import Recipe, build_recipe, load_recipe
from executor.errors import UserError

MINIMAL = {"model_config": {"model_path": "somewhere"}}


def refusal(tree: dict) -> str:
    with pytest.raises(UserError) as error:
        build_recipe(tree, "mine.yaml")
    return str(error.value)


def with_value(section: str, key: str, value: object) -> dict:
    return MINIMAL | {section: MINIMAL.get(section, {}) | {key: value}}


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_minimal_recipe_has_the_documented_defaults():
    recipe = build_recipe(MINIMAL)
    assert recipe.model.device == "auto"
    assert recipe.attn_tp_size == recipe.parallel.world_size == 1
    assert recipe.scheduler.block_size == 128
    assert set(recipe.generation.model_dump(exclude={"draw"}).values()) == {None}


def test_a_recipe_does_not_change():
    recipe = build_recipe(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.device = "cpu"
    changed = recipe.replace(model={"device": "cpu"})
    assert (recipe.model.device, changed.model.device) == ("auto", "cpu")


def test_every_field_is_documented():
    for section in Recipe.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"model_config": {"model_pth": "x"}}, ["unknown key 'model_pth'", "did you mean 'model_path'?", "mine.yaml"]),
        ({}, ["model_config", "model_path"]),
        ({"model_config": {}}, ["model_config.model_path is missing", "Folder of the checkpoint"]),
        ({"model_config": None}, ["model_config.model_path is missing"]),
        (MINIMAL | {"modle_config": {}}, ["unknown section 'modle_config'", "did you mean 'model_config'?"]),
        (MINIMAL | {"temperature": 1.0}, ["'temperature' stands outside the sections", "generation_config"]),
        (MINIMAL | {"scheduler_config": 3}, ["scheduler_config: got 3", "key: value"]),
        (with_value("scheduler_config", "temperature", 1), ["no key of scheduler_config", "belongs in generation_config"]),
        (with_value("scheduler_config", "max_num_seq", 1), ["did you mean 'max_num_seqs'?"]),
    ],
)
def test_unknown_and_missing_names(tree, words):
    message = refusal(tree)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "section, key, value, allowed",
    [
        ("scheduler_config", "max_num_seqs", "sixteen", "a whole number, at least 1"),
        ("scheduler_config", "max_num_seqs", 0, "a whole number, at least 1"),
        ("scheduler_config", "max_num_seqs", True, "a whole number, at least 1"),
        ("scheduler_config", "max_num_seqs", 1.5, "a whole number, at least 1"),
        ("scheduler_config", "block_size", 100, "a multiple of 16"),
        ("scheduler_config", "memory_fraction", 1.5, "more than 0, at most 1"),
        ("scheduler_config", "enable_chunked_prefill", "yes", "true or false"),
        ("scheduler_config", "graph_batch_sizes", [1, 0], "a list of whole numbers, at least 1"),
        ("generation_config", "temperature", -0.1, "a number, at least 0, or null"),
        ("generation_config", "temperature", float("nan"), "a number, at least 0, or null"),
        ("generation_config", "top_p", 0, "a number, more than 0, at most 1"),
        ("generation_config", "logprobs", 21, "at most 20"),
        ("generation_config", "stop", [1], "a list of texts"),
        ("data_config", "dataset", "coco", "one of default, vision-arena-bench-v0.1, jsonl"),
        ("model_config", "dtype", "float8", "one of auto, float32, bfloat16, float16"),
        ("model_config", "model_path", "", "a text, not empty"),
        ("server_config", "port", 70000, "at least 1, at most 65535"),
    ],
)
def test_wrong_types_and_ranges(section, key, value, allowed):
    message = refusal(with_value(section, key, value))
    assert f"{section}.{key}: got" in message
    assert allowed in message


def test_all_findings_are_told_at_once():
    tree = with_value("scheduler_config", "max_num_seqs", 0) | {"generation_config": {"top_p": 2, "seeed": 1}}
    lines = refusal(tree).splitlines()
    assert len(lines) == 3
    assert "did you mean 'seed'?" in "".join(lines)


def test_a_lone_value_is_a_list_of_one():
    recipe = build_recipe(with_value("generation_config", "stop", "END") | {"data_config": {"media": "a.png"}})
    assert recipe.generation.stop == ("END",)
    assert recipe.data.media == ("a.png",)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "is empty"),
        ("# nothing but a comment\n", "is empty"),
        ("- a\n- b\n", "got a list"),
        ("model_config:\n  a: [1\n", "not valid YAML"),
        ("model_config:\n  model_path: a\n  model_path: b\n", "'model_path' is there twice"),
        ("model_config:\n  1: a\n", "a key must be text"),
    ],
)
def test_files_that_are_no_recipes(recipe_file, text, words):
    with pytest.raises(UserError, match=words) as error:
        load_recipe(recipe_file(text))
    assert "mine.yaml" in str(error.value)


def test_a_syntax_error_names_its_line(recipe_file):
    with pytest.raises(UserError, match="line 3, column"):
        load_recipe(recipe_file("model_config:\n  model_path: a\n   device: cpu\n"))


def test_a_missing_file_names_its_neighbour():
    with pytest.raises(UserError, match="did you mean 'quickstart.yaml'"):
        load_recipe("config/quickstrat.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe("config")


def test_numbers_as_people_write_them(recipe_file):
    recipe = load_recipe(
        recipe_file("model_config: {model_path: a}\ngeneration_config: {temperature: 1e-6, min_p: .5}\n")
    )
    assert (recipe.generation.temperature, recipe.generation.min_p) == (1e-6, 0.5)


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("generation_config.temperature=0.5", "generation", "temperature", 0.5),
        ("generation_config.seed=null", "generation", "seed", None),
        ("scheduler_config.enable_prefix_caching=false", "scheduler", "enable_prefix_caching", False),
        ("data_config.prompt=Where is it: left? [1]", "data", "prompt", "Where is it: left? [1]"),
        ("data_config.prompt=a=b", "data", "prompt", "a=b"),
        ('data_config.prompt="42"', "data", "prompt", "42"),
        ("data_config.prompt=42", "data", "prompt", "42"),
        ("data_config.prompt=null", "data", "prompt", None),
        ("data_config.media=[a.png,b.mp4]", "data", "media", ("a.png", "b.mp4")),
        ("data_config.media=a.png", "data", "media", ("a.png",)),
        ("model_config.model_path=models/tiny/qwen3_vl", "model", "model_path", "models/tiny/qwen3_vl"),
        ("data_config.chat_template_kwargs={a: 1}", "data", "chat_template_kwargs", {"a": 1}),
        ("scheduler_config.graph_batch_sizes=[1,2]", "scheduler", "graph_batch_sizes", (1, 2)),
    ],
)
def test_overrides(recipe_file, override, section, key, value):
    recipe = load_recipe(recipe_file("model_config: {model_path: a}\n"), [override])
    assert getattr(getattr(recipe, section), key) == value


def test_the_last_override_wins(recipe_file):
    path = recipe_file("model_config: {model_path: a}\ngeneration_config: {seed: 1}\n")
    assert load_recipe(path, ["generation_config.seed=2", "generation_config.seed=3"]).generation.seed == 3


@pytest.mark.parametrize(
    "override, words",
    [
        ("temperature", "the form is section.key=value"),
        ("=3", "the form is section.key=value"),
        ("temperature=3", "write --set generation_config.temperature=3"),
        ("generation.temperature=3", "did you mean 'generation_config'?"),
        ("generation_config.temprature=3", "did you mean 'temperature'?"),
        ("generation_config.max_num_seqs=3", "belongs in scheduler_config"),
        ("generation_config.temperature=hot", "got 'hot'"),
        ("generation_config.temperature=-1", "at least 0"),
        ("data_config.media=[a", "not valid YAML"),
    ],
)
def test_wrong_overrides_name_themselves(recipe_file, override, words):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file("model_config: {model_path: a}\n"), [override])
    assert words in str(error.value)
    assert f"--set {override}" in str(error.value)
