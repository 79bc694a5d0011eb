"""Every key of a checkpoint's JSON files with values that do not belong there: read, or refused by file and key."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from executor.checkpoint.foreign import find_quantization
from executor.checkpoint.generation import read_generation_config
from executor.checkpoint.settings import load_chat_template, load_tokenizer
from executor.errors import UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import build_recipe
from models.registry import family_runner, parse_config
from tests.reference import FAMILIES, REPO

ODD = (None, "odd", "7", -1, 0, 1, 2.5, 1e-6, 10**400, float("inf"), float("nan"), True, False)
ODD += ([], [1], ["odd"], [None, 1, 2], [[1]], {}, {"a": 1}, {"name": None})
SIDE_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json", "config.json")


def folder_of(tmp_path: Path, family: str) -> Path:
    folder = tmp_path / family
    shutil.copytree(REPO / "models" / "tiny" / family, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def changed(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, tree) for every value of `tree` at any depth, replaced by each odd one, and without its key."""
    items = tree.items() if isinstance(tree, dict) else ()
    for key, value in items:
        for odd in ODD:
            yield (*path, key, odd), tree | {key: odd}
        yield (*path, key, "absent"), {name: kept for name, kept in tree.items() if name != key}
        for inner, subtree in changed(value, (*path, key)):
            yield inner, tree | {key: subtree}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json(family):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    read, refused = 0, 0
    for path, odd in changed(config):
        try:
            parsed = parse_config(odd, "FOLDER/config.json")
            parsed.shapes("x")
            find_quantization(REPO, odd)
            read += 1
        except UserError as error:
            assert str(error).startswith("FOLDER/config.json"), (path, error)
            refused += 1
            # The key is named, or the one that it no longer agrees with.
            assert (
                path[-2] in str(error) or ", wanted " in str(error) or re.search("names (no )?architecture", str(error))
            ), path
    assert min(read, refused) > 300, (read, refused)


SIZES = ("hidden_size", "depth", "num_heads", "patch_size", "vocab_size", "rms_norm_eps", "num_hidden_layers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("odd", [None, "16", -1, 0, True, [16], {"a": 1}, 2.5e-1 + 3])
def test_sizes_are_refused_by_name(family, key, odd):
    config = json.loads((REPO / "models" / "tiny" / family / "config.json").read_text())
    section = "vision_config" if key in ("depth", "num_heads", "patch_size") else "text_config"
    config[section][key] = odd
    if key == "rms_norm_eps" and odd == 3.25:
        assert parse_config(config).text.rms_norm_eps == odd
        return
    with pytest.raises(UserError, match=rf"config.json: {section}.{key} is .*, wanted a"):
        parse_config(config)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pixel_settings(tmp_path, family, file):
    from executor.checkpoint.settings import read_pixel_settings, read_video_settings

    folder = folder_of(tmp_path, family)
    tree = json.loads((folder / file).read_text())
    for key, value in {"min_frames": 4, "fps": 2, "do_resize": True, "do_rescale": True, "resample": 3}.items():
        tree.setdefault(key, value)
    tree |= {"rescale_factor": 1 / 255, "num_frames": None, "max_video_tokens": 768, "do_pad": False}
    config = json.loads((folder / "config.json").read_text())
    processor = family_runner(config).Processor
    outcomes = {"read": 0, "refused": 0}
    for path, odd in changed(tree):
        (folder / file).write_text(json.dumps(odd))
        try:
            settings = (
                read_video_settings(folder, processor.video_defaults)
                if file.startswith("video")
                else read_pixel_settings(folder, processor.picture_defaults)
            )
        except UserError as error:
            assert file in str(error), (path, error)
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert all(type(getattr(settings, name)) is int for name in ("patch_size", "merge_size", "min_pixels")), path
        assert 0 < settings.min_pixels <= settings.max_pixels, path
        assert len(settings.mean) == len(settings.std) == 3 and min(settings.std) > 0, path
        if file.startswith("video"):
            assert isinstance(settings.fps, int | float) and settings.fps > 0, path
            assert 0 < settings.min_frames <= settings.max_frames, path
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"size": {"longest_edge": 99999}}, (3136, 99999)),
        ({"size": {"shortest_edge": "5000", "longest_edge": 99999.0}}, (5000, 99999)),
        ({"size": None, "min_pixels": "4000", "max_pixels": 90000}, (4000, 90000)),
        ({"size": {"min_pixels": 4000, "max_pixels": 90000}}, (4000, 90000)),
        (
            {"size": {"height": 448, "width": 448}},
            "size.height is 448, wanted an object with shortest_edge",
        ),
        ({"size": 448}, "size is 448, wanted an object with shortest_edge"),
        ({"size": {"shortest_edge": 99999, "longest_edge": 5000}}, "min_pixels 99999 is above max_pixels 5000"),
        ({"do_resize": "yes"}, "do_resize is 'yes', wanted true or false"),
        ({"do_center_crop": True}, "do_center_crop=True; only do_center_crop=False"),
        ({"resample": "bicubic"}, (3136, 1003520)),
        ({"resample": "bilinear"}, "resample='bilinear'; only 3"),
        ({"size": {"longest_edge": 500, "shortest_edge": 100}}, "max_pixels .size.longest_edge. is 500, wanted .* 784"),
        ({"max_pixels": 783, "min_pixels": 1}, "max_pixels .* is 783, wanted at least the pixels of one token, 784"),
        ({"max_pixels": 784, "min_pixels": 1}, (1, 784)),
        ({"do_convert_rgb": False}, "do_convert_rgb=False; only do_convert_rgb=True"),
        ({"do_convert_rgb": True}, (3136, 1003520)),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*, wanted three numbers"),
        ({"image_std": 0}, "image_std is 0, wanted three numbers, above 0"),
        ({"image_std": "0.5", "image_mean": 0.25}, (3136, 1003520)),
        ({"merge_size": None, "patch_size": "14"}, (3136, 1003520)),
    ],
)
def test_pixel_settings_that_are_plain_and_that_are_not(tmp_path, changes, wanted):
    from executor.checkpoint.settings import read_pixel_settings
    from models.qwen2_5_vl.processor import PICTURE_DEFAULTS

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=rf"preprocessor_config.json.*{wanted}"):
            read_pixel_settings(tmp_path, PICTURE_DEFAULTS)
        return
    settings = read_pixel_settings(tmp_path, PICTURE_DEFAULTS)
    assert (settings.min_pixels, settings.max_pixels) == wanted
    assert (settings.patch_size, settings.merge_size) == (14, 2)
    if "image_mean" in changes:
        assert (settings.mean, settings.std) == ((0.25,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_that_are_not_to_be_sampled(tmp_path, family, caplog):
    """Qwen2.5-VL's class says so by itself, and its users sample before; Qwen3-VL's samples."""
    from executor.checkpoint.settings import read_video_settings

    folder = folder_of(tmp_path, family)
    defaults = family_runner(json.loads((folder / "config.json").read_text())).Processor.video_defaults
    said = json.loads((folder / "preprocessor_config.json").read_text())
    for samples in (True, None):
        (folder / "video_preprocessor_config.json").write_text(json.dumps(said | {"do_sample_frames": samples}))
        assert read_video_settings(folder, defaults).fps == 2
    assert not caplog.records
    (folder / "video_preprocessor_config.json").write_text(json.dumps(said | {"do_sample_frames": False}))
    if family == "qwen2_5_vl":
        assert read_video_settings(folder, defaults).fps == 2
        assert "video_preprocessor_config.json: do_sample_frames is false, but frames are sampled here" in caplog.text
        return
    with pytest.raises(
        UserError, match="do_sample_frames is False, wanted true: frames are sampled.*num_frames or fps"
    ):
        read_video_settings(folder, defaults)


@pytest.mark.parametrize(
    "content, wanted",
    [
        (None, None),
        ({}, None),
        ({"min_pixels": 9999}, None),
        ({"max_pixels": "99999"}, 99999),
        ({"size": {"longest_edge": 5000}}, 5000),
        ({"size": {"longest_edge": 5000, "max_pixels": 6000}, "max_pixels": None}, 5000),
    ],
)
def test_the_largest_picture(tmp_path, content, wanted):
    from executor.checkpoint.settings import read_max_pixels

    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert read_max_pixels(tmp_path) == wanted
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_pixels": 777777}}))
    assert read_max_pixels(tmp_path) == 777777


def test_generation_config(tmp_path):
    said = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "max_new_tokens": 64}
    said |= {"repetition_penalty": 1.05, "min_new_tokens": 0, "presence_penalty": 1.5, "frequency_penalty": -0.5}
    generation = build_recipe({"model_config": {"model_path": "x"}}).generation
    for path, odd in changed(said):
        (tmp_path / "generation_config.json").write_text(json.dumps(odd))
        try:
            sampling_params(generation, read_generation_config(tmp_path))
        except UserError as error:
            assert "generation_config.json" in str(error) and path[-2] in str(error), (path, error)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"temperature": "0.6", "top_k": None}))
    params = sampling_params(generation, read_generation_config(tmp_path))
    assert params.temperature == 0.6 and params.top_k == 0


