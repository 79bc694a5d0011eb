"""A thousand random steps: nothing lost, nobody starved, no spin, and every answer as if asked alone."""

import copy
import random
from collections import Counter
from collections.abc import Callable

import pytest

from executor.errors import UserError
from executor.schedule.plan import Plan
from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import FinishReason, Request, SamplingParams
from executor.schedule.scheduler import Scheduler
from tests.cases import mostly_long
from tests.schedule.fakes import EOS, FakeRunner, FakeStore, Fault, answer_alone, media, prompt, request, run

NUM_STEPS = 1000
ENDED_FROM_OUTSIDE = (FinishReason.ABORT, FinishReason.ERROR)
MAX_MODEL_LEN = 70
TINY = {
    "num_blocks": 20,
    "block_size": 4,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 16,
    "max_model_len": MAX_MODEL_LEN,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "encoder_cache_tokens": 16,
    "eos_token_ids": (EOS,),
}
CASES = {
    "tiny": {},
    "roomy": {"num_blocks": 200, "max_num_batched_tokens": 64, "encoder_cache_tokens": 100},
    "one_token_a_step": {"max_num_batched_tokens": 1, "max_num_seqs": 3},
    "whole_prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 24},
    "no_prefix_cache": {"enable_prefix_caching": False},
    "no_prefix_cache_whole": {
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 30,
    },
    "block_of_one": {"block_size": 1, "num_blocks": 75},
    "hardly_any_blocks": {"num_blocks": 9, "max_num_seqs": 8},
    "hardly_any_embeddings": {"encoder_cache_tokens": 4, "max_num_batched_tokens": 40},
    "several_tokens_a_row": {"max_yield": 4},
    "several_tokens_and_hardly_any_blocks": {"max_yield": 7, "num_blocks": 10, "max_num_seqs": 8},
    "several_tokens_in_blocks_of_one": {"max_yield": 3, "block_size": 1, "num_blocks": 75},
}


