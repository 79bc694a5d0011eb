"""The doctor's own reader of recipes: equal to PyYAML on what it reads, a refusal with its line on the rest."""

import random

import pytest

from executor.doctor.recipe import RecipeError, Wish, parse_yaml, read_recipe
from executor.host.env import REPO_ROOT

yaml = pytest.importorskip("yaml")

RECIPE = """\
# A comment: with a colon
model_config:
  model_path: "models/a # b"   # a comment
  device: npu
  soc: ~
  strict_graph: yes

parallel_config:
    world_size: 16
    attn_tp_size: 8
generation_config:
  stop: ["a, b", 'it''s', c]
  temperature: 0.5
  stop_token_ids:
    - 1
    # between items
    - 2
data_config:
  media:
  - one.png
  - "two #.png"
  prompt: What's in it?
server_config:
  chat_template_kwargs: {}
  api_key:
"""


def test_reads_what_pyyaml_reads():
    assert parse_yaml(RECIPE) == yaml.safe_load(RECIPE)


@pytest.mark.parametrize("path", sorted((REPO_ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_reads_every_recipe_of_this_project(path):
    text = path.read_text()
    assert parse_yaml(text) == yaml.safe_load(text)
    assert read_recipe(text).model_path


def test_reads_plain_values_as_pyyaml_does():
    draw = random.Random(0)
    values = [
        "1",
        "-3",
        "+2",
        "0",
        "1.5",
        ".5",
        "2.",
        "1.5e+3",
        "true",
        "No",
        "null",
        "''",
        '""',
        '"a\\n"',
        "a b",
        "a#b",
    ]
    values += ["Qwen/Qwen3-VL-8B", "/data/model", "C:/x", "[1, 2]", "[]", "[a, 'b,c', \"d\"]", "1_000", "~", "x y # z"]
    for _ in range(300):
        keys = draw.sample("abcdefgh", 4)
        text = "s:\n" + "".join(f"  {key}: {draw.choice(values)}\n" for key in keys)
        assert parse_yaml(text) == yaml.safe_load(text), text


@pytest.mark.parametrize(
    "text, said",
    [
        ("s:\n  a: 1\n  a: 2\n", "line 3: 's.a' is there twice"),
        ("s:\n  a: 1\ns:\n  b: 2\n", "line 3: the section 's' is there twice"),
        ("s:\n\ta: 1\n", "line 2: YAML is indented with spaces"),
        ("s: 3\n", "line 1: 's' is at the margin"),
        ("  a: 1\n", "line 1: 'a' stands in no section"),
        ("s:\n  a: 1\n    b: 2\n", "line 3: 'b' is indented by 4"),
        ("s:\n  a: |\n    text\n", "line 2: '|' is more YAML than the doctor reads"),
        ("s:\n  a: &x 1\n", "line 2: '&x 1' is more YAML"),
        ("s:\n  a: {b: 1}\n", "line 2: '{b: 1}' is more YAML"),
        ("s:\n  a: [1, [2]]\n", "line 2: a list stands on one line"),
        ("s:\n  a: 'b\n", "line 2: the text in ' quotes does not end"),
        ('s:\n  a: "b" c\n', "line 2: "),
        ("s:\n  just words\n", "line 2: expected `key: value`"),
    ],
)
def test_refuses_with_the_line(text, said):
    with pytest.raises(RecipeError) as refusal:
        parse_yaml(text)
    assert said in str(refusal.value)


def test_wish_and_overrides():
    wish = read_recipe(
        RECIPE,
        [
            "model_config.device=cpu",
            "parallel_config.world_size=4",
            "server_config.port=9000",
            "data_config.prompt=x: {",
        ],
    )
    assert wish == Wish("models/a # b", device="cpu", world_size=4, attn_tp_size=8, port=9000)


@pytest.mark.parametrize(
    "text, overrides, said",
    [
        ("model_config:\n  device: cpu\n", [], "model_config.model_path"),
        ("", [], "model_config.model_path"),
        ("model_config:\n  model_path: 7\n", [], "model_config.model_path: wanted a text, got 7"),
        (RECIPE, ["parallel_config.world_size=two"], "parallel_config.world_size: wanted a whole number, got 'two'"),
        (RECIPE, ["parallel_config.world_size=0"], "1 or more"),
        (RECIPE, ["world_size=2"], "the form is section.key=value"),
    ],
)
def test_wishes_that_make_no_sense(text, overrides, said):
    with pytest.raises(RecipeError) as refusal:
        read_recipe(text, overrides)
    assert said in str(refusal.value)


def test_defaults_are_those_of_the_schema():
    config = pytest.importorskip("executor.recipe.schema")
    recipe = config.build_recipe({"model_config": {"model_path": "x"}})
    wish = Wish("x")
    for section in (recipe.model, recipe.parallel, recipe.server):
        for name, value in section.model_dump().items():
            assert getattr(wish, name, value) == value, name
