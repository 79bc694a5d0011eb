"""Replicas of one job at the same run: two threads over one store."""

import threading
import time

import pytest
import torch.distributed as dist

from executor.bench.replicas import Replicas
from executor.bench.results import RequestResult
from executor.errors import UserError
from executor.parallel.groups import Group, Parallel


def replica(number, size, store):
    return Replicas(Parallel(replicas=Group(number, size), store=store), lambda: time.sleep(0.001))


def test_each_answers_its_share_and_the_first_gets_all_in_order():
    store, got, begun = dist.HashStore(), {}, {}

    def work(number):
        this = replica(number, 3, store)
        got[number] = []
        for run in range(2):
            time.sleep(0.02 * number)
            this.begin()
            begun[number, run] = time.monotonic()
            share = this.share(range(7))
            results = [RequestResult(0.0, place + run / 10, (0.5,), place) for place in share]
            got[number].append([result.prompt_tokens for result in this.gather(results)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {0: [list(range(7))] * 2, 1: [[1, 4]] * 2, 2: [[2, 5]] * 2}
    assert max(begun[number, 0] for number in range(3)) < min(begun[number, 1] for number in range(3))


def test_other_requests_on_another_replica_are_refused():
    store = dist.HashStore()
    replica(0, 2, store).agree("a")
    replica(1, 2, store).agree("a")
    with pytest.raises(UserError, match="other requests than on rank 0's machine"):
        replica(1, 2, store).agree("b")


def test_one_replica_waits_for_nobody():
    alone = Replicas(Parallel(store=dist.HashStore()), lambda: pytest.fail("nobody is waited for"))
    alone.agree("a")
    alone.begin()
    results = [RequestResult(0.0, 1.0)]
    assert alone.gather(results) is results and list(alone.share([1, 2])) == [1, 2]
