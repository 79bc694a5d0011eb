"""config.json as it is published and re-saved: short forms, old keys, nulls; a shipped recipe on such a folder."""

import copy
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
import transformers

from executor.checkpoint.load import build_on_meta
from executor.checkpoint.weights import check_complete
from executor.commands.check import settle
from executor.commands.generate.run import run
from executor.errors import UserError
from executor.recipe.schema import Recipe, load_recipe
from models.published import published_config, published_shapes
from models.registry import family_folder, family_runner, parse_config, read_shapes
from tests.reference import FAMILIES, REPO, random_model, save_checkpoint, tokenizer_of

SHORT_KEYS = ("hidden_size", "in_chans", "intermediate_size", "model_type", "out_hidden_size", "spatial_patch_size")
SHORT_KEYS += ("tokens_per_second", "torch_dtype")
QWEN2_5 = [name for name in published_shapes() if name.startswith("Qwen2.5")]


def shortened(config: dict, keys: tuple[str, ...] = SHORT_KEYS) -> dict:
    """The config as transformers 4.49 to 4.51 wrote it: hardly more than what differs from the class."""
    vision = config["vision_config"] | {"in_chans": 3, "spatial_patch_size": 14, "torch_dtype": "bfloat16"}
    return config | {"vision_config": {key: vision[key] for key in keys if key in vision}}


