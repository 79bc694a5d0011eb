"""The recipe's schema: what it accepts, and what it says of everything else."""

from pathlib import Path

import pytest

from executor.errors import UserError
from executor.recipe.schema import Recipe, build_recipe, load_recipe
from tests.reference import REPO

SECTIONS = {field.alias: field.annotation for field in Recipe.model_fields.values()}
LEAST = "model_config:\n  model_path: somewhere\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def said(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "pydantic" not in str(error.value) and "validation error" not in str(error.value)
    return str(error.value)


def test_the_least_recipe_has_every_default(write):
    recipe = load_recipe(write(LEAST))
    assert recipe.model.model_path == "somewhere"
    assert (recipe.scheduler.block_size, recipe.scheduler.max_num_seqs) == (128, 16)
    assert all(
        getattr(recipe.generation, name) is None
        for name in SECTIONS["generation_config"].model_fields
        if name != "draw"
    )


def test_an_empty_section_has_its_defaults(write):
    assert load_recipe(write(LEAST + "scheduler_config:\n")) == load_recipe(write(LEAST))


def test_every_field_says_what_it_is_for():
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            assert field.description and field.description.endswith("."), name


def test_nothing_changes_later(write):
    recipe = load_recipe(write(LEAST))
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.device = "npu"
    assert recipe.replace(model={"device": "npu"}).model.device == "npu"
    assert recipe.model.device == "auto"


def test_a_replacement_is_checked(write):
    for mode in ("fast", "compile"):
        error = said(lambda mode=mode: load_recipe(write(LEAST)).replace(model={"exe_mode": mode}))
        assert "one of eager, ge_graph, npugraph_ex" in error


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty", "quickstart.yaml"]),
        ("- a\n", ["`key: value` lines", "list"]),
        ("model_config: [", ["line 1", "not valid YAML"]),
        ("model_config:\n\tmodel_path: x", ["line 2", "not valid YAML"]),
        ("model_config:\n  model_path: a\n  model_path: b\n", ["line 3", "'model_path' is there twice"]),
        ("model_config:\n  1: a\n", ["a key must be text", "1"]),
        ("model_config:\n  device: cpu\n", ["model_config.model_path is missing", "Folder of the checkpoint"]),
        ("scheduler_config:\n  block_size: 128\n", ["section model_config is missing"]),
        ("model_config: somewhere\n", ["model_config: got 'somewhere' (text)", "model_path"]),
        (LEAST + "  dtyp: float32\n", ["unknown key 'dtyp' in model_config", "did you mean 'dtype'?"]),
        (LEAST + "  world_size: 2\n", ["'world_size' is no key of model_config", "parallel_config"]),
        (LEAST + "model_path: x\n", ["'model_path' stands outside the sections", "model_config"]),
        (LEAST + "data_confg:\n  limit: 1\n", ["unknown section 'data_confg'", "did you mean 'data_config'?"]),
        (LEAST + "  device: gpu\n", ["model_config.device", "'gpu'", "one of auto, cpu, npu"]),
        (LEAST + "  strict_graph: 1\n", ["strict_graph", "got 1", "true or false"]),
        (LEAST + "scheduler_config:\n  max_num_seqs: '8'\n", ["got '8' (text)", "a whole number, at least 1"]),
        (LEAST + "scheduler_config:\n  max_num_seqs: 1.5\n", ["got 1.5", "a whole number"]),
        (LEAST + "scheduler_config:\n  max_num_seqs: true\n", ["got true", "a whole number"]),
        (LEAST + "scheduler_config:\n  max_num_seqs: null\n", ["got nothing (null)", "a whole number"]),
        (LEAST + "scheduler_config:\n  block_size: 20\n", ["got 20", "a multiple of 16"]),
        (LEAST + "generation_config:\n  top_p: 1.5\n", ["got 1.5", "more than 0, at most 1"]),
        (LEAST + "generation_config:\n  temperature: .nan\n", ["temperature", "got nan"]),
        (LEAST + "generation_config:\n  stop: [a, 1]\n", ["generation_config.stop", "got 1", "a list of texts"]),
        (LEAST + "generation_config:\n  logprobs: 21\n", ["got 21", "at most 20, or null"]),
        (LEAST + "scheduler_config:\n  graph_batch_sizes: [1, 0]\n", ["got 0", "a list of whole numbers, at least 1"]),
        (LEAST + "data_config:\n  dataset: coco\n", ["one of default, vision-arena-bench-v0.1, jsonl"]),
        (LEAST + "server_config:\n  port: 70000\n", ["at least 0, at most 65535"]),
        (LEAST + "data_config:\n  chat_template_kwargs: yes\n", ["chat_template_kwargs", "a mapping"]),
    ],
)
def test_what_it_says_of_a_wrong_file(write, text, parts):
    path = write(text)
    message = said(load_recipe, path)
    assert str(path) in message
    assert all(part in message for part in parts), message


def test_all_mistakes_are_told_at_once(write):
    message = said(load_recipe, write(LEAST + "  dtyp: a\nscheduler_config:\n  block_size: 7\n"))
    assert len(message.splitlines()) == 2


def test_a_missing_file_and_a_folder(tmp_path):
    assert "did you mean 'quickstart.yaml'" in said(load_recipe, REPO / "config" / "quickstrt.yaml")
    assert "is a folder" in said(load_recipe, tmp_path)


