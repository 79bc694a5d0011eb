"""Sampling follows transformers' processors and the distribution, and never depends on the rest of the batch."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from executor.engine import filters, noise, penalties
from executor.engine import sampler as sampler_module
from executor.engine.filters import REACH, Filters, Kind
from executor.engine.noise import as_int64, child_seed, gumbel_noise, least_bits, may_reach, noise_bits, noise_key
from executor.engine.params import check_params
from executor.engine.places import Places
from executor.engine.sampler import Sampler
from executor.errors import UserError
from executor.schedule.request import Prompt, Request, SamplingParams


def make_request(params: SamplingParams, prompt: list[int] | None = None, output=(), request_id: str = "r") -> Request:
    prompt = [0] if prompt is None else prompt
    request = Request(request_id, Prompt(prompt, np.zeros((3, len(prompt)), np.int64), 0), params)
    request.output_token_ids.extend(output)
    return request


def random_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * spread


def sample_one(logits: torch.Tensor, request: Request, **options) -> int:
    return Sampler(logits.shape[-1], "cpu", **options).sample(logits[None], [request]).token_ids[0]


def padded(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(logits, (0, -logits.shape[-1] % filters.CHUNK), value=-math.inf)


def survivors(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Scores [N, V] after temperature, -inf where filtered out."""
    vocab_size = logits.shape[-1]
    made = Filters.of(params, torch.from_numpy)
    return in_full(*filters.survivors(padded(logits), made), vocab_size) / after_temperature(params)


