"""The formulae, by hand and against numpy."""

import itertools

import numpy as np
import pytest

from executor.bench.results import RequestResult, Run
from executor.bench.statistics import Figure, chance_of_difference, differs, figures, latency, summarize, tpot_s


def request(sent_s, *token_times_s, **more):
    given = {"ended_s": token_times_s[-1], "output_tokens": len(token_times_s), "prompt_tokens": 10, **more}
    return RequestResult(sent_s=sent_s, token_times_s=token_times_s, **given)


def test_a_run_worked_by_hand():
    """Two answers and a failure in 4 s. TPOT counts each answer once, ITL each gap."""
    run = Run(
        4.0,
        (
            request(0.0, 1.0, 1.5, 3.0),  # TTFT 1, e2e 3, TPOT (3 - 1) / 2 = 1, gaps 0.5 and 1.5
            request(1.0, 3.0, 3.5, prompt_tokens=20),  # TTFT 2, e2e 2.5, TPOT 0.5, gap 0.5
            RequestResult(0.0, 0.1, prompt_tokens=99, error="refused"),
        ),
    )
    summary = summarize(run)
    assert (summary.requests, summary.failed, summary.completed) == (3, 1, 2)
    assert (summary.input_tokens, summary.output_tokens) == (30, 5)
    assert summary.request_per_s == 0.5
    assert summary.output_tokens_per_s == 1.25
    assert summary.total_tokens_per_s == 8.75
    assert (summary.ttft_ms.mean, summary.ttft_ms.median) == (1500, 1500)
    assert summary.ttft_ms.p99 == pytest.approx(1990)
    assert (summary.tpot_ms.mean, summary.tpot_ms.median) == (750, 750)
    assert summary.itl_ms.mean == pytest.approx(2500 / 3)
    assert summary.itl_ms.median == 500
    assert (summary.e2e_ms.mean, summary.e2e_ms.median) == (2750, 2750)


def test_pieces_of_several_tokens_count_their_tokens():
    """Over HTTP: five tokens in two pieces. TPOT is of the tokens, ITL of the pieces."""
    answer = request(0.0, 1.0, 3.0, output_tokens=5)
    assert tpot_s(answer) == 0.5
    assert summarize(Run(3.0, (answer,))).itl_ms.mean == 2000


def test_latencies_are_numpys():
    values = np.random.default_rng(3).exponential(0.1, 1013)
    found = latency(values)
    assert found.mean == pytest.approx(np.mean(values) * 1000)
    assert found.median == pytest.approx(np.median(values) * 1000)
    assert found.p99 == pytest.approx(np.percentile(values, 99) * 1000)


def test_answers_of_one_token_have_no_time_per_token():
    summary = summarize(Run(1.0, (request(0.0, 0.5),)))
    assert summary.ttft_ms.median == 500
    assert summary.tpot_ms.median is None and summary.itl_ms.p99 is None
    assert "tpot_ms.median" not in figures([Run(1.0, (request(0.0, 0.5),))])


def test_all_failed():
    summary = summarize(Run(2.0, (RequestResult(0.0, 1.0, error="no"),) * 3))
    assert (summary.failed, summary.completed, summary.request_per_s) == (3, 0, 0)
    assert summary.e2e_ms.mean is None


def test_repetitions_give_medians_and_their_range():
    runs = [Run(seconds, (request(0.0, seconds / 2, seconds),)) for seconds in (1.0, 4.0, 2.0)]
    duration = figures(runs)["duration_s"]
    assert (duration.median, duration.least, duration.most, duration.spread) == (2.0, 1.0, 4.0, 1.5)
    assert figures(runs[:1])["duration_s"].spread is None


def test_a_difference_is_larger_than_the_spread_only_where_ranges_are_apart():
    assert differs(Figure((1.0, 1.1, 1.2)), Figure((1.3, 1.25, 1.4))) is True
    assert differs(Figure((1.3, 1.25, 1.4)), Figure((1.0, 1.1, 1.2))) is True
    assert differs(Figure((1.0, 1.1, 1.3)), Figure((1.3, 1.25, 1.4))) is False
    assert differs(Figure((1.0,)), Figure((2.0, 2.1))) is None


@pytest.mark.parametrize("first, second", [(2, 2), (3, 3), (3, 5)])
def test_the_chance_of_a_false_difference_counted_out(first, second):
    """Over all ways to deal the ranks to two equal systems."""
    ranks = range(first + second)
    found = [
        differs(Figure(chosen), Figure(tuple(set(ranks) - set(chosen))))
        for chosen in itertools.combinations(ranks, first)
    ]
    assert chance_of_difference(first, second) == pytest.approx(sum(found) / len(found))