class Arrivals:
    """Random requests that share prefixes and media."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._media = [media(f"m{index}", size) for index, size in enumerate((2, 4, 5, 9, 23))]
        self._texts = [[rng.randint(3, 39) for _ in range(length)] for length in (3, 4, 8, 13)]
        self._count = 0

    def next(self) -> Request:
        rng = self._rng
        segments = [
            rng.choice(self._media) if rng.random() < 0.35 else rng.choice(self._texts)
            for _ in range(rng.choice((1, 2, 3, 3, 5, 9)))
        ]
        if rng.random() < 0.5:
            segments.append([rng.randint(3, 39)])
        params = SamplingParams(
            max_new_tokens=rng.choice((1, 4, 15, 60)),
            min_new_tokens=rng.choice((0, 0, 5)),
            stop_token_ids=rng.choice(((), (17, 23))),
            ignore_eos=rng.random() < 0.3,
        )
        self._count += 1
        return Request(str(self._count), prompt(*segments, stride=rng.choice((1, 2))), params)


class Soak:
    """Steps a scheduler with a checking runner, with arrivals and aborts at every point between the calls."""

    def __init__(self, seed: int, options: dict, faults: float = 0.0) -> None:
        self.options = TINY | options
        self.faults = faults
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(**self.options)
        self.runner = FakeRunner(self.scheduler, random.Random(seed))
        self.store: FakeStore | None = None
        self.arrivals = Arrivals(self.rng)
        self.unfinished: dict[Request, int] = {}  # and the step they arrived in
        self.done: list[Request] = []
        self.num_refused = 0
        self.num_yielded: Counter[int] = Counter()
        self.num_steps = 0
        self.under_way: tuple[Plan, list[list[int]], set[int]] | None = None
        self.num_ahead = self.num_void = self.num_in_vain = 0

    def add(self) -> None:
        arrival = self.arrivals.next()
        if self.store is not None:
            digests = BlockDigests(arrival, self.options["block_size"]).extend(arrival.num_tokens - 1)
            self.store.fetch(arrival.prompt, digests)
        try:
            self.scheduler.add(arrival)
        except UserError:
            self.num_refused += 1
            if self.store is not None:
                self.store.drop(arrival.prompt)  # it goes, and what is at hand for it
        else:
            self.unfinished[arrival] = self.num_steps

    def abort(self) -> None:
        if self.unfinished:
            victim = self.rng.choice(list(self.unfinished))
            was_finished = victim.finished  # aborted in this step before
            assert self.scheduler.abort(victim.id) is (None if was_finished else victim)

    def sometimes(self, probability: float, action: Callable[[], None]) -> None:
        if self.rng.random() < probability:
            action()
            self.scheduler.check()

    def step(self, load: bool) -> None:
        if load:
            self.sometimes(0.5 if len(self.unfinished) < 12 else 0, self.add)
            self.sometimes(0.02, self.abort)
        self.num_steps += 1
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert bool(plan.rows) == self.scheduler.has_work
        if not plan.rows:
            return
        if load:
            self.sometimes(0.02, self.abort)
            self.sometimes(0.05, self.add)
        before = {row.request: row.request.num_computed_tokens for row in plan.rows}
        if load and self.faults and self.rng.random() < self.faults / 2:
            with pytest.raises(Fault):
                self.runner.fail(plan, self.rng)
            self.sometimes(0.3, self.abort)
            self.scheduler.cancel(plan)
            self.scheduler.check()
            self.collect()
            return
        missing = {item.digest for item in plan.encode if load and self.faults and self.rng.random() < self.faults}
        new_tokens = self.runner.execute(plan, missing)
        for row in plan.rows:
            if self.runner.reads(row, missing):
                self.scheduler.fail(row.request, "unreadable")
        if load:
            self.sometimes(0.02 if not missing else 0, self.abort)
        updated = self.scheduler.update(plan, new_tokens, missing)
        self.scheduler.check()
        assert all(r.finished or r.num_computed_tokens > computed for r, computed in before.items())
        sampled = [row.request for row in plan.rows if row.max_yield]
        assert [r for r, _ in updated] == [r for r in sampled if r.finish_reason not in ENDED_FROM_OUTSIDE]
        for r, kept in updated:
            assert kept == r.output_token_ids[-len(kept) :] and kept
            self.num_yielded[len(kept)] += 1
        self.collect()

    def step_ahead(self, load: bool) -> None:
        """`step`, with the next plan made and computed before this one's tokens are told, where that may be."""
        if load:
            self.sometimes(0.5 if len(self.unfinished) < 12 else 0, self.add)
            self.sometimes(0.02, self.abort)
        self.num_steps += 1
        if self.under_way is None:
            plan = self.scheduler.schedule()
            self.scheduler.check()
            if not plan.rows:
                return
            self.under_way = plan, self.runner.execute(plan), set()
        plan, tokens, void = self.under_way
        following, next_void = None, set()
        if not void:
            ahead = self.scheduler.schedule_ahead(plan)
            self.scheduler.check()
            if ahead is not None:
                self.check_ahead(plan, ahead)
                following = self.runner.execute(ahead, before=tokens)
                self.num_ahead += 1
                void = {n for n in range(len(plan.rows)) if load and self.rng.random() < 0.02}
                gone = {plan.rows[number].request for number in void}
                next_void = {n for n, row in enumerate(ahead.rows) if row.request in gone}
        if load:
            self.sometimes(0.05, self.abort)
            self.sometimes(0.05, self.add)
        kept = [each for number, each in enumerate(tokens) if number not in void]
        updated = self.scheduler.update(plan.without(void), kept)
        self.scheduler.check()
        self.num_void += len(void)
        self.num_in_vain += following is not None and any(r.finished for r, _ in updated)
        self.collect()
        self.under_way = None if following is None else (ahead, following, next_void)

    def check_ahead(self, plan: Plan, ahead: Plan) -> None:
        """What must hold of a plan that is made before the tokens of the one before it are known."""
        assert ahead.is_decode and len(ahead.continues) == len(ahead.rows) > 0
        assert [row.request for row in ahead.rows] == [plan.rows[place].request for place in ahead.continues]
        for row, place in zip(ahead.rows, ahead.continues, strict=True):
            before = plan.rows[place]
            assert (row.start, row.num_tokens, row.max_yield) == (before.start + before.num_tokens, 1, 1)
            assert len(row.request.output_token_ids) + 1 < row.request.params.max_new_tokens

    def collect(self) -> None:
        for finished in [r for r in self.unfinished if r.finished]:
            self.done.append(finished)
            del self.unfinished[finished]