def likely(logits: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the first look, and which rows it leaves open."""
    scores, vocab_size = padded(logits), logits.shape[-1]
    maxima = filters.chunk_maxima(scores)
    found, is_open = torch.empty(len(params), vocab_size), torch.empty(len(params), dtype=torch.bool)
    for kind in {Kind.of(p) for p in params}:
        rows = [row for row, p in enumerate(params) if Kind.of(p) == kind]
        made = Filters.of([params[row] for row in rows], torch.from_numpy)
        *kept, is_open[rows] = filters.likely_survivors(scores, maxima[rows], torch.tensor(rows), made, kind)
        found[rows] = in_full(*kept, vocab_size)
    return found / after_temperature(params), is_open


def after_temperature(params: list[SamplingParams]) -> torch.Tensor:
    return torch.tensor([p.temperature for p in params])[:, None]


def penalised(sampler: Sampler, logits: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """The logits as they are chosen from."""
    with sampler.adjusted(logits, Places(requests)):
        return logits.clone()


def in_full(ids: torch.Tensor, candidates: torch.Tensor, vocab_size: int) -> torch.Tensor:
    full = torch.full((len(ids), vocab_size + filters.CHUNK), -math.inf)
    return full.scatter_reduce(-1, ids, candidates, "amax")[:, :vocab_size]


# Against transformers


def warpers(params: SamplingParams) -> list:
    made = [reference.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        made.append(reference.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(reference.TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(reference.MinPLogitsWarper(params.min_p))
    return made


PARAMS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.3, 1.0, 1.7)
    for top_k in (0, 1, 20, 500)
    for top_p in (0.1, 0.8, 0.999, 1.0)
    for min_p in (0.0, 0.05, 1.0)
]


@pytest.mark.parametrize("vocab_size", [60, 5000])
@pytest.mark.parametrize("rounded", [False, True])
def test_filters_equal_transformers(vocab_size, rounded):
    """rounded: logits as bfloat16 gives them, full of ties, among which the reference's top-p chooses at random."""
    for seed, spread in ((0, 3.0), (1, 0.5)):
        logits = random_logits(len(PARAMS), vocab_size, seed, spread)
        if rounded:
            logits = logits.bfloat16().float()
        found, (first_look, is_open) = survivors(logits, PARAMS), likely(logits, PARAMS)
        assert 0 < int(is_open.sum()) < len(PARAMS) or vocab_size < filters.FIRST_GUESS
        for row, params in enumerate(PARAMS):
            expected = logits[row : row + 1]
            for warper in warpers(params):
                expected = warper(None, expected)
            # What no noise can bring to the top is dropped early.
            expected = expected[0].masked_fill(expected[0] < expected.max() - REACH, -math.inf)
            looks = [found[row]] if is_open[row] else [found[row], first_look[row]]
            for look in looks:
                reachable, wanted = look.masked_fill(look < look.max() - REACH, -math.inf), expected
                if rounded and params.top_p < 1:
                    reachable, wanted = reachable.sort().values, wanted.sort().values
                assert torch.equal(reachable, wanted), params


def test_a_wide_nucleus_is_found_too():
    """Nearly flat logits: the nucleus is far larger than the first guess of candidates."""
    logits = random_logits(2, 20000, spread=0.01)
    params = [SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=1.0, top_p=0.02)]
    found = survivors(logits, params)
    expected = torch.cat(
        [reference.TopPLogitsWarper(p.top_p)(None, logits[row : row + 1]) for row, p in enumerate(params)]
    )
    for row in range(2):
        kept, wanted = found[row] > -math.inf, expected[row] > -math.inf
        # The reference sums in fp32: the last few tokens of a nucleus of thousands may differ.
        assert abs(int(kept.sum()) - int(wanted.sum())) <= 3 and int((kept != wanted).sum()) <= 3
    assert int((found[0] > -math.inf).sum()) > 10000


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_penalties_and_minimum_equal_transformers(min_new_tokens):
    vocab_size, eos = 50, [3, 7]
    rng = random.Random(0)
    sampler = Sampler(vocab_size, "cpu", eos_token_ids=eos)
    requests = []
    for row, penalty in enumerate([1.0, 1.3, 0.7, 1.05]):
        prompt = [rng.randrange(vocab_size) for _ in range(5 + 9 * row)]
        params = SamplingParams(repetition_penalty=penalty, min_new_tokens=min_new_tokens)
        requests.append(make_request(params, prompt, request_id=str(row)))
    for step in range(6):
        logits = random_logits(len(requests), vocab_size, step)
        before = logits.clone()
        found = penalised(sampler, logits, requests)
        for row, request in enumerate(requests):
            seen = torch.tensor([request.token_ids(0, request.num_tokens)])
            expected = reference.RepetitionPenaltyLogitsProcessor(request.params.repetition_penalty)(
                seen, logits[row : row + 1]
            )
            minimum = reference.MinNewTokensLengthLogitsProcessor(len(request.prompt.token_ids), min_new_tokens, eos)
            assert torch.equal(found[row : row + 1], minimum(seen, expected))
        assert torch.equal(logits, before), "the model's logits are not ours to change"
        for request in requests:
            request.output_token_ids.append(rng.randrange(vocab_size))


def test_greedy_is_the_best_processed_token():
    logits = random_logits(6, 300)
    requests = [make_request(SamplingParams(), request_id=str(row)) for row in range(6)]
    sampled = Sampler(300, "cpu").sample(logits, requests)
    assert sampled.token_ids == logits.argmax(-1).tolist()
    assert sampled.logprobs == [None] * 6
    assert sample_one(logits[0], make_request(SamplingParams(temperature=1.0, top_k=1))) == sampled.token_ids[0]
    assert sample_one(logits[0], make_request(SamplingParams(temperature=1e-30))) == sampled.token_ids[0]


# Penalties of our own definition


