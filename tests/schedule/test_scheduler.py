"""The policy of the scheduler, one rule a test."""

import sys

import pytest

from executor.errors import UserError
from executor.schedule.plan import Plan
from executor.schedule.request import FinishReason, Status
from executor.schedule.scheduler import Scheduler
from executor.schedule.waiting import Waiting
from tests.schedule.fakes import EOS, FakeRunner, media, request, run, scheduler


def shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(row.request.id, row.start, row.num_tokens) for row in plan.rows]


def step(s: Scheduler, token_id: int = 7) -> list[tuple[str, int, int]]:
    """One step in which every row that yields gets `token_id`; the rows of its plan."""
    plan = s.schedule()
    s.check()
    s.update(plan, [[token_id] * bool(row.max_yield) for row in plan.rows])
    s.check()
    return shape(plan)


def test_nothing_to_do():
    s = scheduler()
    assert not s.has_work and s.schedule() == Plan(())
    assert s.update(Plan(()), []) == []


def test_prefill_then_decode_until_the_length():
    s, r = scheduler(), request("a", range(10, 16), max_new_tokens=3)
    s.add(r)
    assert step(s) == [("a", 0, 6)] and r.first_token_s is not None and r.num_computed_tokens == 6
    assert step(s) == [("a", 6, 1)] and step(s) == [("a", 7, 1)]
    assert r.finished and r.finish_reason is FinishReason.LENGTH and r.finish_s >= r.first_token_s
    assert r.output_token_ids == [7, 7, 7] and not s.has_work and s.pool.num_free == 64


def test_decode_rows_come_first_and_the_rest_is_cut_to_the_budget():
    s = scheduler(max_num_batched_tokens=10)
    s.add(request("a", range(10, 14)))
    s.add(request("b", range(30, 50)))
    assert step(s) == [("a", 0, 4), ("b", 0, 6)]
    s.add(request("c", range(60, 64)))
    assert step(s) == [("a", 4, 1), ("b", 6, 9)]
    assert step(s) == [("a", 5, 1), ("b", 15, 5), ("c", 0, 4)]
    assert step(s) == [("a", 6, 1), ("b", 20, 1), ("c", 4, 1)]


def test_a_long_prompt_under_way_leaves_short_texts_a_share_of_each_step():
    s = scheduler(max_num_batched_tokens=40, max_model_len=256)
    s.add(request("long", range(100)))
    assert step(s) == [("long", 0, 40)]
    for name, length in (("a", 6), ("b", 4), ("c", 5), ("other", 30)):
        s.add(request(name, [ord(name[0])] * length))
    assert step(s) == [("a", 0, 6), ("b", 0, 4), ("long", 40, 30)], "a quarter is 10 tokens"
    assert step(s) == [("a", 6, 1), ("b", 4, 1), ("c", 0, 5), ("long", 70, 30), ("other", 0, 3)]


def test_without_chunks_prompts_stay_whole_and_in_order():
    s = scheduler(max_num_batched_tokens=10, enable_chunked_prefill=False)
    for name, length in (("a", 4), ("b", 9), ("c", 2)):
        s.add(request(name, [ord(name)] * length))
    assert step(s) == [("a", 0, 4)]
    assert step(s) == [("a", 4, 1), ("b", 0, 9)]
    assert step(s) == [("a", 5, 1), ("b", 9, 1), ("c", 0, 2)]


def test_sequence_slots():
    s = scheduler(max_num_seqs=2)
    for name in "abc":
        s.add(request(name, range(10, 14), max_new_tokens=2))
    assert [row[0] for row in step(s)] == ["a", "b"] and s.num_waiting == 1 and s.num_running == 2
    step(s)
    assert [row[0] for row in step(s)] == ["c"]


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (20, {"max_model_len": 20}, "maximum context length is 20 tokens, requested 21 or more: the prompt has 20 "),
        (8, {"num_blocks": 2}, "needs 3 KV blocks of 4 tokens, there are 2"),
        (11, {"max_num_batched_tokens": 10, "enable_chunked_prefill": False}, "has 11 tokens, a step at most 10"),
        (0, {}, "the prompt is empty"),
    ],
)
def test_what_never_fits_is_refused(length, options, message):
    s = scheduler(**options)
    with pytest.raises(UserError, match=message):
        s.add(request("a", range(10, 10 + length)))
    assert not s.has_work
    s.add(request("b", range(10, 14), max_new_tokens=1))
    assert step(s) == [("b", 0, 4)]


