"""The tiny trained checkpoints by recipes with `device: npu_emulated`: the CPU backend's answers."""

import json

import pytest
import torch

from dataset import shapes
from executor.apps.build import build_engine
from executor.config import build_recipe
from executor.device.npu.soc import SOCS
from executor.request import SamplingParams
from tests.device.inside.npu import CPU, engine_on
from tests.models.test_tiny import CONVENTION, HELD_OUT_SEED, messages
from tests.reference import FAMILIES, REPO

NUM_SAMPLES = 200
ANSWER = SamplingParams(max_new_tokens=64, temperature=0.0)
MEDIA = REPO / "dataset" / "media"


def emulated(family: str, soc: str):
    model = {"model_path": str(REPO / "models" / "tiny" / family), "device": "npu_emulated", "soc": soc}
    settings = {"max_model_len": 1024, "block_size": 16, "max_num_seqs": 32, "num_blocks": 512}
    return build_engine(build_recipe({"model_config": model, "scheduler_config": settings}))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(family, samples, prompts, the CPU's fp32 answers) of held-out samples."""
    name, folder = request.param, tmp_path_factory.mktemp("media")
    engine = engine_on(CPU, REPO / "models" / "tiny" / name, torch.float32, max_num_seqs=32, num_blocks=512)
    samples = shapes.held_out(HELD_OUT_SEED + 2, NUM_SAMPLES)
    prompts = [engine.processor.build(messages(sample, folder)) for sample in samples]
    return name, samples, prompts, [done.text for done in engine.generate(prompts, ANSWER)]


def accuracy(name, samples, texts) -> float:
    marks = [s.question.is_right(t, CONVENTION[name]) for s, t in zip(samples, texts, strict=True)]
    return sum(marks) / len(marks)


@pytest.mark.parametrize("soc", SOCS)
def test_no_less_is_right(family, soc) -> None:
    name, samples, prompts, wanted = family
    engine = emulated(name, soc)
    texts = [done.text for done in engine.generate(prompts, ANSWER)]
    same = sum(one == other for one, other in zip(texts, wanted, strict=True))
    print(f"{name} {soc}: right {accuracy(name, samples, texts):.3f}, CPU {accuracy(name, samples, wanted):.3f}, "
          f"same answer {same} of {NUM_SAMPLES}")  # fmt: skip
    assert accuracy(name, samples, texts) >= accuracy(name, samples, wanted) - 0.005
    assert same >= 0.97 * NUM_SAMPLES