def test_presence_and_frequency_count_the_answer_only():
    """As OpenAI and vLLM do; the repetition penalty counts the prompt as well, as transformers does."""
    logits = torch.ones(1, 10)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    prompt, output = [1, 1, 2, 99], [2, 2, 4]
    expected = torch.ones(10)
    expected[2], expected[4] = 1 - 0.5 - 0.5, 1 - 0.5 - 0.25
    assert torch.equal(penalised(Sampler(10, "cpu"), logits, [make_request(params, prompt, output)])[0], expected)
    expected[1], expected[2], expected[4] = 0.5, 0.5 - 0.5 - 0.5, 0.5 - 0.5 - 0.25
    both = make_request(replace(params, repetition_penalty=2.0), prompt, output)
    assert torch.equal(penalised(Sampler(10, "cpu"), logits, [both])[0], expected)


def test_seen_tokens_stay_on_the_device_and_are_appended(monkeypatch):
    """A step of the same rows sends its new tokens only, and a batch that changes is right as well."""
    rng = random.Random(2)
    vocab_size = 300
    sampler, built = Sampler(vocab_size, "cpu"), []
    make = penalties._Batch.__init__
    monkeypatch.setattr(
        penalties._Batch, "__init__", lambda self, *args: built.append(len(args[0])) or make(self, *args)
    )
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(),
        SamplingParams(presence_penalty=0.7, frequency_penalty=0.1),
        SamplingParams(repetition_penalty=0.8, frequency_penalty=-0.3),
    ]
    requests = [
        make_request(p, [rng.randrange(40) for _ in range(20)], request_id=str(row)) for row, p in enumerate(params)
    ]
    for step in range(200):
        now = requests if step < 150 else rng.sample(requests, 3)
        logits = random_logits(len(now), vocab_size, step)
        found = penalised(sampler, logits, now)
        assert torch.equal(found, torch.cat([penalised(Sampler(vocab_size, "cpu"), logits[row : row + 1].clone(), [r])
                                             for row, r in enumerate(now)]))  # fmt: skip
        for request in now:
            request.output_token_ids.append(rng.randrange(vocab_size))
        if step == 149:
            assert built.count(3) == 1


def test_what_the_host_has_not_read_is_counted_where_others_have_left():
    """The last token of a request, on the device only, is its own also when it stands elsewhere in the step."""
    params = [SamplingParams(), SamplingParams(repetition_penalty=1.5, presence_penalty=0.5), SamplingParams()]
    requests = [make_request(p, [1, 2], [3], request_id=str(row)) for row, p in enumerate(params)]
    sampler, logits = Sampler(60, "cpu"), random_logits(3, 60).abs()
    for now in (requests, requests[1:], requests[1:2], requests):
        part, unread = logits[: len(now)], torch.arange(10, 10 + len(now))
        with sampler.adjusted(part, Places(now), unread):
            found = part.clone()
        known = [
            make_request(each.params, [1, 2], [3, token]) for each, token in zip(now, unread.tolist(), strict=True)
        ]
        for row, request in enumerate(known):
            assert torch.equal(
                found[row : row + 1], penalised(Sampler(60, "cpu"), part[row : row + 1].clone(), [request])
            )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_strongest_penalties_leave_scores_finite(penalty):
    params = SamplingParams(repetition_penalty=penalty, presence_penalty=2.0, frequency_penalty=-2.0)
    check_params(params, 10)
    request = make_request(params, list(range(10)), [3, 4])
    assert bool(penalised(Sampler(10, "cpu"), random_logits(1, 10, spread=65504.0), [request]).isfinite().all())


def test_history_grows_with_the_request_and_is_freed():
    rng = random.Random(1)
    vocab_size = 400
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.1)
    sampler = Sampler(vocab_size, "cpu")
    request = make_request(params, [rng.randrange(30) for _ in range(10)])
    for step in range(300):
        logits = random_logits(1, vocab_size, step)
        found = penalised(sampler, logits, [request])
        fresh = penalised(Sampler(vocab_size, "cpu"), logits, [request])
        # The order of the entries differs, their effect does not.
        assert torch.equal(found, fresh)
        # Some steps yield several tokens, and after a preemption none is lost.
        request.output_token_ids.extend(rng.randrange(vocab_size) for _ in range(rng.randint(0, 3)))
    sampler.check(["r"])
    with pytest.raises(AssertionError, match="'r'"):
        sampler.check([])
    again = make_request(params)
    with pytest.raises(AssertionError, match="'r' is used again"):
        sampler.sample(logits, [again])
    sampler.forget("r")
    sampler.forget("r")
    sampler.check([])
    sampler.sample(logits, [again])


