"""The engine's promises, over the tiny trained Qwen3-VL and its sample files."""

from dataclasses import replace

import pytest
import torch

from executor.errors import UserError
from executor.schedule.request import FinishReason, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
DESCRIBE = SamplingParams(max_new_tokens=48)
NOISY = SamplingParams(max_new_tokens=24, temperature=3.0, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    return engine_over(REPO / "models" / "tiny" / "qwen3_vl", max_num_seqs=6)


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    assert not engine.has_work
    engine.scheduler.check()
    engine.runner.sampler.check(())


def ask(engine, text: str, *files: str):
    parts = [{"type": "image", "image": str(MEDIA / file)} for file in files]
    return engine.processor.build([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])


@pytest.fixture(scope="module")
def describe(engine):
    return ask(engine, "What do you see?", "objects.png")


def test_a_stream_is_the_answer_in_pieces(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    outputs = list(engine.stream(describe, DESCRIBE))
    assert "".join(output.text_delta for output in outputs) == whole.text
    assert [token for output in outputs for token in output.token_ids] == list(whole.token_ids[0])
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) > 5


def test_leaving_a_stream_frees_the_request(engine, describe):
    stream = engine.stream(describe, DESCRIBE)
    next(stream)
    assert engine.has_work
    stream.close()
    assert not engine.has_work


def test_other_requests_go_on_beside_a_stream(engine, describe):
    other = engine.add(describe, replace(DESCRIBE, max_new_tokens=3))
    list(engine.stream(describe, DESCRIBE))
    assert not any(answer.parent_id == other for answer in engine._answers.values())


@pytest.mark.parametrize("stop", ["top right", "e at t", "urple circ"])
def test_stop_strings_end_the_answer_before_them(engine, describe, stop):
    (whole,) = engine.generate([describe], DESCRIBE)
    assert stop in whole.text
    (cut,) = engine.generate([describe], replace(DESCRIBE, stop=(stop,)))
    assert cut.text == whole.text.split(stop)[0]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.completion_tokens < whole.completion_tokens


def test_a_text_held_back_for_a_stop_string_is_given_at_the_end(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    (same,) = engine.generate([describe], replace(DESCRIBE, stop=(whole.text[-5:] + "!",)))
    assert same.text == whole.text


def test_stop_token_ids(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    token = whole.token_ids[0][4]
    (cut,) = engine.generate([describe], replace(DESCRIBE, stop_token_ids=(token,)))
    assert list(cut.token_ids[0]) == list(whole.token_ids[0][: whole.token_ids[0].index(token) + 1])
    assert cut.finish_reason is FinishReason.STOP


def test_lengths(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    assert whole.finish_reason is FinishReason.STOP and whole.token_ids[0][-1] in engine.processor.eos_token_ids
    (short,) = engine.generate([describe], replace(DESCRIBE, max_new_tokens=5))
    assert short.finish_reason is FinishReason.LENGTH and short.token_ids[0] == whole.token_ids[0][:5]
    (on,) = engine.generate([describe], replace(DESCRIBE, ignore_eos=True, max_new_tokens=40))
    assert len(on.token_ids[0]) == 40 and on.token_ids[0][: len(whole.token_ids[0])] == whole.token_ids[0]
    (least,) = engine.generate([describe], replace(DESCRIBE, min_new_tokens=32, max_new_tokens=40))
    assert len(least.token_ids[0]) >= 32
    assert not set(least.token_ids[0][:31]) & set(engine.processor.eos_token_ids)


def test_a_seed_gives_the_same_answer_alone_and_in_any_batch(engine, describe):
    (alone,) = engine.generate([describe], NOISY)
    other = ask(engine, "Count the objects.", "objects_2.jpg")
    params = [replace(NOISY, seed=1), NOISY, DESCRIBE, replace(NOISY, seed=2, top_k=5)]
    batch = engine.generate([other, describe, other, describe], params)
    assert batch[1].token_ids == alone.token_ids
    assert batch[3].token_ids != alone.token_ids
    (again,) = engine.generate([describe], NOISY)
    assert again.token_ids == alone.token_ids


def test_n_answers_differ_and_the_first_is_that_of_one(engine, describe):
    (one,) = engine.generate([describe], NOISY)
    (three,) = engine.generate([describe], replace(NOISY, n=3))
    assert len(three.texts) == 3 and len(set(three.token_ids)) == 3
    assert three.token_ids[0] == one.token_ids[0]
    assert three.completion_tokens == 72


def test_logprobs_are_those_of_the_model(engine, describe):
    (completion,) = engine.generate([describe], replace(DESCRIBE, logprobs=3))
    entries = completion.logprobs[0]
    assert [entry.token_id for entry in entries] == list(completion.token_ids[0])
    for entry in entries:
        assert len(entry.top) == 3 and entry.top[0] == (entry.token_id, entry.logprob)  # greedy: the best is chosen
        assert entry.logprob <= 0
    (plain,) = engine.generate([describe], DESCRIBE)
    assert plain.token_ids == completion.token_ids and plain.logprobs == ([],)


def test_repetition_penalty_changes_the_answer(engine, describe):
    (plain,) = engine.generate([describe], DESCRIBE)
    (penalised,) = engine.generate([describe], replace(DESCRIBE, repetition_penalty=100.0))
    assert penalised.token_ids != plain.token_ids


def test_pictures_of_several_requests_are_encoded_together_and_once(engine):
    prompts = [ask(engine, "What do you see?", file) for file in ("number.jpg", "word.png", "number.jpg")]
    fresh = engine_over(REPO / "models" / "tiny" / "qwen3_vl", enable_prefix_caching=False)
    encoded = []
    encode = fresh.runner.model.encode
    fresh.runner.model.encode = lambda patches, grids: encoded.append(len(grids)) or encode(patches, grids)
    fresh.generate(prompts, DESCRIBE)
    fresh.generate(prompts, DESCRIBE)
    assert encoded == [2]


def test_a_video_in_several_passes_is_answered_as_in_one(engine):
    """And what is kept of small pictures that came together keeps nothing beside them alive."""
    clip = [{"type": "video", "video": str(MEDIA / "clip.mp4")}, {"type": "text", "text": "What do you see?"}]
    prompts = [ask(engine, "What do you see?", file) for file in ("objects.png", "word.png", "number.jpg")]
    prompts.append(engine.processor.build([{"role": "user", "content": clip}]))
    media = [item for prompt in prompts for item in prompt.media]
    runner = engine.runner
    usual, kept = runner.encode_tokens, runner.features
    try:
        runner.encode_tokens, runner.features = 16, {}
        assert any(item.num_tokens > 16 for item in media)
        for item in media:
            runner.encode([item])
        cut = runner.features
        runner.encode_tokens, runner.features = usual, {}
        runner.encode(media)
        for digest, features in runner.features.items():
            torch.testing.assert_close(features, cut[digest], rtol=1e-4, atol=1e-4)
            assert features.untyped_storage().nbytes() <= 1.1 * features.nbytes
        assert len(runner.features) == len(cut) == len(media)
    finally:
        runner.encode_tokens, runner.features = usual, kept


def test_a_text_only_step_makes_no_deepstack(engine):
    seen = []
    forward = engine.runner.model.forward
    engine.runner.model.forward = lambda x, meta: seen.append(meta.deepstack) or forward(x, meta)
    try:
        engine.generate([ask(engine, "Count the objects.")], replace(DESCRIBE, max_new_tokens=3))
    finally:
        del engine.runner.model.forward
    assert seen == [None] * len(seen) and seen


def test_times_and_counts(engine, describe):
    (completion,) = engine.generate([describe], DESCRIBE)
    assert completion.vision_tokens == 16 and completion.prompt_tokens == len(describe.token_ids)
    assert 0 < completion.ttft_s < completion.e2e_s
    assert completion.tpot_s == pytest.approx(
        (completion.e2e_s - completion.ttft_s) / (completion.completion_tokens - 1), rel=1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids"),
    ],
)
def test_bad_parameters_are_refused(engine, describe, change, message):
    with pytest.raises(UserError, match=message):
        engine.generate([describe], replace(DESCRIBE, **change))


def test_a_prompt_beyond_the_context_is_refused_and_harms_nobody(engine, describe):
    long = engine.processor.build([{"role": "user", "content": "red " * 2100}])
    engine.add(describe, DESCRIBE, "good")
    with pytest.raises(UserError, match="maximum context length is 2048 tokens, the prompt has 2"):
        engine.add(long, DESCRIBE)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"good"}


def test_abort_between_steps(engine, describe):
    kept, dropped = engine.add(describe, DESCRIBE), engine.add(describe, NOISY)
    engine.step()
    engine.abort(dropped)
    engine.abort("never heard of")
    seen = set()
    while engine.has_work:
        seen |= {output.request_id for output in engine.step()}
    assert seen == {kept}


def test_an_id_in_use_is_refused(engine, describe):
    engine.add(describe, DESCRIBE, "mine")
    with pytest.raises(UserError, match="in use"):
        engine.add(describe, DESCRIBE, "mine")
    engine.abort("mine")