def check_answer(answered: Request, options: dict) -> None:
    num_prompt = len(answered.prompt.token_ids)
    limit = min(options["max_model_len"], options["num_blocks"] * options["block_size"] + 1) - num_prompt
    expected = answer_alone(answered.prompt, answered.params, limit)
    if answered.finish_reason in ENDED_FROM_OUTSIDE:
        assert (answered.error == "unreadable") == (answered.finish_reason is FinishReason.ERROR)
        assert answered.output_token_ids == expected[: len(answered.output_token_ids)]
        return
    assert answered.output_token_ids == expected
    ends = {*answered.params.stop_token_ids, *(() if answered.params.ignore_eos else (EOS,))}
    stops = expected[-1] in ends and len(expected) >= answered.params.min_new_tokens
    assert answered.finish_reason is (FinishReason.STOP if stops else FinishReason.LENGTH)


@pytest.mark.parametrize("seed", mostly_long(range(3), [0]))  # a thousand steps meet everything: see the last tests
@pytest.mark.parametrize("case", CASES)
def test_a_thousand_random_steps(case, seed):
    soak = Soak(seed, CASES[case])
    longest = 0
    for _ in range(NUM_STEPS):
        soak.step(load=True)
        longest = max([longest, *(soak.num_steps - arrived for arrived in soak.unfinished.values())])
    while soak.scheduler.has_work:
        soak.step(load=False)
        assert soak.num_steps < NUM_STEPS + 900, "does not drain"
    # At most 13 unfinished at a time, each of at most 70 tokens, each step at least one token.
    assert longest < 13 * 70, "a request was starved"
    assert not soak.unfinished and soak.scheduler.pool.num_free == soak.options["num_blocks"]
    for answered in soak.done:
        check_answer(answered, soak.options)
    if soak.options["max_num_batched_tokens"] > 1:
        assert len(soak.done) > 50


@pytest.mark.parametrize("seed", mostly_long(range(2), [0]))
@pytest.mark.parametrize("case", ["tiny", "roomy", "one_token_a_step", "whole_prompts", "hardly_any_blocks"])
def test_plans_made_before_the_tokens_of_the_last_are_known(case, seed):
    """Every answer is as if asked alone; rows computed in vain, and void ones, harm nobody."""
    soak = Soak(seed, CASES[case])
    for _ in range(NUM_STEPS):
        soak.step_ahead(load=True)
    while soak.scheduler.has_work:
        soak.step_ahead(load=False)
        assert soak.num_steps < NUM_STEPS + 1500, "does not drain"
    assert not soak.unfinished and soak.scheduler.pool.num_free == soak.options["num_blocks"]
    for answered in soak.done:
        check_answer(answered, soak.options)
    if case != "one_token_a_step":
        assert soak.num_ahead > 50 and soak.num_void > 3 and soak.num_in_vain > 5 and len(soak.done) > 30


@pytest.mark.parametrize("options", [{}, {"num_blocks": 200}, {"num_blocks": 10, "max_num_seqs": 8}])
def test_a_plan_ahead_is_the_one_that_would_be_made(options):
    """Of a copy of the scheduler that is told the tokens first, wherever nothing has ended there but by its length."""
    soak, num_equal = Soak(5, options), 0
    for _ in range(300):
        if len(soak.unfinished) < 6:
            soak.add()
        plan = soak.scheduler.schedule()
        if not plan.rows:
            continue
        tokens = soak.runner.execute(plan)
        told, told_plan = copy.deepcopy((soak.scheduler, plan))
        ahead = soak.scheduler.schedule_ahead(plan)
        soak.scheduler.update(plan, tokens)
        soak.collect()
        told.update(told_plan, tokens)
        usual = told.schedule()
        if ahead is not None and not any(row.request.finished for row in ahead.rows):
            assert described(ahead) == described(usual)
            num_equal += 1
    assert num_equal > 30