def test_minimum_masks_stop_ids_too_and_ends():
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0])
    for output, expected in (((), 0), ((0,), 0), ((0, 0), 1)):
        params = SamplingParams(min_new_tokens=2, stop_token_ids=(2, 3, 3))
        assert sample_one(logits, make_request(params, output=output), eos_token_ids=(1, 9)) == expected
    ignoring = SamplingParams(min_new_tokens=2, ignore_eos=True)
    assert sample_one(logits, make_request(ignoring), eos_token_ids=(1,)) == 1


# The distribution


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(temperature=1.0), 8),
        (SamplingParams(temperature=0.6), 8),
        (SamplingParams(temperature=1.0, top_k=4), 4),
        (SamplingParams(temperature=1.5, top_p=0.9), None),
    ],
)
def test_draws_follow_the_distribution(params, kept, vary):
    num_draws = 3000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    requests = [
        make_request(replace(params, seed=draw if vary == "seed" else 5), [0] * (7 if vary == "seed" else draw))
        for draw in range(num_draws)
    ]
    token_ids = Sampler(8, "cpu").sample(logits.expand(num_draws, 8), requests).token_ids
    counts = torch.bincount(torch.tensor(token_ids), minlength=8).double()
    probabilities = survivors(logits[None], [params])[0].double().softmax(-1)
    inside = probabilities > 0
    assert kept is None or int(inside.sum()) == kept
    assert counts[~inside].sum() == 0
    # 99.9 % quantile of chi-square with 7 degrees of freedom; fewer degrees lie below.
    assert chi_square(counts[inside], probabilities[inside]) < 24.3


def test_noise_is_gumbel_and_independent_between_seeds_positions_and_candidates():
    keys = torch.tensor([as_int64(noise_key(seed, position)) for seed in range(40) for position in range(25)])
    noise = gumbel_noise(keys, torch.arange(200).expand(1000, 200))
    assert float(noise.min()) > -3.15 and float(noise.max()) < 22.9
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    grid = (noise - noise.mean()).view(40, 25, 200)
    for other in (grid.roll(1, 0), grid.roll(1, 1), grid.roll(1, 2)):
        assert abs(float((grid * other).mean())) < 0.02


def test_noise_of_a_candidate_is_a_known_number():
    """A change of the hash changes every seeded answer: it must be wanted."""
    noise = gumbel_noise(torch.tensor([as_int64(noise_key(42, 7))]), torch.tensor([[0, 1, 151935]]))
    assert noise[0].tolist() == pytest.approx([0.2598149031733763, 0.20434126541001155, -1.3950774985183656])


def test_the_32_bits_of_noise_bound_the_reach():
    highest, lowest = -math.log(-math.log(1 - 2.0**-33)), -math.log(-math.log(2.0**-33))
    assert REACH - 0.01 < highest - lowest < REACH


def test_bits_below_the_least_have_less_noise():
    """So a token whose bits do not reach it cannot win; and hardly any bits more are let through."""
    bits = noise_bits(torch.tensor([5]), torch.arange(4000)[None])[0]
    noise = gumbel_noise(torch.tensor([5]), torch.arange(4000)[None])[0]
    asked = torch.cat([noise[:500], torch.linspace(-6, 24, 500, dtype=torch.float64)])
    least = least_bits(asked)
    reached = noise[None] >= asked[:, None]
    passed = bits[None] >= least[:, None]
    assert bool((passed | ~reached).all()) and int((passed & ~reached).sum()) <= 4
    assert int(least.min()) == 0 and int(least.max()) == 1 << 32
    # The quick look at the highest 31 bits lets all of these pass, and next to nothing else.
    keys = torch.full((1000,), 5)
    found = may_reach(keys, torch.zeros(1000, dtype=torch.int64), 4000, least)[least < 1 << 32]
    passed = passed[least < 1 << 32]
    assert bool((found | ~passed).all()) and int((found & ~passed).sum()) <= 4


