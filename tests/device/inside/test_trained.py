"""The tiny trained checkpoints by recipes with `device: npu_emulated`: the CPU backend's answers."""

import functools
import json
from itertools import product

import pytest
import torch

from executor.commands.build import build_engine
from executor.device.npu.soc import SOCS
from executor.recipe.schema import build_recipe
from executor.schedule.request import SamplingParams
from models.tiny.training import world as shapes
from tests.cases import mostly_long
from tests.device.inside.npu import A2, A3, CPU, DUO, engine_on, fast_products
from tests.models.test_tiny import CONVENTION, HELD_OUT_SEED, messages
from tests.reference import FAMILIES, REPO

NUM_SAMPLES = 200
ANSWER = SamplingParams(max_new_tokens=64, temperature=0.0)


def emulated(family: str, soc: str):
    """An engine as the recipe makes it."""
    fast_products()
    model = {"model_path": str(REPO / "models" / "tiny" / family), "device": "npu_emulated", "soc": soc}
    settings = {"max_model_len": 1024, "block_size": 16, "max_num_seqs": 32, "num_blocks": 512}
    return build_engine(build_recipe({"model_config": model, "scheduler_config": settings}))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(family, held-out samples, prompts, the CPU's answers in a dtype)."""
    name, folder = request.param, tmp_path_factory.mktemp("media")
    samples = shapes.held_out(HELD_OUT_SEED + 2, NUM_SAMPLES)
    engine = engine_on(CPU, REPO / "models" / "tiny" / name, torch.float32)
    prompts = [engine.processor.build(messages(sample, folder)) for sample in samples]

    @functools.cache
    def wanted(dtype: torch.dtype) -> list[str]:
        engine = engine_on(CPU, REPO / "models" / "tiny" / name, dtype, max_num_seqs=32, num_blocks=512)
        return [done.text for done in engine.generate(prompts, ANSWER)]

    return name, samples, prompts, wanted


def accuracy(name, samples, texts) -> float:
    marks = [s.question.is_right(t, CONVENTION[name]) for s, t in zip(samples, texts, strict=True)]
    return sum(marks) / len(marks)


@pytest.mark.parametrize(  # the other test asks every family of every chip, of few pictures and word for word
    "family, soc",
    mostly_long(product(FAMILIES, SOCS), [("qwen2_5_vl", A3), ("qwen3_vl", DUO), ("qwen3_vl_moe", A2)]),
    indirect=["family"],
)
def test_answers_are_the_cpus(family, soc) -> None:
    """A2 and A3 in bf16, 300I DUO in fp16, as the recipe settles them; the CPU in the same type."""
    name, samples, prompts, answers = family
    dtype = SOCS[soc].dtypes[0]
    wanted = answers(dtype)
    engine = emulated(name, soc)  # the last engine made binds its backend
    assert engine.runner.dtype == dtype
    texts = [done.text for done in engine.generate(prompts, ANSWER)]
    same = sum(one == other for one, other in zip(texts, wanted, strict=True))
    right, true = accuracy(name, samples, texts), accuracy(name, samples, wanted)
    print(f"{name} {soc}: right {right:.3f}, CPU {true:.3f}, same answer {same} of {NUM_SAMPLES}")
    assert right >= true - 0.005
    assert same >= (0.99 if dtype is torch.float16 else 0.97) * NUM_SAMPLES


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_of_the_repository(name) -> None:
    """The questions about the pictures in dataset/media, greedy, on every chip: word for word the CPU's."""
    cpu = {}
    for soc in SOCS:
        engine = emulated(name, soc)
        if engine.runner.dtype not in cpu:
            prompts = [engine.processor.build(turn) for turn in repository_questions()]
            reference = engine_on(CPU, REPO / "models" / "tiny" / name, engine.runner.dtype)
            cpu[engine.runner.dtype] = [done.text for done in reference.generate(prompts, ANSWER)]
            engine = emulated(name, soc)  # the last engine made binds its backend
        texts = [done.text for done in engine.generate(prompts, ANSWER)]
        assert texts == cpu[engine.runner.dtype], soc


def repository_questions() -> list[list[dict]]:
    turns = []
    for file, questions in json.loads((REPO / "dataset" / "media" / "questions.json").read_text()).items():
        kind = "video" if file.endswith(".mp4") else "image"
        media = {"type": kind, kind: str(REPO / "dataset" / "media" / file)}
        turns += [[{"role": "user", "content": [media, {"type": "text", "text": q["question"]}]}] for q in questions]
    return turns