def test_bad_parameters_are_refused():
    s = scheduler()
    s.add(request("a", range(4)))
    with pytest.raises(UserError, match="'a' is in use"):
        s.add(request("a", range(4)))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        s.add(request("b", range(4), max_new_tokens=0))


def test_answers_end_at_the_context_length():
    s, r = scheduler(max_model_len=10), request("a", range(10, 17), ignore_eos=True)
    run(s, [r])
    assert r.num_tokens == 10 and r.finish_reason is FinishReason.LENGTH


def test_a_request_alone_goes_up_to_the_limit_of_the_pool():
    s, r = scheduler(num_blocks=3), request("a", range(10, 17), ignore_eos=True)
    run(s, [r])
    assert r.num_tokens == 13 and r.finish_reason is FinishReason.LENGTH and r.num_preemptions == 0


def test_ends_by_token():
    s = scheduler()
    requests = {
        "eos": request("eos", [5]),
        "ignored": request("ignored", [6], ignore_eos=True, max_new_tokens=3),
        "early": request("early", [7], min_new_tokens=2),
        "stop": request("stop", [8], stop_token_ids=(EOS,), ignore_eos=True),
    }
    for each in requests.values():
        s.add(each)
    while s.has_work:
        step(s, EOS)
    found = {name: (len(r.output_token_ids), r.finish_reason, r.stop_reason) for name, r in requests.items()}
    assert found == {
        "eos": (1, FinishReason.STOP, None),
        "ignored": (3, FinishReason.LENGTH, None),
        "early": (2, FinishReason.STOP, None),
        "stop": (1, FinishReason.STOP, EOS),
    }


def test_stop_strings_end_a_request_and_name_the_reason():
    s = scheduler()
    running, ended = request("a", [5, 6]), request("b", [7, 8], max_new_tokens=1)
    s.add(running)
    s.add(ended)
    step(s)
    assert ended.finish_reason is FinishReason.LENGTH
    for each in (running, ended):
        s.finish(each, FinishReason.STOP, "###")
        assert each.finished and (each.finish_reason, each.stop_reason) == (FinishReason.STOP, "###")
    s.check()
    assert not s.has_work and s.pool.num_free == 64


def test_abort_waiting_running_and_within_a_step():
    s = scheduler(max_num_seqs=2)
    requests = [request(name, [ord(name)] * 5) for name in "abc"]
    for each in requests:
        s.add(each)
    assert s.abort("c") is requests[2] and requests[2].finish_reason is FinishReason.ABORT
    assert s.abort("c") is None and s.abort("nobody") is None
    plan = s.schedule()
    assert [row.request.id for row in plan.rows] == ["a", "b"]
    s.abort("a")
    s.finish(requests[0], FinishReason.STOP, "x")
    assert requests[0].finish_reason is FinishReason.ABORT
    assert s.update(plan, [[20], [21]]) == [(requests[1], [21])]
    assert requests[0].output_token_ids == [] and requests[1].output_token_ids == [21]
    s.check()
    s.abort("b")
    s.check()
    assert not s.has_work and s.pool.num_free == 64


def test_a_shared_prefix_is_computed_once():
    s = scheduler()
    first, second = request("a", range(10, 24), max_new_tokens=2), request("b", [*range(10, 20), 5, 6, 7])
    s.add(first)
    step(s)
    s.add(second)
    assert step(s) == [("a", 14, 1), ("b", 8, 5)]
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 8
    same = request("c", range(10, 22), max_new_tokens=1)
    s.add(same)
    assert step(s)[-1] == ("c", 8, 4), "the last token is computed even if its block is known"


def test_a_prefix_under_way_is_waited_for_one_step():
    s = scheduler()
    for name in "abc":
        s.add(request(name, range(10, 30), max_new_tokens=4))
    s.add(request("d", [10, 11, 12, 13, *range(50, 66)]))
    assert step(s) == [("a", 0, 20)]
    assert step(s) == [("a", 20, 1), ("b", 16, 4), ("c", 16, 4), ("d", 4, 16)]


def test_little_in_common_is_not_waited_for():
    s = scheduler()
    s.add(request("a", range(10, 20)))
    s.add(request("b", [10, 11, 12, 13, *range(50, 66)]))
    assert step(s) == [("a", 0, 10), ("b", 0, 20)]


def test_prefix_caching_can_be_off():
    s = scheduler(enable_prefix_caching=False)
    for name in "ab":
        s.add(request(name, range(10, 22), max_new_tokens=1))
    assert step(s) == [("a", 0, 12), ("b", 0, 12)]


