"""Arrivals have the statistics that are asked for, and load is what the server sees of it."""

import asyncio
import functools

import numpy as np
import pytest

from executor.bench.client import Client, Endpoint, Reply
from executor.bench.load import arrival_times_s, loads_of, num_tokens_per_piece, results_of, send_all
from executor.bench.results import Load
from executor.errors import UserError
from tests.bench.scripted import Answer, Scripted, even


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_gaps_are_of_a_gamma_distribution_with_the_rate(rate, burstiness):
    times_s = np.array(arrival_times_s(20_000, rate, burstiness, seed=3))
    gaps = np.diff(times_s) * rate
    assert times_s[-1] == pytest.approx(20_000 / rate)  # the rate of the whole run is exact
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1, rel=0.01)
    # A gamma distribution of shape k has a coefficient of variation of 1/sqrt(k), and a skewness of 2/sqrt(k).
    assert gaps.std() == pytest.approx(burstiness**-0.5, rel=0.05)
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 * burstiness**-0.5, rel=0.15)
    # Gaps do not depend on each other.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_poisson_arrivals_are_as_many_in_equal_times_as_poisson_says():
    times_s = np.array(arrival_times_s(20_000, 10.0, 1.0, seed=5))
    counts = np.histogram(times_s, bins=np.arange(0, 2001))[0]
    assert counts.mean() == pytest.approx(10, rel=0.02) and counts.var() == pytest.approx(10, rel=0.1)


def test_without_a_rate_all_come_at_once():
    assert arrival_times_s(3, None, 1.0, 0) == [0.0] * 3 and arrival_times_s(0, 2.0, 1.0, 0) == []


def test_a_seed_gives_the_same_arrivals_and_another_one_others():
    assert arrival_times_s(5, 2.0, 1.0, 7) == arrival_times_s(5, 2.0, 1.0, 7) != arrival_times_s(5, 2.0, 1.0, 8)


def test_every_rate_with_every_number_at_once():
    assert loads_of((), ()) == [Load()]
    assert loads_of((1.0, 2.0), ()) == [Load(request_rate=1.0), Load(request_rate=2.0)]
    assert loads_of((), (4, 4, 8)) == [Load(concurrency=4), Load(concurrency=8)]
    assert loads_of((1.0, 2.0), (4, 8)) == [
        Load(request_rate=rate, concurrency=number) for rate in (1.0, 2.0) for number in (4, 8)
    ]


def sent(server: Scripted, bodies, arrivals_s, concurrency=None):
    async def main():
        async with server.listening():
            client = Client(Endpoint.at(server.url), 20.0)
            done = await send_all(client, bodies, arrivals_s, concurrency)
            client.close()
            return done

    return asyncio.run(main())


@pytest.mark.parametrize("concurrency", [1, 3, None])
def test_no_more_than_so_many_are_under_way(concurrency):
    server = Scripted(lambda number, body: even(2, ttft_s=0.05))
    replies, _, duration_s = sent(server, [b'{"n": %d}' % number for number in range(9)], [0.0] * 9, concurrency)
    assert [reply.error for reply in replies] == [None] * 9
    assert server.most_under_way == (concurrency or 9)
    assert duration_s >= 0.05 * 9 / (concurrency or 9)
    assert sorted(asked.body["n"] for asked in server.asked) == list(range(9))


def test_a_request_that_waits_for_its_place_has_not_been_sent():
    """Four requests one at a time: each one's time to the first token is that of an idle server."""
    server = Scripted(lambda number, body: even(2, ttft_s=0.1))
    replies, begun_s, duration_s = sent(server, [b"{}"] * 4, [0.0] * 4, 1)
    results = results_of(replies, begun_s)
    assert duration_s >= 0.4 and max(result.sent_s for result in results) >= 0.3
    assert all(result.ttft_s < 0.25 for result in results)


def test_requests_come_at_their_times():
    arrivals_s = [0.05, 0.1, 0.3, 0.32]
    server = Scripted(lambda number, body: even(1))
    replies, begun_s, duration_s = sent(server, [b"{}"] * 4, arrivals_s)
    late_s = [reply.sent_s - begun_s - arrival_s for reply, arrival_s in zip(replies, arrivals_s, strict=True)]
    assert min(late_s) >= 0 and sorted(late_s)[1] < 0.05  # most of them hardly late, whatever else runs
    assert duration_s >= 0.32


def test_replies_are_in_the_order_of_the_bodies():
    server = Scripted(lambda number, body: even(body["n"], ttft_s=0.1 / body["n"]))
    replies, *_ = sent(server, [b'{"n": %d}' % number for number in (1, 2, 3, 4)], [0.0] * 4)
    assert [reply.output_tokens for reply in replies] == [1, 2, 3, 4]


def test_requests_that_fail_are_told_apart_and_not_sent_again():
    answers = [even(2), Answer(status=429, content=b'{"error": {"message": "full"}}')]
    server = Scripted(lambda number, body: answers[body["n"] % 2])
    replies, begun_s, _ = sent(server, [b'{"n": %d}' % number for number in range(6)], [0.0] * 6)
    assert [reply.error for reply in replies] == [None, "HTTP 429: full"] * 3 and len(server.asked) == 6
    assert [result.error is None for result in results_of(replies, begun_s)] == [True, False] * 3


def broken() -> bytes:
    raise UserError("there is no such file")


def test_a_request_made_at_its_turn_may_fail():
    server = Scripted(lambda number, body: even(2))
    replies, *_ = sent(server, [functools.partial(bytes, b"{}"), broken], [0.0, 0.0])
    assert [reply.error for reply in replies] == [None, "there is no such file"] and len(server.asked) == 1


def test_tokens_of_a_piece():
    replies = [Reply(0, 1, (0.1, 0.2), output_tokens=6, has_usage=True), Reply(0, 1, error="HTTP 429: full")]
    assert num_tokens_per_piece(replies) == 3.0
    assert num_tokens_per_piece(replies[1:]) is None
