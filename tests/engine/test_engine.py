"""The engine's promises, over the tiny trained Qwen3-VL and its sample files."""

import itertools
import re
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from executor.errors import UserError
from executor.schedule.plan import Plan, Row
from executor.schedule.request import FinishReason, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO

MEDIA = REPO / "dataset" / "media"
DESCRIBE = SamplingParams(max_new_tokens=48)
NOISY = SamplingParams(max_new_tokens=24, temperature=3.0, seed=11, ignore_eos=True)


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


def test_requests_beside_a_stream_keep_their_outputs(engine, describe):
    other = engine.add(describe, replace(DESCRIBE, max_new_tokens=3))
    list(engine.stream(describe, DESCRIBE))
    assert engine.has_work and not engine.scheduler.has_work
    outputs = engine.step()
    assert {output.request_id for output in outputs} == {other}
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1] and outputs[-1].finished


def test_streams_and_generate_may_be_mixed(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    first, second = engine.stream(describe, DESCRIBE), engine.stream(describe, DESCRIBE)
    texts = ["", ""]
    for one, two in zip(first, second, strict=True):
        texts[0] += one.text_delta
        texts[1] += two.text_delta
    assert texts == [whole.text] * 2
    stream = engine.stream(describe, DESCRIBE)
    begun = [next(stream)]
    (again,) = engine.generate([describe], DESCRIBE)
    assert "".join(output.text_delta for output in [*begun, *stream]) == again.text == whole.text


def test_an_aborted_request_ends_its_stream_and_leaves_no_outputs(engine, describe):
    dropped = engine.add(describe, DESCRIBE)
    stream = engine.stream(describe, DESCRIBE)
    next(stream)
    engine.abort(dropped)
    engine.abort(next(stream).request_id)
    (last,) = stream
    assert last.finish_reason is FinishReason.ABORT and not engine.has_work


@pytest.mark.parametrize("reason", [KeyboardInterrupt, AssertionError])
def test_an_interrupted_call_leaves_nothing_running(engine, describe, monkeypatch, reason):
    def fail(plan):
        raise reason

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(reason):
        engine.generate([describe, describe], DESCRIBE)
    assert not engine.has_work
    with pytest.raises(reason):
        list(engine.stream(describe, DESCRIBE))


def fails_for(monkeypatch, owner, name: str, is_bad, error: Exception | None = None):
    """Let a method fail wherever its first argument is bad."""
    method = getattr(owner, name)

    def failing(first, *rest):
        if is_bad(first):
            raise error or RuntimeError("out of memory")
        return method(first, *rest)

    monkeypatch.setattr(owner, name, failing)


def plain(engine, color: str):
    picture = {"type": "image", "image": Image.new("RGB", (128, 128), color)}
    return engine.processor.build([{"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}])


def test_a_picture_that_cannot_be_encoded_fails_its_requests_alone(engine, monkeypatch):
    bad, good, params = plain(engine, "red"), plain(engine, "green"), replace(DESCRIBE, max_new_tokens=6)
    encode, seen = engine.runner.encode, []

    def failing(media):
        seen.append(len(media))
        if bad.media[0] in media:
            raise RuntimeError("out of memory\nand a long trace")
        encode(media)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "encode", failing)
        first, other, text, last = engine.generate([bad, good, "What do you see?", bad], params)
    assert seen[:3] == [2, 1, 1], "together, then each by itself"
    for failed in (first, last):
        assert (failed.finish_reason, failed.text) == (FinishReason.ERROR, "")
        assert failed.error == "a PIL picture cannot be encoded: RuntimeError: out of memory"
    assert other.error is None and text.error is None
    (again, mended) = engine.generate([good, bad], params)
    assert again.token_ids == other.token_ids and mended.error is None and mended.text


def test_a_row_that_fails_fails_alone(engine, describe, monkeypatch):
    (whole,) = engine.generate([describe], DESCRIBE)
    bad = ask(engine, "Count the objects.", "objects_2.jpg")
    fails_for(
        monkeypatch, engine.runner, "forward",
        lambda plan: any(row.request.prompt is bad and row.request.output_token_ids for row in plan.rows),
    )  # fmt: skip
    first, failed, last = engine.generate([describe, bad, describe], DESCRIBE)
    assert first.token_ids == last.token_ids == whole.token_ids
    assert failed.finish_reason is FinishReason.ERROR and failed.completion_tokens == 1
    assert failed.error == "its step failed: RuntimeError: out of memory"


def test_logits_that_are_not_finite_fail_their_request_alone(engine, describe, monkeypatch):
    (whole,) = engine.generate([describe], DESCRIBE)
    forward, bad = engine.runner.forward, ask(engine, "Count the objects.", "objects_2.jpg")

    def overflowing(plan):
        logits = forward(plan).clone()
        for place, row in enumerate(row for row in plan.rows if row.max_yield):
            if row.request.prompt is bad and len(row.request.output_token_ids) == 1:
                logits[place] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "forward", overflowing)
    first, failed = engine.generate([describe, bad], replace(DESCRIBE, logprobs=1))
    assert first.token_ids == whole.token_ids and first.error is None
    assert failed.finish_reason is FinishReason.ERROR and "not finite" in failed.error
    assert engine.runner.sampler.dtype is engine.runner.dtype and "float16" not in failed.error
    assert len(failed.token_ids[0]) == len(failed.logprobs[0]) == 1


def test_tokens_that_are_no_text_fail_their_request_alone(engine, describe, monkeypatch):
    stream = engine.stream(describe, DESCRIBE)
    request_id = next(stream).request_id
    detokenizer = engine._answers[f"{request_id}/0"].detokenizer
    fails_for(monkeypatch, detokenizer, "push", lambda token_ids: True, KeyError("x"))
    (other,) = engine.generate([describe], DESCRIBE)
    assert other.error is None
    (last,) = [output for output in stream if output.finished]
    assert last.finish_reason is FinishReason.ERROR and "its tokens cannot be read as text: KeyError" in last.error


class ManyTokens:
    """A runner that finds several tokens a step: it runs further steps of the same plan by itself."""

    def __init__(self, engine, monkeypatch, counts) -> None:
        self.counts = itertools.cycle(counts)
        self.execute = engine.runner.execute
        monkeypatch.setattr(engine.scheduler, "max_yield", 4)
        monkeypatch.setattr(engine.runner, "execute", self)

    def __call__(self, plan):
        result = self.execute(Plan(tuple(row._replace(max_yield=min(1, row.max_yield)) for row in plan.rows),
                                   plan.encode, plan.release))  # fmt: skip
        for number, row in enumerate(plan.rows):
            request, new = row.request, result.token_ids[number]
            for _ in range(min(next(self.counts), row.max_yield) - 1):
                request.output_token_ids.append(new[-1])
                more = self.execute(Plan((Row(request, request.num_tokens - 1, 1, 1),)))
                new += more.token_ids[0]
                if more.logprobs:
                    result.logprobs[number] += more.logprobs[0]
            del request.output_token_ids[len(request.output_token_ids) - max(0, len(new) - 1) :]
        return result


@pytest.mark.parametrize("change", [{}, {"stop": "e at t"}, {"max_new_tokens": 7, "ignore_eos": True}, {"logprobs": 2}])
@pytest.mark.parametrize("params", [DESCRIBE, NOISY])
def test_several_tokens_a_step_are_the_same_answer(engine, describe, monkeypatch, params, change):
    params = replace(params, **change)
    wanted = engine.generate([describe, describe], params)
    ManyTokens(engine, monkeypatch, (1, 3, 4, 2))
    found = engine.generate([describe, describe], params)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert ours.logprobs == theirs.logprobs
    outputs = list(engine.stream(describe, params))
    assert "".join(output.text_delta for output in outputs) == wanted[0].text
    assert max(len(output.token_ids) for output in outputs) > 1
    assert tuple(token for output in outputs for token in output.token_ids) == wanted[0].token_ids[0]


def test_two_threads_at_once_are_an_error(engine, describe, monkeypatch):
    inside, leave = threading.Event(), threading.Event()
    execute = engine.runner.execute

    def slow(plan):
        inside.set()
        assert leave.wait(10)
        return execute(plan)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", slow)
        dropped = engine.add(describe, DESCRIBE)
        thread = threading.Thread(target=engine.step)
        thread.start()
        assert inside.wait(10)
        for call in (engine.step, lambda: engine.add(describe, DESCRIBE), lambda: engine.generate([describe], NOISY)):
            with pytest.raises(RuntimeError, match="two threads use this engine at the same time"):
                call()
        engine.abort(dropped)  # may come from anywhere
        leave.set()
        thread.join()
    assert not engine.has_work


def test_a_closed_engine_is_an_error(describe):
    with engine_over(REPO / "models" / "tiny" / "qwen3_vl") as engine:
        engine.add(describe, DESCRIBE)
        next(engine.stream(describe, DESCRIBE))
    assert not engine.scheduler.has_work and not engine.runner.features
    engine.close()
    for call in (engine.step, lambda: engine.generate([describe], DESCRIBE), lambda: next(engine.stream("?", NOISY))):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()


def test_texts_and_conversations_are_questions(engine):
    messages = [{"role": "user", "content": "Count the objects."}]
    prompt = engine.processor.build(messages)
    params = replace(DESCRIBE, max_new_tokens=4)
    for questions in ([prompt], prompt, messages, [messages], "Count the objects.", ["Count the objects."]):
        (found,) = engine.generate(questions, params)
        assert found.prompt_tokens == len(prompt.token_ids)
    assert [output.finished for output in engine.stream("Count the objects.", params)][-1]


@pytest.mark.parametrize("questions, words", [
    ([3], "a prompt is of type int: 3; allowed: a Prompt"),
    ([["a", "b"]], "a prompt is a list of str"),
    (7, "prompts are of type int"),
])  # fmt: skip
def test_other_things_are_no_prompts(engine, questions, words):
    with pytest.raises(UserError, match=words):
        engine.generate(questions, DESCRIBE)


def test_as_many_params_as_prompts(engine, describe):
    with pytest.raises(UserError, match="2 prompts and 1 params; give one SamplingParams for all"):
        engine.generate([describe, describe], [DESCRIBE])


@pytest.mark.parametrize("params, words", [
    ([{"temperature": 0}], r"params are of type dict: {'temperature': 0}; allowed: a SamplingParams\(...\)"),
    ([None], "params are of type NoneType: None; allowed: a SamplingParams"),
    (None, "params are of type NoneType: None; allowed: one SamplingParams"),
    ({"temperature": 0}, "params are of type dict: {'temperature': 0}; allowed: one SamplingParams"),
    ("greedy", "params are of type str: greedy; allowed: one SamplingParams"),
    (7, "params are of type int: 7; allowed: one SamplingParams"),
    (SamplingParams, "params are the class SamplingParams, not an object of it; allowed: one SamplingParams"),
    ([SamplingParams], "params are the class SamplingParams, not an object of it; allowed: a SamplingParams"),
])  # fmt: skip
def test_other_things_are_no_params(engine, describe, params, words):
    with pytest.raises(UserError, match=words):
        engine.generate([describe], params)
    single = params[0] if isinstance(params, list) else params
    for call in (lambda: engine.add(describe, single), lambda: next(engine.stream(describe, single))):
        with pytest.raises(UserError, match="params are .*; allowed: a SamplingParams"):
            call()


def test_a_refusal_leaves_nothing_queued(engine, describe):
    long = engine.processor.build([{"role": "user", "content": "red " * 2100}])
    for questions, params in (
        ([describe, long], DESCRIBE),
        ([describe, describe], [DESCRIBE, replace(DESCRIBE, top_p=7)]),
        ([describe, 5], DESCRIBE),
        ([long], replace(NOISY, n=3)),
    ):
        with pytest.raises(UserError):
            engine.generate(questions, params)
        assert not engine.has_work


def test_without_a_seed_every_request_has_another_and_greedy_answers_are_the_same(engine, describe):
    free = replace(NOISY, seed=None)
    first, second = engine.generate([describe, describe], free)
    assert first.token_ids != second.token_ids and first.seed != second.seed
    (again,) = engine.generate([describe], replace(NOISY, seed=first.seed))
    assert (again.token_ids, again.seed) == (first.token_ids, first.seed)
    assert engine.generate([describe], NOISY)[0].seed == NOISY.seed
    several = replace(free, n=3, max_new_tokens=4)
    (three,) = engine.generate([describe], several)
    assert engine.generate([describe], replace(several, seed=three.seed))[0].token_ids == three.token_ids
    assert engine.generate([describe], SamplingParams(max_new_tokens=1))[0].seed == 0
    assert len({completion.token_ids for completion in engine.generate([describe] * 2, SamplingParams())}) == 1


def test_the_published_temperature_of_qwen2_5_gives_the_greedy_answer(engine, describe):
    greedy = replace(DESCRIBE, repetition_penalty=1.05)
    (expected,) = engine.generate([describe], greedy)
    for temperature in (1e-6, 5e-324):
        sampled = [replace(greedy, temperature=temperature, seed=seed) for seed in (1, 2)]
        assert [each.text for each in engine.generate([describe] * 2, sampled)] == [expected.text] * 2


def test_one_stop_is_a_list_of_one():
    assert SamplingParams(stop="top", stop_token_ids=3) == SamplingParams(stop=["top"], stop_token_ids=[3])
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


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
    """As vLLM has it, the token that ends an answer is counted, and no part of its text."""
    (whole,) = engine.generate([describe], DESCRIBE)
    token = whole.token_ids[0][4]
    ended = replace(DESCRIBE, stop_token_ids=(token,))
    cut, kept = engine.generate([describe] * 2, [ended, replace(ended, include_stop_str_in_output=True)])
    token_ids = list(whole.token_ids[0][: whole.token_ids[0].index(token) + 1])
    assert list(cut.token_ids[0]) == list(kept.token_ids[0]) == token_ids
    assert cut.finish_reason is kept.finish_reason is FinishReason.STOP
    decode = engine.processor.tokenizer.decode
    assert (cut.text, kept.text) == (decode(token_ids[:-1]), decode(token_ids)) and cut.text != kept.text


def test_special_tokens_and_stop_strings_stay_in_the_text_where_wanted(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    shown = replace(DESCRIBE, skip_special_tokens=False)
    found, ended, on = engine.generate(
        [describe] * 3,
        [
            shown,
            replace(shown, include_stop_str_in_output=True),
            replace(shown, ignore_eos=True, max_new_tokens=len(whole.token_ids[0]) + 1),
        ],
    )
    assert found.text == whole.text and ended.text == whole.text + "<|im_end|>"
    assert on.text.startswith(ended.text) and on.finish_reason is FinishReason.LENGTH
    stopped = replace(DESCRIBE, stop="top right", include_stop_str_in_output=True)
    (kept,) = engine.generate([describe], stopped)
    assert kept.text == whole.text.split("top right")[0] + "top right"
    pieces = [output.text_delta for output in engine.stream(describe, stopped)]
    assert "".join(pieces) == kept.text


def test_a_minimum_holds_for_stop_strings_too(engine, describe):
    (whole,) = engine.generate([describe], DESCRIBE)
    (cut,) = engine.generate([describe], replace(DESCRIBE, stop="e"))
    assert 0 < cut.completion_tokens < 10
    (least,) = engine.generate([describe], replace(DESCRIBE, stop="e", min_new_tokens=10))
    assert 10 < least.completion_tokens < whole.completion_tokens
    begun = engine.processor.tokenizer.decode(whole.token_ids[0][:10])
    assert "e" in begun and least.text == begun + whole.text.removeprefix(begun).split("e")[0]


def test_bad_words_bias_and_allowed_tokens_hold_in_an_answer(engine, describe):
    """Together as alone, and an answer beside them is what it was."""
    (whole,) = engine.generate([describe], DESCRIBE)
    tokenizer = engine.processor.tokenizer
    word = next(word for word in whole.text.split() if word.isalpha() and len(word) > 3)
    digits = tuple(tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789")
    params = [
        DESCRIBE,
        replace(DESCRIBE, bad_words=word),
        replace(DESCRIBE, logit_bias={whole.token_ids[0][0]: -100}),
        replace(DESCRIBE, allowed_token_ids=digits, max_new_tokens=12, temperature=1.0, seed=4),
        replace(DESCRIBE, logit_bias={digits[7]: 100}, max_new_tokens=5),
    ]
    plain, worded, biased, numbers, sevens = engine.generate([describe] * 5, params)
    assert plain.token_ids == whole.token_ids
    assert word in whole.text and word not in worded.text
    assert biased.token_ids[0][0] != whole.token_ids[0][0]
    assert numbers.text.isdigit() and len(numbers.text) == 12 and len(set(numbers.text)) > 1
    assert sevens.text == "77777"
    for one, found in zip(params[1:], (worded, biased, numbers, sevens), strict=True):
        assert engine.generate([describe], one)[0].token_ids == found.token_ids


def test_allowed_tokens_that_are_all_ruled_out_are_refused(engine, describe):
    end = engine.processor.eos_token_ids[0]
    for change in ({"min_new_tokens": 1}, {"bad_words": engine.processor.tokenizer.decode([end])}):
        with pytest.raises(UserError, match="allowed_token_ids holds only tokens that bad_words, or min_new_tokens"):
            engine.generate([describe], replace(DESCRIBE, allowed_token_ids=[end], **change))
    (empty,) = engine.generate([describe], replace(DESCRIBE, allowed_token_ids=[end]))
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", ((end,),), FinishReason.STOP)


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


def test_a_completion_warns_of_damaged_media(engine, describe):
    whole = describe.media[0]
    damaged = [replace(whole, warnings=warnings) for warnings in (("a.png: cut off",), (), ("b", "c"))]
    pictures = [{"type": "image", "image": str(MEDIA / "objects.png")}] * 3
    prompt = engine.processor.build([{"role": "user", "content": [*pictures, {"type": "text", "text": "What?"}]}])
    short = SamplingParams(max_new_tokens=1)
    found, sound = engine.generate([replace(prompt, media=tuple(damaged)), prompt], short)
    assert (found.warnings, sound.warnings) == (("a.png: cut off", "b", "c"), ())


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
        ({"stop_token_ids": "17"}, "stop_token_ids is '17'; allowed: a token id or a list"),
        ({"stop": 5}, "stop is 5; allowed: a string or a list of strings"),
        ({"stop": ""}, "stop holds ''"),
        ({"seed": 1.5}, "seed is 1.5; allowed: a whole number of 0 or more, or none"),
        ({"seed": -1}, "seed is -1; allowed: a whole number of 0 or more, or none"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; allowed: true or false"),
    ],
)
def test_bad_parameters_are_refused(engine, describe, change, message):
    with pytest.raises(UserError, match=message):
        engine.generate([describe], replace(DESCRIBE, **change))


def test_a_prompt_beyond_the_context_is_refused_and_harms_nobody(engine, describe):
    long = engine.processor.build([{"role": "user", "content": "red " * 2100}])
    engine.add(describe, DESCRIBE, "good")
    with pytest.raises(UserError, match="maximum context length is 2048 tokens, requested 2"):
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


@pytest.mark.parametrize("request_id", ["", 5, True, [1], b"a"])
def test_a_request_id_is_a_text(engine, describe, request_id):
    with pytest.raises(UserError, match=re.escape(f"request_id is {request_id!r}; allowed: a text that is not empty")):
        engine.add(describe, DESCRIBE, request_id)


def test_a_new_id_is_none_that_a_caller_uses(engine, describe):
    number = int(engine.add(describe, DESCRIBE).removeprefix("request-"))
    taken = engine.add(describe, DESCRIBE, f"request-{number + 1}")
    assert engine.add(describe, DESCRIBE) == f"request-{number + 2}"
    for request_id in (f"request-{number}", taken, f"request-{number + 2}"):
        engine.abort(request_id)
