"""Captured hidden states: transformers' own on random models, whatever the chunks, and nothing is left behind."""

import pytest
import torch

from executor.evaluate.capture import PROCESSOR, capture, stage_names
from executor.evaluate.layers import Differences
from executor.evaluate.reference import Reference
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO, random_checkpoint

MEDIA = REPO / "dataset" / "media"


def prompt_of(engine, *files: str):
    kinds = {"png": "image", "jpg": "image", "mp4": "video"}
    parts = [{"type": kinds[file[-3:]], kinds[file[-3:]]: str(MEDIA / file)} for file in files]
    return engine.processor.build([{"role": "user", "content": [*parts, {"type": "text", "text": "What is here?"}]}])


@pytest.fixture(scope="module", params=FAMILIES)
def sides(request, tmp_path_factory):
    """An engine and transformers over one random float32 checkpoint."""
    folder = random_checkpoint(tmp_path_factory.mktemp("random"), request.param)
    engine = engine_over(folder)
    return engine, Reference(folder, engine.processor)


@pytest.mark.parametrize(
    "files",
    [
        ("objects.png",),
        ("clip.mp4", "word.png", "objects.png", "word.png"),  # a video before pictures, one of them twice
        (),
    ],
)
def test_every_stage_is_transformers(sides, files):
    engine, reference = sides
    prompt = prompt_of(engine, *files)
    found = Differences("float32")
    sources = [str(MEDIA / file) for file in files]
    ours = capture(engine, prompt)
    found.add(ours, reference.capture(prompt, sources))
    wanted = stage_names(engine.runner.model)
    if not files:
        wanted = [name for name in wanted if "vision" not in name and name != "patches"]
    assert list(ours) == wanted
    per_token = ("token ids", "positions", "merged embeddings", "layer 0", "layer 2", "final norm")
    assert {len(ours[name]) for name in per_token} == {len(prompt.token_ids)}
    assert set(found.left_out) <= set(PROCESSOR)
    if "clip.mp4" not in files:
        assert not {"positions", "patches"} & set(found.left_out)
    for stage in found.stages:
        assert not stage.is_above and stage.relative <= 1e-4, stage


def test_chunks_and_passes_make_no_difference(sides):
    engine, _ = sides
    prompt = prompt_of(engine, "objects.png", "clip.mp4")
    whole = capture(engine, prompt)
    scheduler, runner = engine.scheduler, engine.runner
    before = scheduler.max_num_batched_tokens, runner.encode_tokens
    scheduler.max_num_batched_tokens, runner.encode_tokens = 7, 8
    try:
        in_pieces = capture(engine, prompt)
    finally:
        scheduler.max_num_batched_tokens, runner.encode_tokens = before
    found = Differences("float32")
    found.add(in_pieces, whole)
    assert list(in_pieces) == list(whole) and not found.left_out
    for stage in found.stages:
        assert not stage.is_above and stage.relative <= 1e-5, stage


def test_the_logits_are_those_that_the_answer_begins_with(sides):
    engine, _ = sides
    prompt = prompt_of(engine, "objects.png")
    states = capture(engine, prompt)
    assert states["logits"].shape == (1, engine.vocab_size)
    (answer,) = engine.generate([prompt], SamplingParams(max_new_tokens=1, temperature=0.0))
    assert int(states["logits"].argmax()) == answer.token_ids[0][0]
    model = engine.runner.model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(x.device == torch.device("cpu") for x in states.values())