# Against Gumbel-max in float64


def exact_choice(scores: torch.Tensor, params: SamplingParams, position: int) -> int:
    """The token of float32 `scores` [V] by Gumbel-max in float64, relative to the best score, from the same noise."""
    relative = (scores.double() - scores.double().max()) / params.temperature
    kept = scores > -math.inf
    if params.top_k:
        kept &= scores >= scores.topk(min(params.top_k, len(scores))).values[-1]
    # The nucleus is a share of what top-k leaves; of equal scores it drops the lower ids first.
    relative = relative.masked_fill(~kept, -math.inf)
    if params.top_p < 1:
        ids = torch.arange(len(scores) - 1, -1, -1)
        ids = ids[relative[ids].sort(descending=True, stable=True).indices]
        share = relative[ids].softmax(-1)
        kept &= torch.zeros_like(kept).scatter_(0, ids, share.cumsum(-1) - share < params.top_p)
    if params.min_p:
        kept &= relative.exp() >= params.min_p
    noise = gumbel_noise(torch.tensor([as_int64(noise_key(params.seed, position))]), torch.arange(len(scores))[None])
    return int((relative + noise[0]).masked_fill(~kept, -math.inf).argmax())


TEMPERATURES = (5e-324, 1e-300, 1e-40, 1e-8, 1e-6, 2e-6, 1e-5, 1e-3, 0.1, 1.0, 100.0, 1e300)
NARROWINGS = ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.8})
PENALTIES = ({}, {"repetition_penalty": 1.05, "frequency_penalty": 0.2})
SAMPLED = [
    SamplingParams(temperature=temperature, **narrowing, **penalty)
    for temperature in TEMPERATURES
    for narrowing in NARROWINGS
    for penalty in PENALTIES
]


def sampled_requests(seed: int, vocab_size: int) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(30)] for _ in SAMPLED]
    return [
        make_request(replace(params, seed=rng.randrange(1 << 62)), prompt, prompt[:7], request_id=str(row))
        for row, (params, prompt) in enumerate(zip(SAMPLED, prompts, strict=True))
    ]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 3.0, 40.0])
def test_every_temperature_draws_what_gumbel_max_in_float64_draws(scale):
    """A small scale around 20: scores a few steps of float32 apart, which a small temperature tells apart."""
    vocab_size = 2001
    requests = sampled_requests(0, vocab_size)
    logits = random_logits(len(requests), vocab_size, spread=scale) + 20 * (scale < 1)
    scores = penalised(Sampler(vocab_size, "cpu"), logits, requests)
    found = Sampler(vocab_size, "cpu").sample(logits, requests).token_ids
    for row, request in enumerate(requests):
        assert found[row] == exact_choice(scores[row], request.params, request.num_tokens), request.params


@pytest.mark.parametrize("peak", [20.0, 40.0, 3e4, -5.0])
def test_a_clear_winner_wins_at_every_small_temperature(peak):
    """Over a real vocabulary; Qwen2.5-VL's own generation_config.json samples at 1e-6."""
    vocab_size = 151936
    small = [params for params in SAMPLED if params.temperature in (5e-324, 1e-8, 1e-6, 2e-6, 1e-5, 1e-3)]
    logits = random_logits(1, vocab_size, spread=2.0).clamp_(max=9) + (peak - 10)
    logits[0, 123456] = peak
    for first in range(0, len(small), 20):
        params = small[first : first + 20]
        requests = [make_request(replace(p, seed=row), [5, 6], request_id=str(row)) for row, p in enumerate(params)]
        sampled = Sampler(vocab_size, "cpu").sample(logits.repeat(len(params), 1), requests)
        assert sampled.token_ids == [123456] * len(params)


