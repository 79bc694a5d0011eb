"""A smaller model drafts: answers are those without it, and what it computes is what it lacks."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from executor.engine.speculation import draft_model
from executor.engine.speculation.draft_model import ComputedBlocks
from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import SamplingParams
from tests.engines import engine_over
from tests.reference import FAMILIES, REPO, config_of, random_checkpoint, random_model, save_checkpoint, tokenizer_of
from tests.schedule.fakes import request

TINY = REPO / "models" / "tiny"
MEDIA = REPO / "dataset" / "media"
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
NOISY = replace(GREEDY, temperature=1.5, top_p=0.95, seed=3)
QUESTIONS = (
    ("Describe the picture.", "image", "objects.png"),
    ("What moves?", "video", "clip.mp4"),
    ("What word is written?", "image", "word.png"),
    ("Count from one to twenty.", "", ""),
)


def drafting(family, draft=None, num_speculative_tokens=4, **scheduler):
    """An engine of a tiny model, with `draft` (None: the same one) as its draft model."""
    speculative = {
        "method": "draft",
        "model_path": str(draft or TINY / family),
        "num_speculative_tokens": num_speculative_tokens,
        "adaptive": False,
    }
    return engine_over(TINY / family, speculative=speculative, **scheduler)


def prompts_of(engine, questions=QUESTIONS):
    return [
        engine.prompt(
            [
                {
                    "role": "user",
                    "content": [
                        *([{"type": kind, kind: str(MEDIA / file)}] if kind else []),
                        {"type": "text", "text": text},
                    ],
                }
            ]
        )
        for text, kind, file in questions
    ]


def answers(engine, prompts, params):
    found = engine.generate(prompts, params)
    assert not any(each.error for each in found)
    return [each.token_ids[0] for each in found]


def tally(engine):
    """Drafts so far, and those kept."""
    counts = engine.runner.speculator.counts
    return counts.num_draft_tokens, counts.num_accepted_tokens


def proposer_of(engine):
    return engine.runner.speculator.proposer


def watched(engine, monkeypatch):
    """Tokens of every step of the draft model from now on."""
    runner, steps = proposer_of(engine).runner, []
    compute = runner.compute

    def noted(plan):
        steps.append([row.num_tokens for row in plan.rows])
        return compute(plan)

    monkeypatch.setattr(runner, "compute", noted)
    return steps


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def plain(family):
    with engine_over(TINY / family) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(plain):
    """Prompts, and the answers without drafts."""
    prompts = prompts_of(plain)
    return prompts, {params: answers(plain, prompts, params) for params in (GREEDY, NOISY)}


@pytest.fixture(scope="module")
def strange(family, tmp_path_factory):
    """A random checkpoint of the family, smaller, and with a vocabulary that is padded otherwise."""
    return random_checkpoint(tmp_path_factory.mktemp("strange") / family, family)


@pytest.fixture(scope="module")
def engine(family):
    with drafting(family) as engine:
        yield engine


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "noisy"])
def test_a_model_that_drafts_for_itself_is_always_right(engine, expected, params):
    prompts, wanted = expected
    before = tally(engine)
    assert answers(engine, prompts, params) == wanted[params]
    num_drafts, num_accepted = (now - then for now, then in zip(tally(engine), before, strict=True))
    # Of each answer the first token comes with the prompt, four drafts and one more with every step after it.
    assert num_drafts >= 4 * len(prompts) * (GREEDY.max_new_tokens - 6) // 5
    assert num_accepted >= 0.99 * num_drafts
    assert not proposer_of(engine)._shadows and not proposer_of(engine).runner.features


@pytest.mark.parametrize("params", [GREEDY, NOISY], ids=["greedy", "noisy"])
def test_a_draft_model_that_knows_nothing_changes_no_answer(family, expected, strange, params):
    prompts, wanted = expected
    with drafting(family, strange) as engine:
        assert answers(engine, prompts, params) == wanted[params]
        num_drafts, num_accepted = tally(engine)
    assert num_drafts > 0 and num_accepted < 0.2 * num_drafts


def test_prompts_in_chunks_and_caches_off(family, expected, monkeypatch):
    """A step of the draft model is no longer than a step may be, and pictures are read across its steps."""
    prompts, wanted = expected
    sizes = {"max_num_batched_tokens": 40, "enable_prefix_caching": False, "encoder_cache_tokens": 64}
    with drafting(family, **sizes) as engine:
        steps = watched(engine, monkeypatch)
        assert answers(engine, prompts, NOISY) == wanted[NOISY]
        num_drafts, num_accepted = tally(engine)
        assert num_accepted >= 0.99 * num_drafts > 0
    assert max(map(sum, steps)) <= 40
    assert sum(map(sum, steps)) >= sum(len(prompt.token_ids) for prompt in prompts)


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
class TestOneFamily:
    """What has nothing to do with the architecture."""

    def test_a_dense_model_drafts_for_experts(self, family):
        with engine_over(TINY / "qwen3_vl_moe") as plain:
            prompts = prompts_of(plain)
            wanted = [answers(plain, prompts, params) for params in (GREEDY, NOISY)]
        with drafting("qwen3_vl_moe", TINY / "qwen3_vl") as engine:
            assert [answers(engine, prompts, params) for params in (GREEDY, NOISY)] == wanted
            num_drafts, num_accepted = tally(engine)
        assert 0.3 * num_drafts < num_accepted < num_drafts  # made of the same model, and trained on

    def test_a_quantized_folder_drafts(self, family, expected):
        prompts, wanted = expected
        with drafting(family, TINY / "qwen3_vl_w8a8") as engine:
            assert answers(engine, prompts, GREEDY) == wanted[GREEDY]
            num_drafts, num_accepted = tally(engine)
        assert num_accepted > 0.5 * num_drafts > 0

    def test_a_prefix_that_was_computed_is_found_again(self, family, expected, monkeypatch):
        prompts, wanted = expected
        with drafting(family) as engine:
            steps = watched(engine, monkeypatch)
            assert answers(engine, prompts[:1], NOISY) == wanted[NOISY][:1]
            assert steps[0] == [len(prompts[0].token_ids) + 1]
            steps.clear()
            assert answers(engine, prompts[:1], NOISY) == wanted[NOISY][:1]
            num_known = len(prompts[0].token_ids) // 16 * 16
            assert num_known and steps[0] == [len(prompts[0].token_ids) + 1 - num_known]
            # Of a conversation that goes on, the answer too.
            (answer,) = answers(engine, prompts[3:], replace(GREEDY, max_new_tokens=64))
            token_ids = [*prompts[3].token_ids, *answer, *prompts[3].token_ids]
            positions = np.broadcast_to(np.arange(len(token_ids)), (3, len(token_ids)))
            steps.clear()
            before = tally(engine)
            answers(engine, [replace(prompts[3], token_ids=token_ids, positions=positions)], GREEDY)
            num_drafts, num_accepted = (now - then for now, then in zip(tally(engine), before, strict=True))
            assert num_accepted >= 0.99 * num_drafts > 0
            assert sum(steps[0]) <= len(prompts[3].token_ids) + 2 * 16

    def test_blocks_that_others_have_had_since_are_not_read(self, family, expected):
        """Few blocks, so that those of finished requests go to others all the time; each answer beside its own."""
        prompts, wanted = expected
        with drafting(family, num_blocks=24, max_model_len=256) as engine:
            for _ in range(3):
                for prompt, token_ids in zip(prompts, wanted[NOISY], strict=True):
                    assert answers(engine, [prompt], NOISY) == [token_ids]
            num_drafts, num_accepted = tally(engine)
        assert num_accepted >= 0.99 * num_drafts > 0

    def test_preempted_requests(self, family, expected):
        prompts, _ = expected
        params = replace(NOISY, max_new_tokens=90)
        with engine_over(TINY / family) as plain:
            wanted = answers(plain, prompts, params)
        most = sum(-(-(len(prompt.token_ids) + 90) // 16) for prompt in prompts)
        with drafting(family, num_blocks=most - 10, max_model_len=256) as engine:
            assert answers(engine, prompts, params) == wanted
            num_drafts, num_accepted = tally(engine)
            assert engine.scheduler.num_preemptions
        assert num_accepted >= 0.99 * num_drafts > 0

    def test_requests_that_leave_early(self, engine, expected):
        prompts, wanted = expected
        leaving = [engine.add(prompt, NOISY) for prompt in prompts]
        for step in range(len(leaving)):
            for _ in range(step):
                engine.step()
            engine.abort(leaving[step])
            assert answers(engine, prompts[step : step + 1], NOISY) == wanted[NOISY][step : step + 1]
        assert not engine.has_work and not proposer_of(engine)._shadows
        proposer_of(engine).runner.sampler.check(())

    def test_drafts_that_come_on_again(self, engine, expected, monkeypatch):
        """Without drafts the draft model computes nothing; afterwards all that it lacks, a step's tokens at a time."""
        prompts, wanted = expected
        proposer, speculator = proposer_of(engine), engine.runner.speculator
        steps = watched(engine, monkeypatch)
        engine.scheduler.forget()
        # Blocks of earlier tests that hold the same tokens are computed already.
        monkeypatch.setattr(proposer, "_computed", ComputedBlocks(engine.scheduler.pool.num_blocks, 16))
        monkeypatch.setattr(speculator, "num_tokens", 0)
        monkeypatch.setattr(proposer, "step_tokens", 30)
        pieces = {engine.add(prompt, NOISY): [] for prompt in prompts[:2]}

        def step():
            for output in engine.step():
                pieces[output.request_id] += output.token_ids

        for _ in range(10):
            step()
        assert not steps
        monkeypatch.setattr(speculator, "num_tokens", 4)
        before = tally(engine)
        step()
        assert steps == [[30]] and tally(engine) == before
        while engine.has_work:
            step()
        assert list(map(tuple, pieces.values())) == wanted[NOISY][:2]
        assert max(map(sum, steps)) <= 30
        num_drafts, num_accepted = (now - then for now, then in zip(tally(engine), before, strict=True))
        assert num_accepted >= 0.99 * num_drafts > 0

    def test_scores_are_adjusted_as_the_request_asks(self, engine, plain):
        """Of a model that drafts for itself drafts are right under penalties, biases and bars as well; and where it
        has been wrong, a penalty forgets what it has counted."""
        prompts = prompts_of(plain)
        digits = tuple(plain.processor.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789")
        params = [
            replace(NOISY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
            replace(GREEDY, repetition_penalty=1.05, logit_bias={digits[3]: 4.0}, bad_words=("red", "blue")),
            replace(NOISY, allowed_token_ids=digits),
            replace(NOISY, ignore_eos=False, min_new_tokens=12, repetition_penalty=1.3),
        ]
        wanted = answers(plain, prompts, params)
        before = tally(engine)
        assert answers(engine, prompts, params) == wanted
        num_drafts, num_accepted = (now - then for now, then in zip(tally(engine), before, strict=True))
        assert num_accepted >= 0.99 * num_drafts > 0
        with drafting("qwen3_vl", TINY / "qwen3_vl_w8a8") as other:
            hot = [replace(each, temperature=3.0, seed=5) for each in params]
            assert answers(other, prompts, hot) == answers(plain, prompts, hot)
            assert 0 < tally(other)[1] < tally(other)[0]

    def test_the_time_of_a_step_that_catches_up_is_no_measure(self, engine, expected, monkeypatch):
        """What drafts cost is measured on steps that have nothing else to do."""
        prompts, wanted = expected
        speculator, added = engine.runner.speculator, []
        steps = watched(engine, monkeypatch)
        monkeypatch.setattr(speculator.costs, "add", lambda *step: added.append(step))
        engine.scheduler.forget()
        monkeypatch.setattr(speculator, "num_tokens", 0)
        asked = engine.add(prompts[2], NOISY)
        for _ in range(5):
            engine.step()
        assert len(added) == 4 and not steps  # all but the prompt's step
        monkeypatch.setattr(speculator, "num_tokens", 4)
        engine.step()
        assert steps[0][0] > 5 and len(added) == 4
        engine.step()
        assert len(added) == 5
        engine.abort(asked)

    def test_short_answers_to_long_prompts_have_no_drafts(self, engine, monkeypatch):
        (prompt,) = prompts_of(engine, [("red " * 300, "", "")])
        steps = watched(engine, monkeypatch)
        answers(engine, [prompt], replace(GREEDY, max_new_tokens=4))
        assert len(prompt.token_ids) > 3 * draft_model.CATCH_UP_SHARE and not steps

    def test_an_end_is_not_drafted_beyond(self, engine, expected, monkeypatch):
        """The draft model stops where it expects the answer to end, unless that is ignored."""
        prompts, _ = expected
        params = replace(GREEDY, ignore_eos=False)
        (whole,) = engine.generate(prompts[:1], replace(params, max_new_tokens=60))
        assert whole.finish_reason == "stop"
        ended = engine.scheduler.eos_token_ids
        proposed, propose = [], proposer_of(engine).propose

        def noted(plan, wanted):
            drafts = propose(plan, wanted)
            proposed.extend(drafts)
            return drafts

        monkeypatch.setattr(proposer_of(engine), "propose", noted)
        engine.generate(prompts[:1], replace(params, max_new_tokens=60))
        places = [token_id in ended for drafts in proposed for token_id in drafts[:-1]]
        assert len(places) > 4 and not any(places)

    def test_a_step_of_the_draft_model_that_fails(self, engine, expected, monkeypatch, caplog):
        prompts, wanted = expected
        runner = proposer_of(engine).runner

        def fails(plan):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(runner, "compute", fails)
        before = tally(engine)
        assert answers(engine, prompts, NOISY) == wanted[NOISY]
        assert tally(engine) == before
        warnings = [record for record in caplog.records if "draft model's step failed" in record.message]
        assert len(warnings) == 1 and "4 requests go on without drafts" in warnings[0].message
        monkeypatch.undo()
        assert answers(engine, prompts, NOISY) == wanted[NOISY]
        assert tally(engine)[0] > before[0]

    def test_logits_that_are_no_numbers(self, engine, expected, monkeypatch, caplog):
        prompts, wanted = expected
        runner = proposer_of(engine).runner
        forward = runner.forward
        monkeypatch.setattr(runner, "forward", lambda plan: forward(plan).fill_(torch.nan))
        before = tally(engine)
        assert answers(engine, prompts, NOISY) == wanted[NOISY]
        assert tally(engine) == before
        assert sum("goes on without drafts" in record.message for record in caplog.records) == len(prompts)

    @pytest.mark.parametrize("more", [64, 0], ids=["target", "draft"])
    def test_vocabularies_that_are_padded_differently(self, family, tmp_path, more):
        """Random weights choose tokens of the padding as well; then there are no drafts, and drafts are none of it."""
        sizes = {
            name: {"vocab_size": -(-len(tokenizer_of(family)) // 64) * 64 + padding}
            for name, padding in (("target", more), ("draft", 64 - more))
        }
        folders = {}
        for name, size in sizes.items():
            config = config_of(family, tokenizer_of(family), **size)
            folders[name] = save_checkpoint(tmp_path / name, family, random_model(family, config))
        speculative = {"method": "draft", "model_path": str(folders["draft"]), "adaptive": False}
        params = replace(NOISY, temperature=3.0, top_p=1.0)
        with engine_over(folders["target"]) as plain:
            prompts = prompts_of(plain)
            prompts.append(prompts[-1])
            prompts[-2] = replace(prompts[-1], token_ids=[*prompts[-1].token_ids[:-1], plain.vocab_size - 1])
            odd = replace(params, logit_bias={plain.vocab_size - 1: 1.0}, allowed_token_ids=(5, plain.vocab_size - 1))
            params = [*[params] * len(QUESTIONS), odd]
            wanted = answers(plain, prompts, params)
        with engine_over(folders["target"], speculative=speculative) as engine:
            assert answers(engine, prompts, params) == wanted
            assert tally(engine)[0] > 0
        if more:
            least = sizes["draft"]["vocab_size"]
            assert any(token_id >= least for token_ids in wanted[:-1] for token_id in token_ids)

    def test_pictures_are_normalised_as_the_draft_model_was_trained(self, family, tmp_path):
        draft = shutil.copytree(TINY / family, tmp_path / "draft")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            said = json.loads((draft / name).read_text())
            (draft / name).write_text(json.dumps(said | {"image_mean": [0.4, 0.4, 0.4]}))
        with drafting(family, draft) as engine:
            runner = proposer_of(engine).runner
            assert runner.pixel_format.mean == (0.4, 0.4, 0.4) != engine.runner.pixel_format.mean

    def test_a_picture_is_encoded_once_for_all_that_ask_about_it(self, family, tmp_path):
        Image.new("RGB", (200, 200), "red").save(tmp_path / "red.png")
        with drafting(family) as engine:
            proposer, encoded = proposer_of(engine), []
            encode = proposer.runner.encode
            proposer.runner.encode = lambda media: (encoded.extend(media), encode(media))
            parts = [{"type": "image", "image": str(tmp_path / "red.png")}, {"type": "text", "text": "What is it?"}]
            prompt = engine.prompt([{"role": "user", "content": parts}])
            engine.generate([prompt] * 3, replace(NOISY, n=2))
            assert len(encoded) == 1


def test_blocks_count_for_whoever_has_the_same_beginning():
    first, other = request("a", list(range(40))), request("b", [*range(20), 5, *range(21, 40)])
    ours, theirs, blocks = BlockDigests(first, 4), BlockDigests(other, 4), ComputedBlocks(10, 4)
    ids = [7, 3, 5, 1, 9, 0, 2]
    assert blocks.count(ids, ours, 28) == 0
    blocks.fill(ids, ours, 0, 18)
    assert blocks.count(ids, ours, 28) == 16 and blocks.count(ids, ours, 13) == 12
    assert blocks.count(ids, theirs, 28) == 16 and blocks.count(list(reversed(ids)), ours, 28) == 0
    blocks.fill(ids, ours, 16, 28)
    assert blocks.count(ids, ours, 28) == 28 and blocks.count(ids, theirs, 28) == 20
    blocks.begin([0, 1, 5], 4, 9)  # another request computes in blocks 1 and 5
    assert blocks.count(ids, ours, 28) == 8