def test_the_last_admitted_gives_way_and_comes_back_first():
    s = scheduler(num_blocks=6, enable_prefix_caching=False)
    a, b, c = (request(name, [ord(name)] * 7, max_new_tokens=8) for name in "abc")
    for each in (a, b):
        s.add(each)
    assert step(s) == [("a", 0, 7), ("b", 0, 7)]
    for _ in range(5):
        step(s)  # a and b have three blocks each when they have nine tokens
    s.add(c)
    assert step(s) == [("a", 12, 1)], "a takes a block of b; c cannot overtake b"
    assert b.status is Status.WAITING and b.num_preemptions == 1 and b.block_ids == [] and len(b.output_token_ids) == 6
    assert step(s) == [("a", 13, 1)]
    assert a.finished
    assert step(s) == [("b", 0, 13)], "b is computed again with what it has said, and c waits for a spare block"
    while s.has_work:
        step(s)
    assert len(b.output_token_ids) == len(c.output_token_ids) == 8


def test_recomputing_what_outgrew_a_step_is_split_even_without_chunks():
    s = scheduler(num_blocks=8, max_num_batched_tokens=8, enable_chunked_prefill=False, max_num_seqs=2)
    requests = [request(name, [ord(name)] * 7, max_new_tokens=20, ignore_eos=True) for name in "ab"]
    plans = run(s, requests)
    assert requests[1].num_preemptions
    assert any(not row.max_yield for plan in plans for row in plan.rows)
    assert [len(each.output_token_ids) for each in requests] == [20, 20]


def test_what_was_split_goes_on_in_every_step():
    """A recomputation does not wait for a step that holds all its rest, which decode rows could keep from it."""
    s = scheduler(num_blocks=14, max_num_batched_tokens=9, enable_chunked_prefill=False, enable_prefix_caching=False)
    c = request("c", [9] * 7, max_new_tokens=20)
    for each in (request("a", [7] * 7, max_new_tokens=22), request("b", [8] * 7, max_new_tokens=13), c):
        s.add(each)
    rows = []
    while not c.finished:
        rows.append([num_tokens for name, _, num_tokens in step(s) if name == "c"])
    assert c.num_preemptions == 1
    again = next(index for index in range(3, len(rows)) if rows[index] and rows[index] != [1])
    assert rows[again : again + 2] == [[8], [8]] and all(rows[again:]), rows


def test_room_to_grow_is_given_up_at_the_end():
    s = scheduler(enable_prefix_caching=False)
    s.add(request("a", [5] * 6, max_new_tokens=20))
    step(s)
    s.abort("a")
    b = request("b", [6] * 6, max_new_tokens=40)
    s.add(b)
    step(s)
    assert b.block_ids == [0, 1]


def test_prompt_and_answer_lie_in_one_run_of_blocks():
    s = scheduler(num_blocks=64)
    requests = [request(name, [ord(name)] * 9, max_new_tokens=16, ignore_eos=True) for name in "abcd"]
    for each in requests:
        s.add(each)
    while s.has_work:
        block_ids = [list(each.block_ids) for each in requests]
        step(s)
        for ids in block_ids:
            assert ids == list(range(ids[0], ids[0] + len(ids))) if ids else True
    assert all(len(each.output_token_ids) == 16 for each in requests)


def test_images_of_several_requests_are_encoded_together_and_equal_ones_once():
    s = scheduler()
    red, blue = media("red", 6), media("blue", 6)
    s.add(request("a", [5], red, [6]))
    s.add(request("b", [7], red, [8], blue))
    s.add(request("c", [9, 9]))
    plan = s.schedule()
    assert len(plan.rows) == 3 and [item.digest for item in plan.encode] == [b"red", b"blue"]


def test_media_within_a_known_prefix_are_not_encoded_again():
    s = scheduler(encoder_cache_tokens=8)
    runner = FakeRunner(s)
    for name in "abc":
        other = media(name, 8)  # drives the picture out of the encoder cache
        for each in (request(name + "1", [5, 5], media("red", 6), [6, ord(name)]), request(name + "2", other)):
            s.add(each)
            while s.has_work:
                plan = s.schedule()
                s.update(plan, runner.execute(plan))
    assert runner.num_encoded == {b"red": 1, b"a": 1, b"b": 1, b"c": 1}