# Alone or in any batch


@pytest.mark.parametrize("vocab_size", [257, 20011])
def test_a_request_gets_the_same_token_alone_and_in_any_batch(vocab_size):
    rng = random.Random(vocab_size)
    requests = []
    for row in range(24):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 5, 50, 200]),
            top_p=rng.choice([1.0, 0.95, 0.5]),
            min_p=rng.choice([0.0, 0.0, 0.02]),
            repetition_penalty=rng.choice([1.0, 1.1]),
            frequency_penalty=rng.choice([0.0, 0.4]),
            min_new_tokens=rng.choice([0, 5]),
            logprobs=rng.choice([None, 0, 3]),
            seed=rng.randrange(-(1 << 40), 1 << 62),
        )
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
        requests.append(make_request(params, prompt, [1] * rng.randint(0, 8), request_id=str(row)))
    logits = torch.cat([random_logits(12, vocab_size, spread=4.0), random_logits(12, vocab_size, spread=0.2)])
    options = {"eos_token_ids": (0, 1)}
    alone = [
        Sampler(vocab_size, "cpu", **options).sample(logits[row : row + 1], [request])
        for row, request in enumerate(requests)
    ]
    assert len({sampled.token_ids[0] for sampled in alone}) > 12
    sampler = Sampler(vocab_size, "cpu", **options)
    for _ in range(12):
        rows = rng.sample(range(24), rng.randint(1, 24))
        sampled = sampler.sample(logits[rows], [requests[row] for row in rows])
        assert sampled.token_ids == [alone[row].token_ids[0] for row in rows]
        assert sampled.logprobs == [alone[row].logprobs[0] for row in rows]


def test_a_filter_that_keeps_all_changes_nothing():
    """Two ways of drawing, one over blocks of the vocabulary and one over candidates, with the same noise."""
    vocab_size = 20011
    for spread in (0.1, 6.0):
        logits = random_logits(40, vocab_size, spread=spread)
        free = SamplingParams(temperature=0.9)
        requests = [make_request(replace(free, seed=seed)) for seed in range(40)]
        filtered = [make_request(replace(free, seed=seed, top_k=vocab_size)) for seed in range(40)]
        sampler = Sampler(vocab_size, "cpu")
        assert sampler.sample(logits, requests) == sampler.sample(logits, filtered)