@pytest.mark.parametrize("name", QWEN2_5)
def test_a_short_vision_config_is_the_published_one(name):
    config = published_config(name)
    short = shortened(config)
    assert "depth" not in short["vision_config"]
    assert parse_config(short) == parse_config(config)
    model = build_on_meta(lambda: family_runner(short).build_model(short), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == published_shapes()[name]["parameters"]
    check_complete(model, model.pulls({}))


def test_the_shortest_one_of_the_7b():
    config = published_config("Qwen2.5-VL-7B-Instruct")
    short = shortened(config, ("hidden_size", "in_chans", "model_type", "spatial_patch_size", "tokens_per_second"))
    assert parse_config(short) == parse_config(config)
    del short["vision_config"]["tokens_per_second"]
    assert parse_config(short).vision.tokens_per_second == 4  # the class's default; published files always write 2


def test_an_encoder_that_does_not_fit_the_text_is_refused():
    short = shortened(published_config("Qwen2.5-VL-3B-Instruct"), ("hidden_size", "tokens_per_second"))
    with pytest.raises(UserError, match="vision_config.out_hidden_size is missing, wanted the text .* 2048"):
        parse_config(short)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_absent_keys_have_the_defaults_of_transformers(family, section):
    """Each key left out alone, from a config that has the class's own values everywhere else."""
    config = transformers.AutoConfig.for_model(family)
    if family == "qwen2_5_vl":
        config.vision_config.hidden_size = 1280
    config.vision_config.out_hidden_size = config.text_config.hidden_size = 3584
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 28, 4
    if family == "qwen3_vl":
        config.text_config.num_key_value_heads = config.text_config.num_attention_heads = 32
    raw = json.loads(config.to_json_string(use_diff=False))
    raw["architectures"] = {
        "qwen2_5_vl": ["Qwen2_5_VLForConditionalGeneration"],
        "qwen3_vl": ["Qwen3VLForConditionalGeneration"],
    }[family]
    whole = parse_config(raw)
    default = json.loads(transformers.AutoConfig.for_model(family).to_json_string(use_diff=False))[section]
    compared = 0
    for key, value in raw[section].items():
        if value != default.get(key):
            continue
        less = copy.deepcopy(raw)
        del less[section][key]
        assert parse_config(less) == whole, key
        compared += 1
    assert compared >= 10


@pytest.mark.parametrize("name", published_shapes())
def test_published_configs_name_their_family(name):
    config = published_config(name)
    folder = "qwen2_5_vl" if name.startswith("Qwen2.5") else "qwen3_vl"
    assert family_folder(config) == folder
    assert family_runner(config).__name__ == f"models.{folder}.runner"
    assert read_shapes(config, name).parameters == published_shapes()[name]["parameters"]


@pytest.mark.parametrize(
    "changes, attribute, wanted",
    [
        ({"decoder_sparse_step": None}, "sparse_step", 1),
        ({"mlp_only_layers": None}, "dense_layers", ()),
        ({"norm_topk_prob": None}, "renormalize", True),
        ({"num_experts": None, "num_local_experts": 4}, "num_experts", 4),
        ({"decoder_sparse_step": 2}, "sparse_step", 2),
    ],
)
def test_keys_of_experts(changes, attribute, wanted):
    config = json.loads((REPO / "models" / "tiny" / "qwen3_vl_moe" / "config.json").read_text())
    config["text_config"] |= changes
    parsed = parse_config(config)
    assert getattr(parsed.text.moe, attribute) == wanted
    # The sizes and the model count alike.
    model = build_on_meta(lambda: family_runner(config).build_model(config), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parsed.shapes("x").parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "outer, inner, wanted",
    [
        (True, False, True),
        (False, True, False),
        (None, True, True),
        (None, None, False),
        ("absent", True, True),
        ("absent", "absent", False),
        (True, "absent", True),
    ],
)
def test_who_says_that_embeddings_are_tied(family, outer, inner, wanted):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    for holder, value in ((config, outer), (config["text_config"], inner)):
        holder["tie_word_embeddings"] = value
        if value == "absent":
            del holder["tie_word_embeddings"]
    assert parse_config(config).tie_word_embeddings is wanted
    assert read_shapes(config, "x").tied_embeddings is wanted


@pytest.mark.parametrize(
    "section, key, value, words",
    [
        ("text_config", "num_attention_heads", 6, "num_attention_heads is 6, wanted a divisor of hidden_size 512"),
        ("text_config", "num_key_value_heads", 3, "num_key_value_heads is 3, wanted a divisor of num_att.*, 4"),
        ("text_config", "use_sliding_window", True, "use_sliding_window is True, wanted false"),
        ("text_config", "hidden_act", "gelu", "hidden_act is 'gelu', wanted silu"),
        ("vision_config", "num_heads", 3, "num_heads is 3, wanted a divisor of hidden_size 160"),
        ("vision_config", "out_hidden_size", 256, "out_hidden_size is 256, wanted the text model's hidden_size, 512"),
        ("vision_config", "in_chans", 4, "in_chans is 4, wanted 3"),
        ("vision_config", "window_size", 20, "window_size is 20, wanted pixels of at least one merged patch, 28"),
        ("vision_config", "fullatt_block_indexes", 1, "fullatt_block_indexes is 1, wanted a list of whole numbers"),
        ("vision_config", "rope_parameters", {"rope_theta": 5e5}, "rope_theta is 500000.0, wanted 10000"),
    ],
)
def test_values_that_contradict_each_other(section, key, value, words):
    config = json.loads((REPO / "models" / "tiny" / "qwen2_5_vl" / "config.json").read_text())
    config[section][key] = value
    with pytest.raises(UserError, match=f"config.json: {section}.*{words}"):
        parse_config(config)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_position_embeddings", 37, "is 37, wanted the number of places in a square"),
        ("deepstack_visual_indexes", [2, 1], "wanted rising numbers of layers"),
        ("deepstack_visual_indexes", [1, 4], "each at least 0 and below 4"),
        ("deepstack_visual_indexes", "1", "is '1', wanted a list"),
    ],
)
def test_values_of_qwen3_vision(key, value, words):
    config = json.loads((REPO / "models" / "tiny" / "qwen3_vl" / "config.json").read_text())
    config["vision_config"][key] = value
    with pytest.raises(UserError, match=f"vision_config.{key}.*{words}"):
        parse_config(config)


@pytest.fixture(scope="module")
def cut_down(tmp_path_factory) -> Path:
    """A Qwen2.5-VL of toy width with an encoder as deep as the published one, under a short vision_config."""
    from tests.reference import config_of

    config = config_of("qwen2_5_vl", tokenizer_of("qwen2_5_vl"))
    vision = config.vision_config
    vision.depth, vision.num_heads, vision.hidden_size = 32, 16, 64
    vision.window_size, vision.fullatt_block_indexes = 112, [7, 15, 23, 31]
    folder = save_checkpoint(tmp_path_factory.mktemp("short"), "qwen2_5_vl", random_model("qwen2_5_vl", config))
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shortened(saved)))
    return folder