def described(plan: Plan) -> list[tuple[str, int, int, int, int]]:
    return [(r.request.id, r.start, r.num_tokens, r.max_yield, len(r.request.block_ids)) for r in plan.rows]


@pytest.mark.parametrize("seed", mostly_long(range(2), [0]))
@pytest.mark.parametrize("case", ["tiny", "several_tokens_a_row", "hardly_any_embeddings"])
def test_steps_that_fail_and_media_that_cannot_be_encoded_harm_nobody_else(case, seed):
    soak = Soak(seed, CASES[case], faults=0.2)
    for _ in range(400):
        soak.step(load=True)
    while soak.scheduler.has_work:
        soak.step(load=False)
        assert soak.num_steps < 1300, "does not drain"
    assert not soak.unfinished and soak.scheduler.pool.num_free == soak.options["num_blocks"]
    for answered in soak.done:
        check_answer(answered, soak.options)
    reasons = Counter(answered.finish_reason for answered in soak.done)
    assert reasons[FinishReason.ERROR] > 3 and reasons[FinishReason.LENGTH] + reasons[FinishReason.STOP] > 30


@pytest.mark.parametrize("seed", mostly_long(range(2), [0]))
@pytest.mark.parametrize("case", ["tiny", "roomy", "whole_prompts", "hardly_any_blocks", "several_tokens_a_row"])
def test_blocks_of_a_store_are_those_that_were_computed(case, seed):
    """It outlives the scheduler, loses blocks, and steps fail beside it."""
    blocks, num_loaded = {}, 0
    for life in range(3):
        soak = Soak(seed + 10 * (life == 1), CASES[case], faults=0.1)
        soak.store = soak.scheduler.store = FakeStore(soak.rng)
        soak.store.blocks = blocks
        for _ in range(250):
            soak.step(load=True)
        while soak.scheduler.has_work:
            soak.step(load=False)
        assert not soak.unfinished and soak.scheduler.pool.num_free == soak.options["num_blocks"]
        for answered in soak.done:
            check_answer(answered, soak.options)
        assert not soak.store.at_hand, "nothing stays at hand for requests that have ended"
        assert 0 < soak.scheduler.num_store_hits < soak.scheduler.num_store_queries
        num_loaded += soak.store.num_loaded
    assert num_loaded > 50


def test_what_a_store_has_is_loaded_once_and_then_shared():
    store = FakeStore(random.Random(0), loses=0.0)
    for life in range(2):
        scheduler = Scheduler(**(TINY | {"max_num_batched_tokens": 64, "num_blocks": 200}))
        scheduler.store = store
        runner = FakeRunner(scheduler)
        requests = [request(f"r{index}", [3, 4, 5] * 7, max_new_tokens=3, ignore_eos=True) for index in range(3)]
        for each in requests:
            store.fetch(each.prompt, BlockDigests(each, 4).extend(20))
            scheduler.add(each)
        plans = []
        while scheduler.has_work:
            plans.append(scheduler.schedule())
            scheduler.update(plans[-1], runner.execute(plans[-1]))
        for each in requests:
            check_answer(each, TINY | {"num_blocks": 200})
        # The others find in memory what the first has computed or loaded.
        assert [len(plan.rows) for plan in plans[:2]] == [1, 3]
        assert store.num_loaded == (0, 5)[life] and not store.at_hand
        assert scheduler.num_store_queries == 21 + 2 * 1 and scheduler.num_store_hits == (0, 20)[life]
        assert [len(plan.keep) for plan in plans[:2]] == [0, (5, 0)[life]]