def test_a_file_is_found_from_anywhere(tmp_path, monkeypatch):
    here = load_recipe("config/quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("./config/quickstart.yaml") == here


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("scheduler_config.max_num_seqs=4", "scheduler", 4),
        ("scheduler_config.memory_fraction=1", "scheduler", 1.0),
        ("generation_config.temperature=1e-2", "generation", 0.01),
        ("generation_config.temperature=0.7", "generation", 0.7),
        ("generation_config.stop=null", "generation", None),
        ("generation_config.stop=END", "generation", ("END",)),
        ("generation_config.stop=a: b #c", "generation", ("a: b #c",)),
        ("generation_config.stop=12", "generation", ("12",)),
        ("generation_config.stop=[END, '. ']", "generation", ("END", ". ")),
        ("generation_config.stop_token_ids=[1, 2]", "generation", (1, 2)),
        ("generation_config.draw=true", "generation", True),
        ("data_config.media=[a.png,b.mp4]", "data", ("a.png", "b.mp4")),
        ("data_config.media=a b.png", "data", ("a b.png",)),
        ("data_config.prompt=Where: left, #1 or [2]? yes", "data", "Where: left, #1 or [2]? yes"),
        ("data_config.prompt=a=b", "data", "a=b"),
        ("data_config.prompt=12", "data", "12"),
        ("data_config.prompt='quoted'", "data", "quoted"),
        ("data_config.prompt=null", "data", None),
        ("data_config.chat_template_kwargs={thinking: false}", "data", {"thinking": False}),
        ("model_config.soc=null", "model", None),
        ("model_config.output_path=12", "model", "12"),
        ("data_config.prompt=''", "data", ""),
        ("data_config.media=a #1.png", "data", ("a #1.png",)),
        ("data_config.media=@a, b.png", "data", ("@a, b.png",)),
        ("data_config.media=*.png", "data", ("*.png",)),
        ("data_config.media=data:image/png;base64,AA==", "data", ("data:image/png;base64,AA==",)),
        (
            'data_config.media=["a, #1.png", "[b].png", "data:image/png;base64,AA=="]',
            "data",
            ("a, #1.png", "[b].png", "data:image/png;base64,AA=="),
        ),
        ("scheduler_config.kv_cache_gb=3", "scheduler", 3.0),
        ("generation_config.stop=\n", "generation", ("\n",)),
        ("generation_config.do_sample=false", "generation", False),
    ],
)
def test_overrides(write, override, section, value):
    key = override.partition("=")[0].partition(".")[2]
    got = getattr(getattr(load_recipe(write(LEAST), [override]), section), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("name", ["a #1.png", "[1], b.png", "[c].png", "@d.png", "*.png", "e: f.png", "'g'", "[h"])
def test_a_file_is_taken_as_it_stands(write, tmp_path, monkeypatch, name):
    """Alone or in brackets, whatever marks of YAML its name has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for value in (name, f"[{name}]"):
        assert load_recipe(write(LEAST), [f"data_config.media={value}"]).data.media == (name,)
    assert load_recipe(write(LEAST), [f"data_config.dataset_path={name}"]).data.dataset_path == name


def test_an_override_wins_over_the_file_and_the_last_one_over_the_others(write):
    path = write(LEAST + "scheduler_config:\n  max_num_seqs: 1\n  block_size: 16\n")
    recipe = load_recipe(path, ["scheduler_config.max_num_seqs=2", "scheduler_config.max_num_seqs=3"])
    assert (recipe.scheduler.max_num_seqs, recipe.scheduler.block_size) == (3, 16)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("nonsense", ["section.key=value"]),
        ("=1", ["section.key=value"]),
        ("model_path=x", ["--set model_config.model_path=x"]),
        ("modl_config.dtype=x", ["unknown section 'modl_config'", "did you mean 'model_config'?"]),
        ("model_config.dtyp=x", ["unknown key 'dtyp'", "did you mean 'dtype'?"]),
        ("generation_config.world_size=2", ["belongs in parallel_config"]),
        ("data_config.media=[a.png", ["not valid YAML", '--set \'data_config.media=["a, #1.png", "b.png"]\'']),
        ("data_config.media=[@a.png, b.png]", ["not valid YAML", "put each item in quotes"]),
        ("data_config.media=[a #1.png, b.png]", ["not valid YAML", "put each item in quotes"]),
        ("data_config.media=[data:image/png;base64,AA==]", ["YAML reads this list as", "put each item in quotes"]),
        ("data_config.media=[a: b.png]", ["YAML reads this list as", "put each item in quotes"]),
        ("data_config.media=", ["there is no value", "write null for none"]),
        ("data_config.prompt= ", ["there is no value", "write null for none"]),
        ("generation_config.seed=", ["there is no value", "write null for none"]),
        ("data_config.chat_template_kwargs={a: [}", ["not valid YAML", "put it in quotes"]),
        ("scheduler_config.max_num_seqs=few", ["--set scheduler_config.max_num_seqs=few: ", "got 'few' (text)"]),
    ],
)
def test_what_it_says_of_a_wrong_override(write, override, parts):
    message = said(load_recipe, write(LEAST), [override])
    assert f"--set {override}" in message
    assert all(part in message for part in parts), message


def test_a_tree_of_plain_values_is_a_recipe_too():
    recipe = build_recipe({"model_config": {"model_path": "x"}, "parallel_config": {"world_size": 4}})
    assert recipe.attn_tp_size == 4