def test_what_is_forgotten_is_computed_again_and_what_runs_keeps_what_it_has():
    s = scheduler()
    runner = FakeRunner(s)

    def answer(name):
        s.add(request(name, [5, 5], media("red", 6), [6, 7, 8]))
        while s.has_work:
            plan = s.schedule()
            s.update(plan, runner.execute(plan))
            s.check()

    answer("a")
    answer("b")
    assert runner.num_encoded == {b"red": 1}
    s.forget()
    s.check()
    assert s.pool.num_cached == 0
    answer("c")
    assert runner.num_encoded == {b"red": 2}
    s.add(request("d", range(10, 22), max_new_tokens=3))
    step(s)
    s.forget()
    assert step(s) == [("d", 12, 1)]


def test_a_chunk_may_end_inside_a_picture():
    s = scheduler(max_num_batched_tokens=6, encoder_cache_tokens=12)
    s.add(request("a", [5, 5], media("red", 9), [6], media("blue", 4)))
    first = s.schedule()
    assert shape(first) == [("a", 0, 6)] and [item.digest for item in first.encode] == [b"red"]
    s.update(first, [[]])
    second = s.schedule()
    assert shape(second) == [("a", 6, 6)] and second.encode == ()
    s.update(second, [[]])
    third = s.schedule()
    assert shape(third) == [("a", 12, 4)] and [item.digest for item in third.encode] == [b"blue"]
    assert third.release == (b"red",)
    s.check()


def test_a_chunk_ends_before_the_picture_that_has_no_room():
    s = scheduler(encoder_cache_tokens=10)
    s.add(request("a", [5, 5], media("red", 9), [6], media("blue", 4)))
    s.add(request("b", [7, 7], media("green", 4)))
    assert step(s) == [("a", 0, 12), ("b", 0, 2)]
    assert step(s) == [("a", 12, 4), ("b", 2, 4)]


def test_a_picture_larger_than_the_encoder_cache_is_taken_alone():
    s = scheduler(encoder_cache_tokens=10)
    s.add(request("a", [5] * 3, media("small", 6)))
    s.add(request("b", [6] * 3, media("huge", 30)))
    s.add(request("c", [7] * 3, media("late", 6)))
    assert step(s) == [("a", 0, 9), ("b", 0, 3), ("c", 0, 3)]
    plan = s.schedule()
    assert shape(plan) == [("a", 9, 1), ("b", 3, 30)], "c does not push in"
    assert plan.release == (b"small",)
    s.update(plan, [[7], [7]])
    plan = s.schedule()
    assert shape(plan) == [("a", 10, 1), ("b", 33, 1), ("c", 3, 6)] and plan.release == (b"huge",)


def test_more_pictures_than_fit_without_chunks_are_taken_alone():
    s = scheduler(encoder_cache_tokens=10, enable_chunked_prefill=False)
    requests = [request("a", media("x", 6)), request("b", media("y", 6), media("z", 6), media("y", 6))]
    for each in requests:
        s.add(each)
    assert step(s) == [("a", 0, 6)]
    plan = s.schedule()
    assert shape(plan) == [("a", 6, 1), ("b", 0, 18)] and len(plan.encode) == 2


def test_a_picture_shown_again_after_others_does_not_block_itself():
    s = scheduler(encoder_cache_tokens=8)
    r = request("a", media("red", 8), [5], media("blue", 8), [6], media("red", 8), max_new_tokens=1)
    plans = run(s, [r])
    assert [row.num_tokens for plan in plans for row in plan.rows] == [9, 9, 8]
    assert r.finished


def test_aborting_frees_embeddings():
    s = scheduler(encoder_cache_tokens=8, max_num_batched_tokens=6)
    s.add(request("a", media("red", 8)))
    plan = s.schedule()
    s.abort("a")
    s.update(plan, [[]])
    s.check()
    s.add(request("b", media("blue", 8)))
    plan = s.schedule()
    assert plan.release == (b"red",) and [item.digest for item in plan.encode] == [b"blue"]