def recipe_over(folder: Path, out: Path, **changes: object) -> Recipe:
    """The shipped recipe of the 32B on another folder, as `--set` changes it."""
    changes |= {"model_path": folder, "output_path": out}
    places = {"max_new_tokens": "generation", "media": "data", "prompt": "data", "max_model_len": "scheduler"}
    places["world_size"] = "parallel"
    return load_recipe(
        "./config/qwen2_5_vl_32b.yaml",
        [f"{places.get(key, 'model')}_config.{key}={value}" for key, value in changes.items()],
    )


def test_the_32b_recipe_runs_on_a_short_vision_config(cut_down, tmp_path):
    changes = {"device": "cpu", "soc": "null", "exe_mode": "eager", "dtype": "float32", "world_size": 1}
    changes |= {"max_new_tokens": 2, "max_model_len": 1024, "media": REPO / "dataset/media/word.png", "prompt": "What?"}
    document, status = run(recipe_over(cut_down, tmp_path, **changes), out=io.StringIO())
    (row,) = document["outputs"]
    assert status == 0 and row["error"] is None and row["vision_tokens"] > 0 < row["completion_tokens"]


def test_check_takes_the_same_sizes_from_a_short_vision_config(tmp_path):
    config = published_config("Qwen2.5-VL-32B-Instruct")
    (tmp_path / "config.json").write_text(json.dumps(shortened(config)))
    _, shapes, _ = settle(recipe_over(tmp_path, tmp_path))
    assert dataclasses.replace(shapes, name="x") == read_shapes(config, "x")


OUTER = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "rope_parameters": {"type": "linear", "factor": 2.0},
    "rope_theta": 5e5,
    "max_position_embeddings": 4096,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention"] * 3,
    "hidden_act": "gelu",
    "num_hidden_layers": 2,
    "rms_norm_eps": 2e-5,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": "x",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", OUTER)
def test_keys_of_the_text_model_beside_its_section_are_not_ignored(family, key):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    if key == "original_max_position_embeddings":  # counts for a stretched rope only
        config["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(UserError, match=f"config.json: {key} is .*belongs into text_config.*Move {key}"):
        parse_config(config | {key: OUTER[key]})
    # A sliding window or a rope that the section itself does not say is no default of ours either.
    config["text_config"].pop(key, None)
    if key not in ("rope_parameters", "num_hidden_layers"):  # what must be there is missed first
        with pytest.raises(UserError, match=f"config.json: {key} is .*text_config, which does not say it"):
            parse_config(config | {key: OUTER[key]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_section_that_the_top_level_repeats(family):
    """As some releases of transformers saved it, with the rope in its older form; nulls say nothing."""
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    text = config["text_config"]
    rope = text["rope_parameters"]
    older = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    repeated = text | {"rope_scaling": older, "rope_theta": rope["rope_theta"], "sliding_window": 32768}
    repeated["max_position_embeddings"] = 2048.0
    assert parse_config(repeated | config) == parse_config(config)
    assert parse_config(config | {"rope_scaling": None, "num_hidden_layers": None}) == parse_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", ["absent", None, [], [None], ""])
def test_model_type_counts_where_no_architecture_is_named(family, named):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    other = config | {"architectures": named}
    if named == "absent":
        del other["architectures"]
    assert family_folder(other) == family_folder(config)
    assert parse_config(other) == parse_config(config)
    for model_type in (None, "llava", 3, ["qwen3_vl"]):
        with pytest.raises(
            UserError, match="config.json names no architecture, and its model_type is .*write.*qwen3_v"
        ):
            parse_config(other | {"model_type": model_type})


def test_an_architecture_that_is_named_counts_more_than_model_type():
    config = json.loads((REPO / "models" / "tiny" / "qwen3_vl" / "config.json").read_text())
    with pytest.raises(UserError, match="names architecture LlavaForX; this release runs Qwen2_5_VL"):
        parse_config(config | {"architectures": ["LlavaForX"]})


def test_two_numbers_of_experts_that_differ_are_refused():
    config = json.loads((REPO / "models" / "tiny" / "qwen3_vl_moe" / "config.json").read_text())
    config["text_config"]["num_local_experts"] = 4
    assert parse_config(config).text.moe.num_experts == 4
    config["text_config"]["num_local_experts"] = 2
    with pytest.raises(UserError, match="text_config.num_local_experts is 2, wanted num_experts, 4: they are one key"):
        parse_config(config)