@pytest.mark.parametrize("vocab_size", [9, 3000, 20011])
def test_a_draw_among_all_tokens_that_reads_nothing_on_the_way_is_the_same(vocab_size):
    for spread, temperature in ((0.0, 1.0), (0.1, 0.9), (6.0, 0.9), (3.0, 1e-6), (3.0, 20.0), (30.0, 2.0)):
        logits = random_logits(60, vocab_size, seed=3, spread=spread)
        logits[::7, : vocab_size // 2] = -math.inf
        params = SamplingParams(temperature=temperature)
        requests = [make_request(replace(params, seed=seed), [0] * (seed % 5 + 1)) for seed in range(60)]
        wanted = Sampler(vocab_size, "cpu").sample(logits, requests)
        assert Sampler(vocab_size, "cpu", reads_freely=False).draw(logits, requests).ids.tolist() == wanted.token_ids


def test_a_draw_among_all_tokens_is_open_where_too_many_may_win(monkeypatch):
    monkeypatch.setattr(sampler_module, "_FINALISTS", 1)
    logits, params = random_logits(40, 500, spread=0.1), SamplingParams(temperature=1.0)
    requests = [make_request(replace(params, seed=seed)) for seed in range(40)]
    sampler = Sampler(500, "cpu", reads_freely=False)
    assert -2 in sampler.draw(logits, requests).ids.tolist()
    assert sampler.sample(logits, requests) == Sampler(500, "cpu").sample(logits, requests)


def test_rough_noise_is_noise():
    keys, ids = torch.arange(50) * 7919, torch.arange(20000)[None]
    difference = noise.rough_noise(keys, 20000) - noise.gumbel_noise(keys, ids)
    assert difference.abs().max() < 0.05 * noise.ROUGHNESS
    ends = torch.tensor([[0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]])
    with pytest.MonkeyPatch.context() as patch:  # the ends of the range, which no key is known for
        patch.setattr(noise, "noise_bits", lambda keys, ids: ends.clone())
        assert (noise.rough_noise(keys, 6) - noise.gumbel_noise(keys, ids)).abs().max() < 0.05 * noise.ROUGHNESS


def test_keys_of_many_are_those_of_each():
    seeds, places = [0, 1, -1, 1 << 62, -(1 << 62)], [0, 1, 70000, 2**31, 5]
    mixed = np.array([noise.mixed_seed(seed) for seed in seeds], dtype=np.uint64)
    wanted = [noise.as_int64(noise.noise_key(seed, place)) for seed, place in zip(seeds, places, strict=True)]
    assert noise.noise_keys(mixed, np.array(places)).tolist() == wanted


def test_a_request_may_have_several_rows():
    """Row i of a request draws the token that comes after i more tokens than it has: what speculation verifies."""
    logits = random_logits(3, 500)
    params = SamplingParams(temperature=1.0, seed=3, top_p=0.9)
    request = make_request(params, [1, 2])
    together = Sampler(500, "cpu").sample(logits, [request], drafts=[(0, 0)]).token_ids
    alone = [sample_one(logits[i], make_request(params, [1, 2], [0] * i)) for i in range(3)]
    assert together == alone


def test_seeds_and_positions_differ_and_repeat():
    logits = torch.zeros(1000)
    draws = {
        (seed, position): sample_one(logits, make_request(SamplingParams(temperature=1.0, seed=seed), [0] * position))
        for seed in (0, 1, -1, 1 << 60)
        for position in (1, 2, 3)
    }
    assert len(set(draws.values())) >= 11
    again = sample_one(logits, make_request(SamplingParams(temperature=1.0, seed=1), [0, 0]))
    assert again == draws[1, 2]


def test_child_seeds():
    assert child_seed(7, 0) == 7
    seeds = {child_seed(seed, index) for seed in range(50) for index in range(1, 50)}
    assert len(seeds) == 50 * 49 and all(0 <= seed < 1 << 63 for seed in seeds)


# Logprobs


def test_logprobs_are_the_models_own():
    logits = random_logits(4, 100)
    expected = logits.log_softmax(-1)
    params = [
        SamplingParams(temperature=1.3, logprobs=5, repetition_penalty=1.5),
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=2, min_new_tokens=1, stop_token_ids=(int(logits[3].argmax()),)),
    ]
    requests = [make_request(p, [4, 5, 6], request_id=str(row)) for row, p in enumerate(params)]
    sampled = Sampler(100, "cpu").sample(logits, requests)
    assert sampled.logprobs[1] is None and sampled.logprobs[2].top == ()
    for row in (0, 2, 3):
        entry, token_id = sampled.logprobs[row], sampled.token_ids[row]
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-6)
        best = expected[row].topk(params[row].logprobs)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert sampled.token_ids[3] == sampled.logprobs[3].top[1][0], "the best token was not allowed yet"


# Trouble