def test_what_a_plan_was_to_keep_is_kept_when_it_is_cancelled():
    """By the next plan, but for blocks that the cancelled one has taken for its rows."""
    kept = []
    for num_blocks in (200, 6):
        store = FakeStore(random.Random(0), loses=0.0)
        scheduler = Scheduler(**(TINY | {"max_num_batched_tokens": 64, "num_blocks": num_blocks}))
        scheduler.store = store
        runner = FakeRunner(scheduler)
        scheduler.add(request("first", [3, 4, 5] * 7, max_new_tokens=1))
        plan = scheduler.schedule()
        scheduler.update(plan, runner.execute(plan))
        scheduler.add(request("second", [6, 7, 8] * 5, max_new_tokens=1))
        cancelled = scheduler.schedule()
        assert len(cancelled.keep) == 5
        scheduler.cancel(cancelled)
        plan = scheduler.schedule()
        kept.append(len(plan.keep))
        scheduler.update(plan, runner.execute(plan))
        assert len(store.blocks) == kept[-1] and not scheduler.has_work
    assert kept == [5, 2]


def test_several_tokens_a_step_are_fewer_steps_for_the_same_answers():
    steps = {}
    for max_yield in (1, 5):
        scheduler = Scheduler(**(TINY | {"max_num_batched_tokens": 64, "num_blocks": 200, "max_yield": max_yield}))
        runner, count = FakeRunner(scheduler, random.Random(3)), 0
        requests = [request(f"r{index}", [index + 3] * 5, max_new_tokens=40, ignore_eos=True) for index in range(4)]
        for each in requests:
            scheduler.add(each)
        while scheduler.has_work:
            plan = scheduler.schedule()
            scheduler.update(plan, runner.execute(plan))
            count += 1
        for each in requests:
            check_answer(each, TINY | {"num_blocks": 200})
        steps[max_yield] = count
    assert steps[1] == 40 and steps[5] < 25


def test_the_random_steps_reach_what_they_are_to_prove():
    """Preemptions, shared prefixes, cut pictures, evictions and refusals all happen in them."""
    soak = Soak(0, CASES["tiny"])
    for _ in range(NUM_STEPS):
        soak.step(load=True)
    assert sum(r.num_preemptions for r in soak.done) > 10
    assert sum(r.num_cached_tokens > 0 for r in soak.done) > 20
    assert sum(r.finish_reason is FinishReason.ABORT for r in soak.done) > 5
    assert max(soak.runner.num_encoded.values()) > 3, "embeddings were dropped and needed again"
    assert soak.num_refused > 5
    assert soak.runner.max_embedded_tokens == 23, "the picture larger than the cache was alone in it"
    several = Soak(0, CASES["several_tokens_a_row"])
    for _ in range(300):
        several.step(load=True)
    assert min(several.num_yielded[count] for count in (1, 2, 3, 4)) > 5


@pytest.mark.parametrize("options", [{}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 7}])
def test_answers_do_not_depend_on_the_order_of_arrival(options):
    rng = random.Random(11)
    arrivals = [r for r in (Arrivals(rng).next() for _ in range(40)) if r.num_tokens < 60]
    answers = []
    for _ in range(3):
        rng.shuffle(arrivals)
        again = [Request(str(index), r.prompt, r.params) for index, r in enumerate(arrivals)]
        run(Scheduler(**(TINY | options)), again)
        answers.append({id(r.prompt): r.output_token_ids for r in again})
    assert answers[0] == answers[1] == answers[2]


def test_an_older_request_is_not_overtaken_for_good():
    """A long prompt with a large picture is served although small requests keep arriving."""
    scheduler = Scheduler(**(TINY | {"num_blocks": 18, "encoder_cache_tokens": 8}))
    runner = FakeRunner(scheduler)
    large = request("large", [5] * 20, media("huge", 30), [6], max_new_tokens=4, ignore_eos=True)
    for step in range(200):
        if step == 5:
            scheduler.add(large)
        if scheduler.num_waiting < 4:
            scheduler.add(request(f"small{step}", [step % 30 + 3] * 3, media(f"p{step % 7}", 4), max_new_tokens=6))
        plan = scheduler.schedule()
        scheduler.update(plan, runner.execute(plan))
        scheduler.check()
    assert large.finished and len(large.output_token_ids) == 4
