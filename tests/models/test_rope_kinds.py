"""Stretched ropes: the frequencies of transformers to the bit, its logits end to end, and what is refused by name."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from executor.checkpoint.rope import LinearScaling, YarnScaling
from executor.errors import UserError
from executor.layers.rope import MRope, frequencies
from executor.schedule.request import SamplingParams
from models.registry import parse_config
from tests.engines import engine_over
from tests.models.test_generation import RecordedLogits, ask, picture
from tests.reference import REPO, greedy

TINY = REPO / "models" / "tiny"
ORIGINAL = 64  # tokens that the copies were "trained" for: prompts go far beyond
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def with_rope(config: dict, said: dict, place: str = "rope_scaling", **text_changes) -> dict:
    """A nested config whose rope says `said` beside its sections."""
    text = dict(config["text_config"])
    plain = text.pop("rope_parameters")
    sections = {key: value for key, value in plain.items() if key.startswith("mrope")}
    text |= {"rope_theta": plain["rope_theta"], place: said | sections, **text_changes}
    return config | {"text_config": text}


def tiny_config(family: str) -> dict:
    return json.loads((TINY / family / "config.json").read_text())


def their_frequencies(raw: dict) -> torch.Tensor:
    text = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))).text_config
    return ROPE_INIT_FUNCTIONS[text.rope_parameters["rope_type"]](text, None)[0]


def our_frequencies(raw: dict) -> torch.Tensor:
    text = parse_config(raw).text
    return frequencies(text.rope, text.head_dim)


SAID = {
    "yarn": YARN,
    "rope_type": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 262144},
    "attention_factor": YARN | {"attention_factor": 1.5},
    "mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "one mscale": YARN | {"mscale": 2.0},
    "betas": YARN | {"beta_fast": 24, "beta_slow": 2.5},
    "not truncated": YARN | {"truncate": False},
    "truncate null": YARN | {"truncate": None},
    "nulls": YARN | {"attention_factor": None, "beta_fast": None, "mscale": None},
    "no original": {"rope_type": "yarn", "factor": 4.0},
    "factor null": YARN | {"factor": None},
    "a ramp of no width": YARN | {"beta_fast": 1, "beta_slow": 1, "truncate": False},
    "linear": {"type": "linear", "factor": 3},
    "type mrope kept": {"rope_type": "yarn", "type": "mrope", "factor": 2.0},
    "default": {"rope_type": "default"},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID.keys())
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_frequencies_are_those_of_transformers(family, place, said):
    raw = with_rope(tiny_config(family), said, place)
    text = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))).text_config
    ours = parse_config(raw).text
    kind = text.rope_parameters["rope_type"]
    if kind == "default":
        assert ours.rope.scaling is None
        return
    wanted, magnitude = ROPE_INIT_FUNCTIONS[kind](text, None)
    assert torch.equal(frequencies(ours.rope, ours.head_dim), wanted)
    assert MRope(ours.head_dim, ours.rope, interleaved=False).magnitude == magnitude


def test_the_magnitude_is_that_of_the_paper():
    scaling = parse_config(with_rope(tiny_config("qwen3_vl"), YARN)).text.rope.scaling
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1, abs=1e-12)
    assert scaling == YarnScaling(4.0, ORIGINAL, scaling.attention_factor)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_original_length_beside_the_rope_counts_first(family):
    """As transformers has it in a text_config; in a flat file, as Qwen2.5-VL is published, the rope's own counts."""
    raw = with_rope(tiny_config(family), YARN, original_max_position_embeddings=128)
    assert torch.equal(our_frequencies(raw), their_frequencies(raw))
    assert parse_config(raw).text.rope.scaling.original_length == 128
    if family == "qwen2_5_vl":
        flat = {key: value for key, value in raw.items() if key != "text_config"} | raw["text_config"]
        flat |= {"architectures": raw["architectures"], "model_type": "qwen2_5_vl"}
        assert torch.equal(our_frequencies(flat), their_frequencies(flat))
        assert parse_config(flat).text.rope.scaling.original_length == ORIGINAL


@pytest.mark.parametrize(
    "said, length, wanted",
    [
        ({"rope_type": "default"}, 128_000, 128_000),
        (YARN | {"original_max_position_embeddings": 32768}, 128_000, 131_072),  # as Qwen2.5-VL's authors advise
        (YARN | {"original_max_position_embeddings": 32768}, 32_768, 131_072),
        ({"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262_144}, 1_000_000, 1_000_000),
        ({"rope_type": "yarn", "factor": 2.0}, 40_960, 81_920),
        ({"rope_type": "linear", "factor": 2.0}, 40_960, 40_960),
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 32_768}, 40_960, 65_536),
    ],
)
def test_the_context_that_a_rope_vouches_for(said, length, wanted):
    raw = with_rope(tiny_config("qwen3_vl"), said, max_position_embeddings=length)
    assert parse_config(raw).shapes("x").max_position_embeddings == wanted


