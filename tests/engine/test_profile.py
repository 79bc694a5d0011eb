"""A profile is a Chrome trace of the first steps, in which every stage has its place."""

import logging
from collections import Counter

import pytest

from executor.engine.loop import EngineLoop
from executor.engine.parts import parts
from executor.engine.stages import STAGES
from executor.schedule.request import SamplingParams
from tests.engine.traces import outer_of, read_spans
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO

ANSWER = SamplingParams(max_new_tokens=6, ignore_eos=True)
STEPS = 4


def question(file: str) -> list[dict]:
    picture = {"type": "image", "image": str(REPO / "dataset" / "media" / file)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "What do you see?"}]}]


def profiled(folder, family="qwen3_vl", **model):
    model = {"profile": True, "profile_steps": STEPS, "output_path": str(folder)} | model
    return engine_over(REPO / "models" / "tiny" / family, model=model, max_num_seqs=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_and_part_is_in_the_trace_in_its_place(tmp_path, family, caplog):
    caplog.set_level(logging.INFO)
    with profiled(tmp_path, family) as engine:
        engine.generate([question("objects.png")], ANSWER)
        model = engine.runner.model
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name.startswith(f"{family}_") and file.name.endswith("_rank_00.json")
    assert f"the profile of {STEPS} steps is in {file}; open it in https://ui.perfetto.dev" in caplog.text
    names = set(parts(model))
    pairs = Counter(outer_of(read_spans(file, {*STAGES, *names})))
    assert {name for name, _ in pairs} == {*STAGES, *names} - {"draft"}
    assert pairs["media", None] == 1
    assert pairs["prefill", "host"] + pairs["decode", "host"] == pairs["sampling", "host"] == STEPS
    assert pairs["vision", "host"] == pairs["vision block 0", "vision"] == pairs["vision merger", "vision"] == 1
    assert pairs["layer 0", "prefill"] == pairs["head", "prefill"] == 1
    assert pairs["layer 1", "decode"] == pairs["head", "decode"] == STEPS - 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_later_steps_are_not_recorded(tmp_path):
    with profiled(tmp_path) as engine:
        engine.generate([question("objects.png")], ANSWER)
        (file,) = (tmp_path / "profile").iterdir()
        written = file.stat()
        engine.generate([question("word.png")], ANSWER)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.stat() == written


def test_a_loop_writes_what_there_is_and_leaves_a_warm_up_out(tmp_path):
    engine = profiled(tmp_path, profile_steps=1000)
    engine.runner.hold_profile(True)
    with EngineLoop(engine).start() as loop:
        loop.submit(lambda: engine.processor.build(question("objects.png")), ANSWER).result(60)
        engine.runner.hold_profile(False)
        loop.submit(lambda: engine.processor.build(question("word.png")), ANSWER).result(60)
    (file,) = (tmp_path / "profile").iterdir()
    spans = read_spans(file, set(STAGES))
    assert sum(span.name in ("prefill", "decode") for span in spans) == ANSWER.max_new_tokens
    assert {name for name, _ in outer_of(spans)} == {*STAGES} - {"draft"}
    media, step = (next(span for span in spans if span.name == name) for name in ("media", "prefill"))
    assert media.thread != step.thread and media.end_us < step.start_us


def test_an_engine_without_steps_writes_nothing(tmp_path):
    with profiled(tmp_path):
        pass
    assert not list((tmp_path / "profile").iterdir())


def test_without_the_key_there_is_no_profile(tmp_path):
    with profiled(tmp_path, profile=False) as engine:
        engine.generate([question("objects.png")], ANSWER)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_keeps_nobody_from_answering(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    with profiled(tmp_path) as engine:
        (answer,) = engine.generate([question("objects.png")], ANSWER)
    assert answer.error is None and len(answer.token_ids[0]) == ANSWER.max_new_tokens
    assert f"no profile: {tmp_path / 'profile'} cannot be made (File exists)" in caplog.text


def test_an_interrupted_loop_writes_what_there_is(tmp_path):
    engine = profiled(tmp_path)
    with pytest.raises(KeyboardInterrupt), EngineLoop(engine) as loop:
        loop.submit(lambda: engine.processor.build(question("objects.png")), ANSWER)
        while not engine.runner.clock.num_prefill_steps:
            loop.turn(0.05)
        raise KeyboardInterrupt
    (file,) = (tmp_path / "profile").iterdir()
    assert {span.name for span in read_spans(file, set(STAGES))} >= {"prefill", "sampling"}
