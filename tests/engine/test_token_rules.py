"""Biases, bad words, allowed tokens and minimum lengths equal transformers' processors, in any batch."""

import math
import random
from dataclasses import replace

import pytest
import torch
from transformers.generation import logits_process as reference

from executor.engine.bad_words import BadWords
from executor.engine.params import MAX_BAD_WORDS, check_params
from executor.engine.sampler import Sampler
from executor.errors import UserError
from executor.schedule.request import Request, SamplingParams
from tests.engine.test_sampler import make_request, penalised, random_logits
from tests.reference import tokenizer_of

VOCAB, EOS = 60, (3, 7)


def ruled(params: SamplingParams, words=(), **kwargs) -> Request:
    request = make_request(params, **kwargs)
    request.bad_words = BadWords(words) if words else None
    return request


def expected_scores(request: Request, words, logits: torch.Tensor) -> torch.Tensor:
    """`logits` [1, V] after transformers' processors, in its order; bad words look at the answer alone, as vLLM's."""
    params, output = request.params, torch.tensor([request.output_token_ids], dtype=torch.int64)
    seen = torch.tensor([request.token_ids(0, request.num_tokens)])
    steps = []
    if params.logit_bias:
        bias = {(token_id,): float(value) for token_id, value in params.logit_bias}
        steps.append((reference.SequenceBiasLogitsProcessor(bias), seen))
    steps.append((reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty), seen))
    if words:
        steps.append((reference.NoBadWordsLogitsProcessor([list(word) for word in words]), output))
    ends = [*EOS, *params.stop_token_ids]
    num_prompt = len(request.prompt.token_ids)
    minimum = reference.MinNewTokensLengthLogitsProcessor(num_prompt, params.min_new_tokens, ends)
    steps.append((minimum, seen))
    scores = logits.clone()
    for process, ids in steps:
        scores = process(ids, scores)
    if params.allowed_token_ids is not None:
        mask = torch.ones(VOCAB, dtype=torch.bool)
        mask[list(params.allowed_token_ids)] = False
        scores = scores.masked_fill(mask, -math.inf)
    return scores


def cases(rng: random.Random) -> list[tuple[Request, list[tuple[int, ...]]]]:
    made = []
    for row in range(12):
        # A small alphabet, so that words are completed often.
        words = [tuple(rng.randrange(6) for _ in range(rng.randint(1, 3))) for _ in range(rng.choice([0, 0, 1, 5]))]
        bias = {
            rng.randrange(VOCAB): rng.choice([rng.uniform(-100, 100), 7, -100])
            for _ in range(rng.choice([0, 0, 2, 20]))
        }
        allowed = tuple(rng.sample(range(VOCAB), 25)) if rng.random() < 0.4 else None
        params = SamplingParams(
            logit_bias=bias,
            allowed_token_ids=allowed,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            min_new_tokens=rng.choice([0, 4]),
            stop_token_ids=rng.choice([(), (11, 12)]),
        )
        made.append((ruled(params, words, prompt=[rng.randrange(VOCAB) for _ in range(4)], request_id=str(row)), words))
    return made


def test_rules_equal_transformers_in_any_batch():
    rng = random.Random(0)
    sampler, made = Sampler(VOCAB, "cpu", eos_token_ids=EOS), cases(rng)
    for step in range(30):
        # The same rows for a while, as in a batch; then others.
        batch = made if step < 10 else rng.sample(made, rng.randint(1, 12))
        logits = random_logits(len(batch), VOCAB, step)
        before = logits.clone()
        found = penalised(sampler, logits, [request for request, _ in batch])
        for row, (request, words) in enumerate(batch):
            assert torch.equal(found[row : row + 1], expected_scores(request, words, logits[row : row + 1]))
            request.output_token_ids.append(rng.randrange(6))
        assert torch.equal(logits, before), "the model's logits are not ours to change"


def test_a_row_s_token_does_not_depend_on_the_rules_of_others():
    rng = random.Random(1)
    made = [request for request, _ in cases(rng)]
    for seed, request in enumerate(made):
        request.params = replace(request.params, temperature=rng.choice([0.0, 1.0]), seed=seed, logprobs=3)
        request.output_token_ids.extend(rng.randrange(6) for _ in range(rng.randint(0, 6)))
    logits = random_logits(len(made), VOCAB, 5)
    together = Sampler(VOCAB, "cpu", eos_token_ids=EOS).sample(logits, made)
    for row, request in enumerate(made):
        alone = Sampler(VOCAB, "cpu", eos_token_ids=EOS).sample(logits[row : row + 1], [request])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[row], together.logprobs[row])


def test_logprobs_are_the_models_own_whatever_the_rules():
    logits = random_logits(1, VOCAB)
    best, second = logits[0].topk(2).indices.tolist()
    request = ruled(SamplingParams(logprobs=2, logit_bias={best: -100.0}))
    sampled = Sampler(VOCAB, "cpu").sample(logits, [request])
    assert sampled.token_ids == [second]
    assert sampled.logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1)[0, second]), abs=1e-6)
    assert [token for token, _ in sampled.logprobs[0].top] == [best, second]


RULED = [
    SamplingParams(logit_bias={5: 3.0}),
    SamplingParams(allowed_token_ids=tuple(range(10))),
    SamplingParams(min_new_tokens=2),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [5, 40, 3])
