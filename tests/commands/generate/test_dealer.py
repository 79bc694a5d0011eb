"""Rows over leaders that come and go: each is answered once, whatever happens."""

import random

from executor.commands.generate.dealer import MAX_LOSSES, Dealer


def test_rows_are_dealt_in_order_and_evenly() -> None:
    dealer = Dealer([5, 1, 3, 7, 9])
    dealer.join("a", 2)
    assert dealer.deal() == {"a": [1, 3]}
    dealer.join("b", 2)
    assert dealer.deal() == {"b": [5, 7]}
    assert dealer.deal() == {}
    assert dealer.answered("b", 7) and dealer.deal() == {"b": [9]}
    assert dealer.num_left == 4


def test_a_lost_leader_s_rows_are_dealt_again_before_others() -> None:
    dealer = Dealer(range(6))
    dealer.join("a", 2)
    dealer.join("b", 2)
    assert dealer.deal() == {"a": [0, 2], "b": [1, 3]}
    assert dealer.lose("a") == []
    assert dealer.answered("b", 1) and dealer.deal() == {"b": [0]}
    assert not dealer.answered("a", 2), "an answer that comes from the dead is another's to give"
    assert dealer.num_left == 5


def test_a_row_that_kills_whoever_answers_it_is_given_up() -> None:
    dealer, given_up = Dealer([4]), []
    for number in range(MAX_LOSSES):
        dealer.join(number, 3)
        assert dealer.deal() == {number: [4]}
        given_up += dealer.lose(number)
    assert given_up == [4] and dealer.num_left == 0
    dealer.join("last", 3)
    assert dealer.deal() == {}


def test_every_row_is_answered_once_whatever_happens() -> None:
    rng = random.Random(0)
    dealer, held, done, count = Dealer(range(200)), {}, [], 0
    while dealer.num_left:
        action = rng.random()
        if len(held) < 3:
            dealer.join(count, rng.randint(1, 5))
            held[count] = []
            count += 1
        elif action < 0.02:
            leader = rng.choice(list(held))
            done += dealer.lose(leader)
            del held[leader]
        else:
            leader = rng.choice(list(held))
            if held[leader]:
                row = held[leader].pop(rng.randrange(len(held[leader])))
                assert dealer.answered(leader, row)
                done.append(row)
        for leader, rows in dealer.deal().items():
            held[leader] += rows
    assert sorted(done) == list(range(200))
