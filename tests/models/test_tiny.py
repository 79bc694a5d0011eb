"""The tiny trained checkpoints, by our own engine: they know their little world; transformers agrees word for word."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from executor.evaluate.scoring.boxes import boxes_in, iou
from executor.schedule.request import SamplingParams
from models.tiny.training import world as shapes
from models.tiny.training.configs import store_experts_as_published
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO, greedy

CONVENTION = {"qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3"}
NUM_SAMPLES = 250
HELD_OUT_SEED = 4000


def messages(sample: shapes.Sample, folder: Path) -> list[dict]:
    """The sample's question beside its picture or clip, as real PNG, JPEG and MP4 files."""
    file = folder / ("clip.mp4" if sample.scene.is_clip else f"picture.{('png', 'jpg')[len(sample.question.text) % 2]}")
    if sample.scene.is_clip:
        shapes.write_clip(sample.scene, file)
    else:
        shapes.write_picture(sample.scene, file)
    kind = "video" if sample.scene.is_clip else "image"
    media = {"type": kind, kind: file.read_bytes()}
    return [{"role": "user", "content": [media, {"type": "text", "text": sample.question.text}]}]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request):
    engine = engine_over(REPO / "models" / "tiny" / request.param, max_num_seqs=32, num_blocks=2048)
    engine.family = request.param
    return engine


def test_held_out_samples(engine, tmp_path):
    samples = shapes.held_out(HELD_OUT_SEED, NUM_SAMPLES)
    prompts = [engine.processor.build(messages(sample, tmp_path)) for sample in samples]
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=64))
    convention = CONVENTION[engine.family]
    right, boxes = defaultdict(list), []
    for sample, answer in zip(samples, answers, strict=True):
        right[sample.question.kind].append(sample.question.is_right(answer.text, convention))
        if sample.question.kind == "box":
            said, (true,) = boxes_in(answer.text), boxes_in(sample.question.answer_for(convention))
            boxes.append(bool(said) and iou(said[0], true) >= 0.5)
    scores = {kind: sum(marks) / len(marks) for kind, marks in right.items()}
    assert set(scores) == set(shapes.KINDS)
    assert sum(map(sum, right.values())) >= 0.95 * NUM_SAMPLES, scores
    assert min(scores.values()) >= 0.85, scores
    assert scores["motion"] >= 0.95, scores
    assert sum(boxes) >= 0.9 * len(boxes)


def test_transformers_gives_the_same_answers(engine, tmp_path):
    folder = REPO / "models" / "tiny" / engine.family
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    samples = shapes.held_out(HELD_OUT_SEED + 1, 44)
    prompts = [engine.processor.build(messages(sample, tmp_path)) for sample in samples]
    for prompt, ours in zip(prompts, engine.generate(prompts, SamplingParams(max_new_tokens=64)), strict=True):
        tokens = list(ours.token_ids[0])
        wanted, _ = greedy(model, prompt, engine.runner.pixel_format, len(tokens))
        assert tokens == wanted


def test_experts_are_stored_as_published(tmp_path):
    """[E, H, 2I] and [E, I, H]; what transformers saves, [E, 2I, H] and [E, H, I], the export turns."""
    file = REPO / "models" / "tiny" / "qwen3_vl_moe" / "model.safetensors"
    layers = [f"model.language_model.layers.{layer}.mlp.experts." for layer in range(3)]
    stored = load_file(file)
    assert {tuple(stored[f"{layer}gate_up_proj"].shape) for layer in layers} == {(4, 256, 288)}
    assert {tuple(stored[f"{layer}down_proj"].shape) for layer in layers} == {(4, 144, 256)}
    saved = {name: tensor.transpose(-1, -2).contiguous() for name, tensor in stored.items() if ".experts." in name}
    rest = {name: tensor for name, tensor in stored.items() if name not in saved}
    save_file(saved | rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    store_experts_as_published(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == file.read_bytes()


def test_checkpoints_are_small(engine):
    folder = REPO / "models" / "tiny" / engine.family
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 10e6
