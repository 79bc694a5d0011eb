"""A prompt's logprobs are those of transformers' own logits, whatever the chunks, the batch and what is cached."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import transformers

from executor.engine.engine import Engine
from executor.engine.outputs import Output
from executor.recipe.peak import SCORED_ROWS
from executor.schedule.request import FinishReason, Prompt, SamplingParams
from tests.engines import engine_over
from tests.reference import REPO, prompt_logits

TINY = REPO / "models" / "tiny" / "qwen3_vl"
WANTED = SamplingParams(max_new_tokens=4, prompt_logprobs=3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_over(TINY, max_num_seqs=4) as engine:
        yield engine
        engine.scheduler.check()
        engine.runner.sampler.check(())


@pytest.fixture(scope="module")
def prompts(engine) -> list[Prompt]:
    picture = {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}
    asked = [[picture, {"type": "text", "text": "What do you see?"}], "What is left of the red circle? " * 7]
    return [engine.processor.build([{"role": "user", "content": content}]) for content in asked]


@pytest.fixture(scope="module")
def expected(engine, prompts) -> list[torch.Tensor]:
    """Of each prompt the logprobs [T - 1, V] of all tokens behind its first."""
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return [prompt_logits(model, prompt, engine.processor.picture).log_softmax(-1)[:-1] for prompt in prompts]


def check(found: tuple, prompt: Prompt, expected: torch.Tensor, count: int = 3) -> None:
    assert len(found) == len(prompt.token_ids) and found[0] is None
    best = expected.topk(count, dim=-1)
    for place, entry in enumerate(found[1:]):
        token_id = prompt.token_ids[place + 1]
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(expected[place, token_id]), abs=2e-4)
        assert [value for _, value in entry.top] == pytest.approx(best.values[place].tolist(), abs=2e-4)
        for (ours, _), value in zip(entry.top, best.values[place].tolist(), strict=True):
            assert float(expected[place, ours]) == pytest.approx(value, abs=2e-4)  # of equals any
        rank = int((expected[place] > expected[place, token_id]).sum()) + 1
        near = int(((expected[place] - expected[place, token_id]).abs() < 4e-4).sum())
        assert abs(entry.rank - rank) < near


def ended(engine: Engine) -> dict[str, list[Output]]:
    """The outputs of all requests until nothing is left, by request and answer."""
    found: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(f"{output.request_id}/{output.index}", []).append(output)
    return found


def test_they_equal_transformers_beside_other_requests(engine, prompts, expected):
    assert len(prompts[1].token_ids) > 2 * SCORED_ROWS
    plain = SamplingParams(max_new_tokens=4)
    alone = engine.generate(prompts, plain)
    params = [WANTED, plain, replace(WANTED, prompt_logprobs=0), replace(WANTED, prompt_logprobs=5)]
    found = engine.generate([prompts[0], prompts[0], prompts[1], prompts[1]], params)
    for place, (number, count) in {0: (0, 3), 2: (1, 0), 3: (1, 5)}.items():
        check(found[place].prompt_logprobs, prompts[number], expected[number], count)
    assert found[1].prompt_logprobs is None
    assert [each.token_ids for each in found] == [alone[number].token_ids for number in (0, 0, 1, 1)]


def test_they_are_computed_whatever_is_cached_and_others_read_what_they_computed(prompts, expected):
    with engine_over(TINY) as engine:
        for _ in range(2):
            (found,) = engine.generate([prompts[1]], WANTED)
            assert found.cached_tokens == 0
            check(found.prompt_logprobs, prompts[1], expected[1])
        (other,) = engine.generate([prompts[1]], SamplingParams(max_new_tokens=4))
        assert other.cached_tokens > 0 and other.token_ids == found.token_ids
        # Nor does one wait for a prompt beside it that computes the same.
        both = engine.generate([prompts[1]] * 2, WANTED)
        assert [each.cached_tokens for each in both] == [0, 0]
        check(both[1].prompt_logprobs, prompts[1], expected[1])


@pytest.mark.parametrize(("num_tokens", "numbers"), [(1, [0]), (7, [0, 1]), (40, [0, 1])])
def test_chunks_change_nothing(prompts, expected, num_tokens, numbers):
    with engine_over(TINY, max_num_batched_tokens=num_tokens, max_num_seqs=min(4, num_tokens)) as engine:
        answers = engine.generate([prompts[number] for number in numbers], WANTED)
        for found, prompt, wanted in zip(answers, prompts, expected, strict=False):
            check(found.prompt_logprobs, prompt, wanted)


@pytest.mark.parametrize(("max_num_batched_tokens", "is_inside"), [(4, True), (256, False)])
def test_preemption_changes_nothing(prompts, expected, max_num_batched_tokens, is_inside):
    """In the middle of the prompt, and behind it: nothing is scored twice."""
    long = SamplingParams(max_new_tokens=40, ignore_eos=True)
    num_prompt = len(prompts[1].token_ids)
    sizes = {"num_blocks": num_prompt // 16 + 3, "max_model_len": 144, "max_num_seqs": 2}
    with engine_over(TINY, max_num_batched_tokens=max_num_batched_tokens, **sizes) as engine:
        engine.add("What?", long)
        engine.step()
        engine.add(prompts[1], replace(long, prompt_logprobs=3), "scored")
        request, known = engine._answers["scored/0"].request, None
        while engine.has_work:
            engine.step()
            if known is None and request.num_preemptions:
                known = len(request.prompt_logprobs)
        assert request.num_preemptions and (1 < known < num_prompt if is_inside else known == num_prompt)
        assert request.finish_reason is FinishReason.LENGTH
        check(tuple(request.prompt_logprobs), prompts[1], expected[1])
        (alone,) = engine.generate([prompts[1]], long)
        assert tuple(request.output_token_ids) == alone.token_ids[0]


def test_they_come_with_the_first_tokens_of_the_first_answer(engine, prompts, expected):
    params = replace(WANTED, n=2, temperature=2.0, seed=3, ignore_eos=True)
    request_id = engine.add(prompts[0], params)
    outputs = ended(engine)
    first, *later = outputs[f"{request_id}/0"]
    check(first.prompt_logprobs, prompts[0], expected[0])
    assert all(output.prompt_logprobs is None for output in (*later, *outputs[f"{request_id}/1"]))


def test_a_prompt_of_one_token_has_none(engine):
    (found,) = engine.generate([engine.processor.build_text("a")], WANTED)
    assert found.prompt_tokens == 1 and found.prompt_logprobs == (None,)


def test_logits_of_few_rows_exist_at_a_time(engine, prompts, monkeypatch):
    rows = []
    multiply = engine.runner.model.lm_head.forward
    monkeypatch.setattr(engine.runner.model.lm_head, "forward", lambda x: rows.append(len(x)) or multiply(x))
    engine.generate([prompts[1]], replace(WANTED, max_new_tokens=1))
    num_scored = len(prompts[1].token_ids) - 1
    assert sum(rows) == num_scored + 1 and max(rows) <= SCORED_ROWS


def test_a_step_computed_row_by_row_scores_once(engine, prompts, expected, monkeypatch):
    forward = engine.runner.forward

    def failing(plan, *scores):
        if len(plan.rows) > 1:
            raise RuntimeError("out of memory")
        return forward(plan, *scores)

    monkeypatch.setattr(engine.runner, "forward", failing)
    for found, prompt, wanted in zip(engine.generate(prompts, WANTED), prompts, expected, strict=True):
        check(found.prompt_logprobs, prompt, wanted)