def test_tokenizer_files(tmp_path):
    folder = folder_of(tmp_path, "qwen3_vl")
    for file in ("tokenizer_config.json", "tokenizer.json"):
        good = (folder / file).read_text()
        tree = json.loads(good)
        for key in tree:
            for odd in (None, "odd", -1, True, [], [1], {}, {"a": 1}):
                (folder / file).write_text(json.dumps(tree | {key: odd}))
                try:
                    load_chat_template(folder, load_tokenizer(folder))
                except UserError as error:
                    assert str(folder) in str(error), (key, odd, error)
        for broken in ("", "[]", "{", '{"a": ', "nul", '"text"', "\x00", "[" * 5000):
            (folder / file).write_text(broken)
            with pytest.raises(UserError, match=file):
                load_tokenizer(folder)
        (folder / file).write_text(good)
    config = json.loads((folder / "config.json").read_text())
    # What transformers refuses to read in config.json is no business of the tokenizer.
    config["text_config"] |= {"initializer_range": 0, "rms_norm_eps": "1e-06", "head_dim": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(load_tokenizer(folder)) > 400


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for message in messages %}", "chat_template.jinja: the chat template is no valid Jinja, line 1"),
        ("{{ messages", "no valid Jinja"),
        ("  ", "has no chat template"),
    ],
)
def test_chat_templates_that_are_none(tmp_path, template, words):
    folder = folder_of(tmp_path, "qwen3_vl")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(REPO / "models" / "tiny" / "qwen3_vl")
    with pytest.raises(UserError, match=words):
        load_chat_template(folder, tokenizer)


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd is not None and odd != {} and odd != []])
def test_chat_template_json_of_a_wrong_kind(tmp_path, odd):
    folder = folder_of(tmp_path, "qwen3_vl")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": odd}))
    tokenizer = load_tokenizer(REPO / "models" / "tiny" / "qwen3_vl")
    try:
        assert isinstance(load_chat_template(folder, tokenizer), str)
    except UserError as error:
        assert "chat_template" in str(error)


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_that_are_no_files(tmp_path, name):
    from executor.checkpoint.folder import read_json

    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_json(tmp_path, name)