WAYS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, min_p=0.1, min_new_tokens=2, stop_token_ids=(17,)),
    SamplingParams(repetition_penalty=1.2),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_whose_logits_are_not_finite_fails_alone(bad):
    """A NaN or +inf anywhere, or nothing but -inf; the other rows get what they get without it."""
    logits = random_logits(2 * len(WAYS), 300)
    good = [make_request(params, request_id=f"good {row}") for row, params in enumerate(WAYS)]
    broken = [make_request(params, request_id=f"bad {row}") for row, params in enumerate(WAYS)]
    expected = Sampler(300, "cpu").sample(logits[::2], good)
    if bad == -math.inf:
        logits[1::2] = bad
    else:
        logits[1::2, 17] = bad
    requests = [request for pair in zip(good, broken, strict=True) for request in pair]
    before = logits.clone()
    sampled = Sampler(300, "cpu").sample(logits, requests)
    assert sampled.token_ids[::2] == expected.token_ids and not expected.failures
    assert sampled.token_ids[1::2] == [-1] * len(WAYS)
    assert list(sampled.failures) == list(range(1, 2 * len(WAYS), 2))
    found = {math.nan: "1 are NaN, 0 infinite", math.inf: "0 are NaN, 1 infinite", -math.inf: "all are -inf"}[bad]
    for reason in sampled.failures.values():
        assert found in reason and "check the checkpoint's weights" in reason and "float16" not in reason
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the model's logits are not ours to change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overflow_is_blamed_where_the_model_computes_in_float16_only(dtype):
    logits = torch.full((1, 8), math.nan)
    (reason,) = Sampler(8, "cpu", dtype=dtype).sample(logits, [make_request(SamplingParams())]).failures.values()
    assert "of 8 logits 8 are NaN, 0 infinite" in reason and "check the checkpoint's weights" in reason
    overflow = "with model_config.dtype: float16 an activation has most likely overflowed: use bfloat16 or float32"
    assert (overflow in reason) == (dtype == torch.float16) and ("overflow" in reason) == (dtype == torch.float16)


def test_a_broken_row_reports_no_logprobs_and_the_others_theirs():
    logits = random_logits(2, 300)
    logits[0, 3] = math.nan
    requests = [make_request(SamplingParams(logprobs=2), request_id=str(row)) for row in range(2)]
    sampled = Sampler(300, "cpu").sample(logits, requests)
    assert sampled.logprobs[0] is None and sampled.logprobs[1].token_id == int(logits[1].argmax())


def test_a_model_may_rule_tokens_out():
    logits = torch.full((len(WAYS), 300), -math.inf)
    logits[:, 41] = -5.0
    requests = [make_request(params, request_id=str(row)) for row, params in enumerate(WAYS)]
    sampled = Sampler(300, "cpu").sample(logits, requests)
    assert sampled.token_ids == [41] * len(WAYS) and not sampled.failures


def test_a_minimum_that_bars_every_token_is_the_parameters_fault():
    params = SamplingParams(min_new_tokens=3, stop_token_ids=(0, 1, 2))
    sampled = Sampler(3, "cpu").sample(torch.zeros(1, 3), [make_request(params)])
    assert sampled.token_ids == [-1] and "lower min_new_tokens" in sampled.failures[0]


def test_no_rows():
    assert Sampler(10, "cpu").sample(torch.zeros(0, 10), []).token_ids == []


def test_good_parameters_pass():
    check_params(SamplingParams(), 10)
    check_params(SamplingParams(temperature=2, top_k=5, top_p=1, min_p=1, seed=0, stop=("x",), stop_token_ids=(9,)), 10)
    check_params(SamplingParams(logprobs=20, n=3, min_new_tokens=128, presence_penalty=-2.0), 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 10**400),
        ("presence_penalty", 2.5),
        ("frequency_penalty", None),
        ("seed", 0.5),
        ("seed", -1),
        ("seed", True),
        ("ignore_eos", "no"),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("logprobs", -1),
        ("logprobs", 21),
        ("n", 0),
        ("stop", ("",)),
        ("stop_token_ids", (10,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(UserError, match=rf"generation_config.{name} .*allowed: "):
        check_params(replace(SamplingParams(), **{name: value}), 10)
