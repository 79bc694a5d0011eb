"""`check_folder`: everything that is wrong with a quantized folder at once, by name, with what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.commands.check_folder import check_folder, run_check
from executor.errors import UserError
from tests.engines import engine_over
from tests.msmodelslim.folders import FOLDERS
from tests.msmodelslim.variants import DESCRIPTION, variant
from tests.reference import FAMILIES, REPO

LAYER = "model.language_model.layers.1"
QKV = [f"{LAYER}.self_attn.{name}_proj" for name in "qkv"]


@pytest.fixture
def changed(msmodelslim, tmp_path):
    """The static folder with tensors and description changed."""

    def make(change=lambda tensors, description: None, name="qwen3_vl_w8a8", **config):
        return variant(msmodelslim(name), tmp_path / "folder", change, **config)

    return make


@pytest.mark.parametrize("name", FOLDERS)
def test_what_the_tool_wrote_is_complete(msmodelslim, name):
    report = check_folder(msmodelslim(name))
    assert report.faults == [] and report.num_tensors > 150
    described = json.loads((msmodelslim(name) / DESCRIPTION).read_text())
    assert set(report.kinds) == {kind for weight, kind in described.items() if weight.endswith(".weight")}
    beside = [line for line in report.warnings if "quarot.safetensors" in line]
    assert report.warnings == beside and bool(beside) == (name == "qwen3_vl_w8a8")


@pytest.mark.parametrize("family", FAMILIES)
def test_float_folders_are_judged_too(family):
    report = check_folder(REPO / "models" / "tiny" / family)
    assert report.faults == report.warnings == [] and report.kinds == {}


def without(suffix):
    def change(tensors, description):
        del tensors[f"{QKV[0]}.{suffix}"]

    return change


def typed(name, dtype):
    def change(tensors, description):
        tensors[name] = tensors[name].to(dtype)

    return change


def shaped(name, shape):
    def change(tensors, description):
        tensors[name] = tensors[name].new_ones(shape)

    return change


def described(name, kind):
    def change(tensors, description):
        description[name] = kind

    return change


def extra(name):
    def change(tensors, description):
        tensors[name] = torch.ones(4)

    return change


def a_step_apart(suffix):
    """By the least step that float32 has, which few digits do not show."""

    def change(tensors, description):
        for name, value in zip(QKV, (1.0, 1.0 + 2.0**-23, 1.0), strict=True):
            tensors[f"{name}.{suffix}"] = torch.tensor([value])

    return change


def apart(suffix):
    def change(tensors, description):
        tensors[f"{QKV[1]}.{suffix}"] = tensors[f"{QKV[1]}.{suffix}"] + 1

    return change


FAULTS = [
    (without("quant_bias"), [f"tensor '{QKV[0]}.quant_bias' is missing", "download is complete"]),
    (without("weight"), [f"tensor '{QKV[0]}.weight' is missing"]),
    (typed(f"{QKV[0]}.weight", torch.float32), [f"'{QKV[0]}.weight'", "has type F32", "has I8"]),
    (typed(f"{QKV[0]}.quant_bias", torch.float32), ["has type F32", "has I32"]),
    (typed(f"{QKV[0]}.deq_scale", torch.bfloat16), ["has type BF16", "has I64 or F32"]),
    (typed(f"{QKV[0]}.input_scale", torch.int32), ["has type I32", "F16 or BF16 or F32"]),
    (shaped(f"{QKV[0]}.deq_scale", (7,)), ["has shape [7], but the model expects [512]"]),
    (shaped(f"{QKV[0]}.quant_bias", (1,)), ["has shape [1], but the model expects [512]"]),
    (described(f"{QKV[0]}.weight", "W8A8_DYNAMIC"), ["different types", f"{QKV[0]}.weight is W8A8_DYNAMIC", "W8A8"]),
    (described("model.language_model.embed_tokens.weight", "W8A16"), ["embed_tokens.weight' is W8A16; only linears"]),
    (described(f"{LAYER}.self_attn.q_norm.weight", "W8A8"), ["q_norm.weight' is W8A8; only linears and experts"]),
    (described(f"{LAYER}.input_layernorm.bias", "FLOAT"), ["input_layernorm.bias' is described, and is in none"]),
    (described(f"{LAYER}.mlp.down_proj.bias", "FLOAT"), ["down_proj.bias' is described, and is in none of the files"]),
    (described(f"{LAYER}.self_attn.o_proj.weight", "W8A9"), ["is W8A9; this release reads FLOAT, W8A8"]),
    (described(f"{LAYER}.self_attn.o_proj.weight", "FLOAT"), ["has type I8", "calls it FLOAT"]),
    (extra(f"{LAYER}.mlp.down_proj.deq_scale"), ["down_proj.deq_scale' stand beside", "calls it FLOAT"]),
    (extra("model.language_model.layers.9.input_layernorm.weight"), ["layers.9", "are not read"]),
    (apart("input_scale"), ["input_scale of linears that are multiplied", f"{QKV[1]}.input_scale 1.", "in one run"]),
    (apart("input_offset"), ["input_offset of linears that are multiplied together differ"]),
    (a_step_apart("input_scale"), [f"{QKV[1]}.input_scale 1.0000001, {QKV[2]}.input_scale 1;"]),
]


@pytest.mark.parametrize("change, words", FAULTS, ids=range(len(FAULTS)))
def test_weights_that_do_not_fit(changed, change, words):
    folder = changed(change)
    report = check_folder(folder)
    assert 1 <= len(report.faults) <= 2, report.faults
    for word in words:
        assert word in report.faults[0]
    with pytest.raises(UserError):  # whoever does not ask before comes to the same when it loads
        engine_over(folder)


VALUES = [  # of a tensor: what it may not hold, and what it must
    ("qwen3_vl_w8a8", "input_scale", (0.0, -0.5, torch.nan, torch.inf, 1e-40), "positive numbers"),
    ("qwen3_vl_w8a8", "input_offset", (128.0, -129.0, 0.4, torch.nan), "whole numbers from -128 to 127"),
    ("qwen3_vl_w8a8", "deq_scale", (0.0, -0.5, torch.nan, torch.inf, 1e-40), "positive numbers"),
    ("qwen3_vl_w8a8s", "deq_scale", (0, 1, 3000), "positive numbers"),  # int64, and not the bits of a float32
    ("qwen3_vl_w8a8_dynamic", "weight_scale", (0.0, -0.5, torch.nan, torch.inf, 1e-40), "positive numbers"),
    ("qwen3_vl_w8a8_dynamic", "weight_offset", (3.0, torch.nan), "zeros, as weights of this type are symmetric"),
    ("qwen3_vl_w8a8_dynamic", "bias", (torch.nan, -torch.inf), "finite numbers"),
    ("qwen3_vl_w8a16", "weight_scale", (0.0, torch.nan), "positive numbers"),
    ("qwen3_vl_w8a16", "weight_offset", (torch.nan, torch.inf), "finite numbers"),
    ("qwen3_vl_moe_w8a8", "weight_scale", (0.0, torch.nan), "positive numbers"),
]


@pytest.mark.parametrize("name, suffix, values, words", VALUES, ids=[f"{name}-{x}" for name, x, _, _ in VALUES])
def test_values_that_cannot_be(msmodelslim, tmp_path, name, suffix, values, words):
    """Named one by one; whoever loads such a folder is refused with the same words."""
    linear = f"{LAYER}.mlp.experts.2.up_proj" if "moe" in name else QKV[0]
    for number, value in enumerate(values):

        def change(tensors, description, value=value):
            tensors[f"{linear}.{suffix}"].view(-1)[-1] = value

        folder = variant(msmodelslim(name), tmp_path / str(number), change)
        (fault,) = check_folder(folder).faults
        assert f"tensor '{linear}.{suffix}' must hold {words}" in fault
    with pytest.raises(UserError) as raised:
        engine_over(folder)
    assert str(raised.value) == fault


@pytest.mark.parametrize("expert", ["0.gate_proj", "3.down_proj"])
def test_an_experts_bias_that_is_described_only(changed, expert):
    """As of a linear: the model would answer without it."""
    name = f"{LAYER}.mlp.experts.{expert}.bias"
    folder = changed(described(name, "FLOAT"), "qwen3_vl_moe_w8a8")
    report = check_folder(folder)
    (fault,), (warning,) = report.faults, report.warnings
    assert f"'{name}' is described, and is in none of the files" in fault
    assert name in warning and "nothing asks" not in warning
    with pytest.raises(UserError, match="in none of the files"):
        engine_over(folder)


def test_the_least_scales_of_tools_are_read(changed):
    """Of a row of zeros: 2^-23, and times the least input scale in a static folder."""

    def change(tensors, description):
        tensors[f"{QKV[0]}.deq_scale"][3] = 2.0**-46

    assert check_folder(changed(change)).faults == []


def test_many_faults_of_one_kind_are_one_line(changed):
    def change(tensors, description):
        for name, x in tensors.items():
            if name.endswith(".deq_scale"):
                x[0] = 0

    (fault,) = check_folder(changed(change)).faults
    assert "deq_scale' must hold positive numbers" in fault and "(and 35 more of this kind, the last of 'model" in fault


def test_a_float_folder_with_a_norm_of_no_numbers(tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(REPO / "models" / "tiny" / "qwen3_vl", folder, ignore=shutil.ignore_patterns("training"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_norm.weight"))
    tensors[name][5] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    (fault,) = check_folder(folder).faults
    assert "q_norm.weight' must hold finite numbers, got inf" in fault
    with pytest.raises(UserError, match="q_norm.weight' must hold finite numbers"):
        engine_over(folder)


def test_every_layer_that_does_not_fit_is_told(changed):
    def change(tensors, description):
        for number in (0, 2):
            description[f"model.language_model.layers.{number}.self_attn.q_proj.weight"] = "W8A8_DYNAMIC"
            description[f"model.language_model.layers.{number}.mlp.down_proj.weight"] = "W8A9"

    faults = check_folder(changed(change)).faults
    assert len(faults) == 4
    assert ["layers.0" in fault for fault in faults] == [True, True, False, False]


def test_equal_faults_are_one_line(changed):
    def change(tensors, description):
        for name in QKV:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()

    (fault,) = check_folder(changed(change)).faults
    assert f"'{QKV[0]}.weight'" in fault and f"and 2 more, such as '{QKV[2]}.weight', has type F32" in fault


@pytest.mark.parametrize(
    "dtype, scale, words",
    [
        ("float16", torch.float32, "have type F32 in a float16 model"),
        ("bfloat16", torch.int64, "have type I64 in a bfloat16 model"),
    ],
)
def test_the_other_kind_of_deq_scale_is_a_warning(changed, dtype, scale, words):
    """It is read here, and gives zeros elsewhere."""

    def change(tensors, description):
        for name in [name for name in tensors if name.endswith("deq_scale")]:
            bits = tensors[name].view(torch.int32).to(torch.int64)
            tensors[name] = bits if scale is torch.int64 else tensors[name]

    report = check_folder(changed(change, dtype=dtype, torch_dtype=dtype))
    assert report.faults == []
    (warning,) = report.warnings
    assert words in warning and "python -m executor.commands.cast_scales" in warning


FILES = {
    "tokenizer.json": ["tokenizer.json or vocab.json with merges.txt is missing"],
    "chat_template.jinja": ["chat_template.jinja or chat_template.json is missing; copy it from the float checkpoint"],
    "preprocessor_config.json": ["preprocessor_config.json is missing"],
}


def test_files_that_some_tools_forget(changed):
    """All of them at once; what other files or families do without is a warning."""
    folder = changed()
    for name in (*FILES, "merges.txt", "video_preprocessor_config.json", "generation_config.json"):
        (folder / name).unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    report = check_folder(folder)
    assert len(report.faults) == len(FILES)
    for fault, (words,) in zip(report.faults, FILES.values(), strict=True):
        assert words in fault
    assert [name in line for name, line in zip(("video_pre", "generation"), report.warnings, strict=True)] == [True] * 2


def test_what_is_missing_is_not_called_unasked_for(changed):
    report = check_folder(changed(without("deq_scale")))
    assert "deq_scale' is missing" in report.faults[0] and report.warnings == []


def test_settings_without_sizes_are_a_warning(changed):
    """They load, as those of float weights do, and pictures have other sizes than the model was made with."""
    folder = changed()
    (folder / "preprocessor_config.json").write_text("{}")
    (warning,) = check_folder(folder).warnings
    assert "preprocessor_config.json names no sizes of pictures (min_pixels and max_pixels, or size)" in warning


def test_what_no_npu_takes_is_a_warning(changed):
    def change(tensors, description):
        for name in [name for name in tensors if name.endswith("mlp.down_proj.weight")]:
            linear, columns = name.removesuffix(".weight"), tensors[name].shape[1]
            for suffix in ("weight_scale", "weight_offset"):
                tensors[f"{linear}.{suffix}"] = tensors[f"{linear}.{suffix}"].expand(-1, columns // 16)
        for name in QKV:
            tensors[f"{name}.weight"].clamp_(-8, 7)
            tensors[f"{name}.weight_offset"].zero_()
            for suffix in ("weight", "weight_scale", "weight_offset"):
                description[f"{name}.{suffix}"] = "W4A8_DYNAMIC"

    report = check_folder(changed(change, "qwen3_vl_w8a16"))
    groups, narrow = report.warnings
    assert report.faults == []
    assert "3 layers, such as" in groups and "groups of 16 inputs" in groups and "the 300I DUO takes none" in groups
    assert f"1 layers, such as '{LAYER}.self_attn.qkv_proj' outside of experts are W4A8_DYNAMIC" in narrow


def test_weights_of_four_bits_are_read_where_they_stand_one_to_a_byte(changed):
    def change(tensors, description):
        for name in QKV:
            tensors[f"{name}.weight"].clamp_(-8, 7)
            tensors[f"{name}.weight_offset"].zero_()
            for suffix in ("weight", "weight_scale", "weight_offset"):
                description[f"{name}.{suffix}"] = "W4A8_DYNAMIC"
        tensors[f"{QKV[1]}.weight"][3, 5] = 8

    folder = changed(change, "qwen3_vl_w8a16")
    (fault,) = check_folder(folder).faults
    assert f"'{QKV[1]}.weight' has one weight to a byte and weights outside of -8 to 7" in fault
    with pytest.raises(UserError, match="one weight to a byte"):
        engine_over(folder)


def test_entries_of_nothing_are_a_warning(changed):
    report = check_folder(changed(described("model.language_model.layers.9.mlp.up_proj.weight", "W8A8")))
    assert report.faults == []
    assert (
        "1 tensors, such as" in report.warnings[0]
        and "layers.9.mlp.up_proj.weight' are described" in report.warnings[0]
    )


def test_a_damaged_folder_is_told_in_all_its_parts(changed):
    folder = changed()
    (folder / DESCRIPTION).write_text("{")
    (folder / "quant_model_weights.safetensors").write_bytes(b"\x01")
    (folder / "preprocessor_config.json").unlink()
    faults = check_folder(folder).faults
    assert len(faults) == 3
    for words, fault in zip(("not valid JSON", "truncated, 1 bytes", "preprocessor_config.json"), faults, strict=True):
        assert words in fault


def test_the_command_prints_what_a_folder_is(msmodelslim, changed, capsys):
    document = run_check(str(msmodelslim("qwen3_vl_moe_w8a8")))
    assert document["types"] == {"W8A8": 33, "W8A8_DYNAMIC": 36, "FLOAT": 32} and document["warnings"] == []
    assert "33 W8A8, 36 W8A8_DYNAMIC, 32 FLOAT" in capsys.readouterr().out
    folder = changed(without("deq_scale"))
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="deq_scale' is missing"):
        run_check(str(folder))
    assert "warning: beside the quantized weights, and not read: model.safetensors" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not exist"):
        run_check("./no/such/folder")