def test_what_is_not_finite_shows_through_the_rules(bad, place):
    """Wherever it stands: also where a token may not come."""
    for params in RULED:
        logits = random_logits(2, VOCAB)
        logits[1, place] = bad
        requests = [ruled(params, [(40,)], request_id=str(row)) for row in range(2)]
        sampled = Sampler(VOCAB, "cpu", eos_token_ids=EOS).sample(logits, requests)
        assert list(sampled.failures) == [1] and "not finite" in sampled.failures[1]


def test_nothing_left_is_the_parameters_fault():
    request = ruled(SamplingParams(allowed_token_ids=(4, 5)), [(4,), (5,)])
    sampled = Sampler(VOCAB, "cpu").sample(torch.zeros(1, VOCAB), [request])
    assert "allowed_token_ids, bad_words" in sampled.failures[0] and "allow more tokens" in sampled.failures[0]


def test_tables_are_kept_while_the_rows_stay_and_freed_with_their_requests():
    requests = [
        ruled(SamplingParams(logit_bias={1: 2.0}), request_id="a"),
        ruled(SamplingParams(allowed_token_ids=(1, 2)), request_id="b"),
        ruled(SamplingParams(), request_id="c"),
    ]
    sampler = Sampler(VOCAB, "cpu")
    sampler.sample(random_logits(3, VOCAB), requests)
    bias, allowed = sampler.rules._bias, sampler.rules._allowed
    sampler.sample(random_logits(3, VOCAB), requests)
    assert sampler.rules._bias is bias and sampler.rules._allowed is allowed
    assert sampler.rules.kept_ids() == {"a", "b"}
    for request_id in ("c", "a"):
        sampler.forget(request_id)
    assert sampler.rules.kept_ids() == {"b"}
    with pytest.raises(AssertionError, match="biases and allowed tokens of requests that are gone: ..b"):
        sampler.check(["a"])
    sampler.forget("b")
    sampler.check([])


# Bad words as texts


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of("qwen3_vl")


def test_a_word_is_barred_at_the_beginning_and_behind_a_space(tokenizer):
    words = BadWords.of(tokenizer, ("circle", " blue square"))
    for text in ("circle", " circle", "blue square", " blue square"):
        *before, last = tokenizer.encode(text, add_special_tokens=False)
        for start in ([], [5, 6]):
            output = start + before
            assert last in words.after(output, len(output))
    first, *_ = tokenizer.encode("blue square", add_special_tokens=False)
    assert first not in words.after((), 0), "the word's beginning may come"
    assert BadWords.of(tokenizer, ()) is None


@pytest.mark.parametrize("word", [" ", "\n", "\n\n", "\t x"])
def test_white_space_is_a_word_too(tokenizer, word):
    *before, last = tokenizer.encode(word, add_special_tokens=False)
    assert last in BadWords.of(tokenizer, (word,)).after(before, len(before))


# Which values are refused


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("logit_bias", {60: 1.0}, r"holds 60: 1.0; allowed: token ids from 0 to 59, each once, with numbers from -100"),
        ("logit_bias", {-1: 1.0}, "holds -1"),
        ("logit_bias", {"x": 1.0}, "holds 'x'"),
        ("logit_bias", {1: 100.5}, "holds 1: 100.5"),
        ("logit_bias", {1: math.nan}, "holds 1: nan"),
        ("logit_bias", {1: True}, "holds 1: True"),
        ("logit_bias", {1: None}, "holds 1: None"),
        ("logit_bias", {True: 1}, "holds True: 1"),
        ("logit_bias", ((1, 2.0), (1, 3.0)), "names a token twice"),
        ("logit_bias", 5, "is 5"),
        ("logit_bias", [1, 2], r"is \[1, 2\]"),
        ("allowed_token_ids", [], "is empty"),
        ("allowed_token_ids", [60], "holds 60; allowed: token ids from 0 to 59"),
        ("allowed_token_ids", "12", "is '12'; allowed: a token id or a list"),
        ("bad_words", [""], "holds ''; allowed: strings that are not empty"),
        ("bad_words", [5], "holds 5"),
        ("bad_words", {"a": 1}, "is {'a': 1}; allowed: a string or a list"),
        ("bad_words", ["x"] * (MAX_BAD_WORDS + 1), "has 1025 texts of 1025 characters"),
        ("bad_words", ["x" * 70000], "has 1 texts of 70000 characters"),
        ("prompt_logprobs", -1, "is -1; allowed: none, or a whole number from 0 to 20"),
        ("prompt_logprobs", True, "is True; allowed: none"),
        ("include_stop_str_in_output", "yes", "is 'yes'; allowed: true or false"),
        ("skip_special_tokens", None, "is None; allowed: true or false"),
    ],
)
def test_bad_values_are_named(name, value, says):
    with pytest.raises(UserError, match=rf"generation_config.{name} {says}"):
        check_params(SamplingParams(**{name: value}), VOCAB)


def test_good_values_pass():
    check_params(SamplingParams(logit_bias={0: -100, 59: 100}, allowed_token_ids=[1], bad_words="x"), VOCAB)
    check_params(SamplingParams(prompt_logprobs=0, include_stop_str_in_output=True, skip_special_tokens=False), VOCAB)