def test_what_follows_the_end_of_an_answer_is_dropped():
    s = scheduler(max_yield=4)
    requests = {
        "eos": request("eos", [5] * 3, max_new_tokens=20),
        "stop": request("stop", [6] * 3, max_new_tokens=20, stop_token_ids=9),
        "length": request("length", [7] * 3, max_new_tokens=3, ignore_eos=True),
        "early": request("early", [8] * 3, max_new_tokens=20, min_new_tokens=4),
    }
    for each in requests.values():
        s.add(each)
    step(s)
    plan = s.schedule()
    assert [row.max_yield for row in plan.rows] == [4, 4, 2, 4], "no more than the answer may still have"
    updated = s.update(plan, [[EOS, 8, 8, 8], [8, 9, EOS], [EOS, 8], [EOS, 8, EOS, 8]])
    s.check()
    assert [new for _, new in updated] == [[EOS], [8, 9], [EOS, 8], [EOS, 8, EOS]]
    found = {name: (r.output_token_ids, r.finish_reason, r.stop_reason) for name, r in requests.items()}
    assert found == {
        "eos": ([7, EOS], FinishReason.STOP, None),
        "stop": ([7, 8, 9], FinishReason.STOP, 9),
        "length": ([7, EOS, 8], FinishReason.LENGTH, None),
        "early": ([7, EOS, 8, EOS], FinishReason.STOP, None),
    }
    assert not s.has_work and s.pool.num_free == 64


@pytest.mark.parametrize("tokens", [[], [7, 7, 7]])
def test_a_row_yields_at_least_one_token_and_no_more_than_it_may(tokens):
    s = scheduler(max_yield=2)
    s.add(request("a", [5] * 3))
    step(s)
    with pytest.raises(AssertionError, match="row that may yield 2"):
        s.update(s.schedule(), [tokens])


def test_guesses_take_budget_only_when_every_row_has_its_token():
    s = scheduler(max_yield=5, max_num_batched_tokens=6, max_num_seqs=4)
    for name in "abc":
        s.add(request(name, [ord(name)], max_new_tokens=20))
    step(s)
    assert [row.max_yield for row in s.schedule().rows] == [4, 1, 1]


def test_guesses_preempt_nobody_and_take_no_block_that_a_running_request_will_need():
    s = scheduler(max_yield=5, num_blocks=4, max_num_seqs=2)
    for name in "ab":
        s.add(request(name, [ord(name)] * 2, max_new_tokens=9))
    step(s)
    plan = s.schedule()
    assert [row.max_yield for row in plan.rows] == [2, 2], "up to the end of the first block"
    s.check()


def test_a_step_that_failed_is_planned_again():
    s = scheduler(encoder_cache_tokens=8)
    s.add(request("a", [5], media("red", 6)))
    s.add(request("b", media("red", 6), [7]))
    failed = s.schedule()
    s.cancel(failed)
    s.check()
    again = s.schedule()
    assert shape(again) == shape(failed) and again.encode == failed.encode
    s.cancel(again)
    s.abort("a")
    s.abort("b")
    s.check()
    assert not s.has_work and s.pool.num_free == 64
    s.add(request("c", [5] * 3))
    plan = s.schedule()
    assert (plan.encode, plan.release) == ((), (b"red",)), "nobody knows whether it is there"


def test_media_that_cannot_be_encoded_are_tried_again_by_who_asks_again():
    s = scheduler()
    a, red = request("a", [5], media("red", 6)), media("red", 6)
    s.add(a)
    plan = s.schedule()
    s.fail(a, "too large")
    s.update(plan, [[]], missing=(b"red",))
    s.check()
    assert (a.finish_reason, a.error, a.finished) == (FinishReason.ERROR, "too large", True)
    s.add(request("b", red))
    assert s.schedule().encode == (red,)


def test_a_step_costs_the_same_however_many_wait():
    """Lines of Python that a decode step runs, and that an abort in the middle of the queue runs."""

    def lines_of(work) -> int:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
        return count

    def costs(num_waiting: int) -> list[int]:
        s = scheduler(max_num_seqs=2)
        for number in range(2 + num_waiting):
            s.add(request(str(number), range(10, 14), max_new_tokens=100))
        plan = s.schedule()
        s.update(plan, [[7], [7]])

        def one_step() -> None:
            plan = s.schedule()
            s.update(plan, [[7] for _ in plan.rows])

        found = [lines_of(one_step), lines_of(lambda: s.abort(str(num_waiting // 2)))]
        assert s.num_waiting == num_waiting - 1
        return found

    assert costs(10) == costs(3000)


def test_whoever_waits_leaves_from_anywhere():
    requests = [request(name, [7]) for name in "abcd"]
    waiting = Waiting(requests[:3])
    waiting.remove(requests[1])
    waiting.append_first(requests[3])
    waiting.append(requests[1])
    assert [r.id for r in waiting] == ["d", "a", "c", "b"] and waiting.first is requests[3] and len(waiting) == 4
    assert waiting.pop_first() is requests[3] and requests[3] not in waiting and requests[0] in waiting