REFUSED = [
    ({"rope_type": kind, "factor": 2.0}, f"rope_scaling.rope_type is {kind}, a rope that this project does not compute")
    for kind in ("dynamic", "longrope", "llama3", "su", "ntk")
] + [
    ({"type": "dynamic", "factor": 2.0}, "rope_scaling.type is dynamic"),
    ({"type": "yarn", "rope_type": "default", "factor": 2.0}, "rope_type default and type yarn; they mean the same"),
    ({"type": "yarn"}, "rope_scaling.factor is missing, wanted a number above 0"),
    ({"type": "yarn", "factor": "4"}, "rope_scaling.factor is '4', wanted a number"),
    ({"type": "yarn", "factor": 0.5}, "rope_scaling.factor is 0.5, wanted a number, at least 1"),
    ({"type": "linear"}, "rope_scaling.factor is missing"),
    (YARN | {"original_max_position_embeddings": -1}, "original_max_position_embeddings is -1, wanted a whole number"),
    (YARN | {"beta_fast": 1, "beta_slow": 4}, "beta_fast is 1, wanted beta_fast not below beta_slow"),
    (YARN | {"attention_factor": 0}, "attention_factor is 0, wanted a number above 0"),
    (YARN | {"truncate": "no"}, "truncate is 'no', wanted true or false"),
    (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1"),
    ({"mrope_section": [16, 24]}, "mrope_section is .*, wanted a list of 3 whole numbers"),
]


@pytest.mark.parametrize("said, words", REFUSED)
def test_ropes_that_are_refused(said, words):
    config = tiny_config("qwen2_5_vl")
    if "mrope_section" in said:
        config["text_config"]["rope_parameters"] |= said
    else:
        config = with_rope(config, said)
    with pytest.raises(UserError, match=f"x: config.json: text_config.*{words}|x: config.json.*{words}"):
        parse_config(config, "x: config.json")


def test_contiguous_sections_fill_the_head_and_other_families_ones_are_refused():
    config = tiny_config("qwen2_5_vl")
    rope = config["text_config"]["rope_parameters"]
    rope["mrope_section"] = [16, 24, 25]
    with pytest.raises(UserError, match="mrope_section is .*half the head dim of 128"):
        parse_config(config)
    rope |= {"mrope_section": [16, 24, 24], "mrope_interleaved": True}
    with pytest.raises(UserError, match="mrope_interleaved is True, wanted false, as this model family has it"):
        parse_config(config)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_factor_without_a_kind_is_said_once(tmp_path, caplog, family):
    folder = copy_with(tmp_path, family, with_rope(tiny_config(family), {"rope_type": "default", "factor": 4.0}))
    with caplog.at_level(logging.WARNING):
        engine_over(folder)
    (record,) = [record for record in caplog.records if "not used" in record.message]
    assert record.message.startswith(
        f"{folder}/config.json: text_config.rope_scaling.factor is not used: its rope_type"
    )


def copy_with(tmp_path: Path, family: str, config: dict) -> Path:
    """The tiny checkpoint under another config.json; its weights are only linked."""
    folder = tmp_path / family
    shutil.copytree(TINY / family, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "model.safetensors").symlink_to(TINY / family / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "family, said, kind",
    [
        ("qwen2_5_vl", YARN, YarnScaling),
        ("qwen3_vl", YARN, YarnScaling),
        ("qwen3_vl", {"rope_type": "linear", "factor": 2.0}, LinearScaling),
    ],
)
def test_logits_equal_transformers(tmp_path, family, said, kind):
    """Below the original length and far beyond it, of text and with pictures."""
    folder = copy_with(tmp_path, family, with_rope(tiny_config(family), said))
    engine = engine_over(folder, num_blocks=128)
    assert isinstance(engine.runner.model.config.text.rope.scaling, kind)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    long = "What color is the circle? Count the objects, please. " * 5
    for messages, longer in (
        (ask("What?"), False),
        (ask(long), True),
        (ask(picture(1, 112, 112), "What?"), False),
        (ask(long, picture(2, 112, 84), "and", picture(3, 56, 112), long), True),
    ):
        prompt = engine.processor.build(messages)
        assert longer == (prompt.positions.max() > ORIGINAL)
        tokens, logits = greedy(model, prompt, engine.runner.pixel_format, 4)
        with RecordedLogits(engine.runner) as recorded:
            (completion,) = engine.generate([prompt], SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert list(completion.token_ids[0]) == tokens
        assert (torch.cat(recorded.logits) - logits).abs().max() <= 1e-4 * logits.abs().max()
