"""What an `Ask` says of its prompt and its tokens is done, and what does not fit is refused before it is queued."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from executor.engine.disk_cache.stats import DiskCacheStats
from executor.engine.engine import Engine
from executor.engine.loop import EngineLoop
from executor.schedule.request import SamplingParams
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, EngineStats, Event, Failure, TextPrompt, TokenPrompt
from executor.serve.backends import EngineBackend
from tests.reference import REPO

QUESTION = {"role": "user", "content": "What is left of the red circle?"}
PICTURE = {"type": "image", "image": str(REPO / "dataset" / "media" / "objects.png")}
SHORT = SamplingParams(max_new_tokens=4)

Answer = Callable[..., list[Event]]


@pytest.fixture(scope="module")
def answer(tiny_engine: Engine) -> Answer:
    """All events of an ask."""

    def run(prompt: ChatPrompt | TextPrompt | TokenPrompt, params: SamplingParams = SHORT, **more) -> list[Event]:
        async def events() -> list[Event]:
            with EngineLoop(tiny_engine) as loop:
                backend = EngineBackend(loop.start(), asyncio.get_running_loop())
                return [event async for event in backend.ask(Ask("a", prompt, params, **more))]

        return asyncio.run(asyncio.wait_for(events(), 60))

    return run


@pytest.fixture(scope="module")
def num_prompt(tiny_engine: Engine) -> int:
    return len(tiny_engine.processor.build([QUESTION]).token_ids)


def text_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Done), events[-1]
    return "".join(event.text for event in events[:-1])


def test_an_answer_that_just_fits_and_one_token_more(answer, tiny_engine, num_prompt):
    room = tiny_engine.scheduler.max_model_len - num_prompt
    prompt = ChatPrompt([QUESTION])
    fitting = answer(prompt, SamplingParams(max_new_tokens=room), fits_exactly=True)
    assert fitting[-1].finish_reasons == ("stop",)
    (refused,) = answer(prompt, SamplingParams(max_new_tokens=room + 1), fits_exactly=True)
    assert refused.kind == "refused"
    assert refused.message == (
        f"this model's maximum context length is 2048 tokens, requested 2049: {num_prompt} of the prompt and "
        f"{room + 1} of the answer; shorten the prompt or ask for fewer tokens"
    )
    # Where the number is no wish of the client's, the answer is as long as there is room; a minimum is always a wish.
    assert text_of(answer(prompt, SamplingParams(max_new_tokens=room + 1))) == text_of(fitting)
    (refused,) = answer(prompt, SamplingParams(max_new_tokens=5000, min_new_tokens=room + 1))
    assert refused.kind == "refused" and f"requested 2049: {num_prompt} of the prompt and at least" in refused.message


def test_a_prompt_that_fills_the_context_is_refused_with_what_shortens_it(answer):
    for fits_exactly in (True, False):
        (refused,) = answer(TokenPrompt([5] * 2048), fits_exactly=fits_exactly)
        assert isinstance(refused, Failure) and refused.kind == "refused"
        assert "context length is 2048 tokens, requested 2049 or more: the prompt has 2048 tokens" in refused.message


def test_token_ids_are_answered_as_the_text_they_stand_for(answer, tiny_engine):
    token_ids = tiny_engine.processor.build([QUESTION]).token_ids
    assert text_of(answer(TokenPrompt(token_ids))) == text_of(answer(ChatPrompt([QUESTION])))
    (refused,) = answer(TokenPrompt([tiny_engine.processor.image_token_id]))
    assert refused.kind == "refused" and "stands for a picture or video" in refused.message


def test_a_message_is_gone_on_with(answer):
    whole = text_of(answer(ChatPrompt([QUESTION]), SamplingParams(max_new_tokens=40)))
    half = whole[: whole.rindex(" ")]
    begun = ChatPrompt(
        [QUESTION, {"role": "assistant", "content": half}], add_generation_prompt=False, continue_final_message=True
    )
    assert half + text_of(answer(begun, SamplingParams(max_new_tokens=40))) == whole
    (refused,) = answer(replace(begun, add_generation_prompt=True))
    assert refused.kind == "refused" and "exclude each other" in refused.message


def test_options_of_a_request_reach_its_pictures(answer):
    asked = ChatPrompt([{"role": "user", "content": [PICTURE, {"type": "text", "text": "What do you see?"}]}])
    tokens = [
        answer(replace(asked, media_options=options))[-1].num_vision_tokens
        for options in ({}, {"min_pixels": 65536}, {"max_pixels": 4096, "min_pixels": 1024})
    ]
    assert tokens[1] > tokens[0] > tokens[2]
    raw = TextPrompt("<|image_pad|>", [PICTURE], media_options={"min_pixels": 65536})
    assert answer(raw)[-1].num_vision_tokens == tokens[1]
    (refused,) = answer(replace(asked, media_options={"pixels": 5}))
    assert refused.kind == "refused" and refused.message.startswith("mm_processor_kwargs: unknown key 'pixels'")


def test_prompt_logprobs_come_with_the_first_delta(answer, num_prompt):
    *deltas, done = answer(ChatPrompt([QUESTION]), replace(SHORT, prompt_logprobs=2, logprobs=1))
    assert isinstance(done, Done) and all(isinstance(delta, Delta) for delta in deltas)
    first, *later = (delta.prompt_logprobs for delta in deltas)
    assert len(first) == num_prompt and first[0] is None and later == [None] * len(later)
    for info in first[1:]:
        (best, _), rank = info.top, info.rank
        assert rank >= 1 and (rank == 1) == (best[0] == info.token_id) and info.logprob <= best[1] <= 0
    assert deltas[0].logprobs[0].rank is None


def test_rules_of_single_tokens_hold(answer, tiny_engine):
    whole = answer(ChatPrompt([QUESTION]))
    first = whole[0].token_ids[0]
    for params in (
        replace(SHORT, logit_bias={first: -100}),
        replace(SHORT, bad_words=[tiny_engine.processor.tokenizer.decode([first])]),
        replace(SHORT, allowed_token_ids=[token_id for token_id in range(15, 25) if token_id != first]),
    ):
        found = answer(ChatPrompt([QUESTION]), params)
        assert found[0].token_ids[0] != first and isinstance(found[-1], Done)
    end = tiny_engine.processor.eos_token_ids[0]
    (refused,) = answer(ChatPrompt([QUESTION]), replace(SHORT, allowed_token_ids=[end], min_new_tokens=2))
    assert refused.kind == "refused" and "allowed_token_ids holds only tokens" in refused.message


def test_stats_are_the_engines_own_parts(answer, tiny_engine):
    """As they are: a field that a part gets is there, and /metrics has it to show."""

    async def stats() -> EngineStats:
        with EngineLoop(tiny_engine) as loop:
            return EngineBackend(loop, asyncio.get_running_loop()).stats()

    answer(ChatPrompt([QUESTION]))
    found = asyncio.run(stats())
    assert found.stages == tiny_engine.runner.clock.times() and found.stages.host_s > 0
    assert found.speculation == tiny_engine.speculation
    assert found.disk_cache == DiskCacheStats(), "there is none"
    assert found.num_blocks == tiny_engine.scheduler.pool.num_blocks
