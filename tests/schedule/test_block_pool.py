"""The pool hands out every block once, in runs where it can, and forgets the oldest prefixes first."""

import random

import pytest

from executor.schedule.block_pool import BlockPool


def fill(pool: BlockPool, name: str, count: int) -> list[int]:
    """Allocate blocks and give them known contents."""
    block_ids = pool.allocate(count)
    for index, block_id in enumerate(block_ids):
        pool.register(block_id, f"{name}{index}".encode())
    return block_ids


def digests(name: str, count: int) -> list[bytes]:
    return [f"{name}{index}".encode() for index in range(count)]


def test_blocks_are_low_and_contiguous():
    pool = BlockPool(10, 4)
    first, second, third = pool.allocate(2), pool.allocate(3), pool.allocate(1)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5])
    pool.release(second)
    assert pool.allocate(4) == [6, 7, 8, 9]  # not torn over the hole of three
    assert pool.allocate(2) == [2, 3]
    pool.check([first, third, [6, 7, 8, 9], [2, 3]])


def test_a_torn_pool_still_gives_all_its_blocks():
    pool = BlockPool(8, 4)
    block_ids = pool.allocate(8)
    pool.release(block_ids[1::2])
    assert pool.allocate(3) == [1, 3, 5]
    assert pool.num_free == 1


def test_growth_follows_the_last_block():
    pool = BlockPool(10, 4)
    first, second = pool.allocate(2), pool.allocate(2)
    assert pool.allocate(1, after=second[-1]) == [4]
    assert pool.allocate(1, after=first[-1]) == [5]  # block 2 is taken
    assert pool.allocate(2, after=7) == [8, 9]
    assert pool.allocate(1, after=9) == [6]


def test_claimed_room_is_left_free_while_there_is_other():
    pool = BlockPool(10, 4)
    first = pool.allocate(2, room=2)
    claimed = pool.claim(first[-1] + 1, 2)
    assert (first, claimed) == ([0, 1], range(2, 4))
    second = pool.allocate(2, room=2)
    assert second == [4, 5]
    assert pool.allocate(1, after=first[-1]) == [2]
    assert pool.allocate(3) == [6, 7, 8]
    assert pool.allocate(1) == [9]
    assert pool.num_free == 1 and pool.allocate(1) == [3], "a claim keeps nobody from the last block"
    pool.unclaim(claimed)
    pool.check([range(10)])
    pool.release(range(10))
    pool.check([])


def test_claims_end_and_cover_clean_blocks_only():
    pool = BlockPool(6, 4)
    taken = pool.allocate(3)
    pool.release(taken[:1])
    assert pool.claim(0, 3) == range(0, 1)
    assert pool.claim(4, 10) == range(4, 6)
    assert pool.allocate(1) == [3]
    pool.unclaim(range(0, 1))
    assert pool.allocate(1) == [0]


def test_room_shrinks_to_what_there_is():
    pool = BlockPool(8, 4)
    assert pool.allocate(5, room=100) == [0, 1, 2, 3, 4]
    assert pool.allocate(3, room=100) == [5, 6, 7]


def test_released_blocks_are_found_until_they_are_evicted():
    pool = BlockPool(6, 4)
    block_ids = fill(pool, "a", 4)
    pool.release(block_ids)
    assert pool.num_free == 6 and pool.num_cached == 4
    assert pool.lookup(digests("a", 5)) == block_ids
    assert pool.lookup([b"other", *digests("a", 4)]) == []
    assert pool.allocate(2) == [4, 5]  # the clean ones first
    assert pool.allocate(1) == [3]  # then the end of the prefix
    assert pool.lookup(digests("a", 4)) == block_ids[:3]
    pool.check([[3, 4, 5]])


def test_eviction_is_least_recently_used_first():
    pool = BlockPool(6, 4)
    for name in "abc":
        pool.release(fill(pool, name, 2))
    used_again = pool.lookup(digests("a", 2))
    pool.acquire(used_again)
    pool.release(used_again)
    taken = pool.allocate(2)
    assert [len(pool.lookup(digests(name, 2))) for name in "abc"] == [2, 0, 2]
    pool.check([taken])


def test_holders_are_counted():
    pool = BlockPool(4, 4)
    block_ids = fill(pool, "a", 2)
    assert pool.num_unreferenced(block_ids) == 0
    pool.acquire(block_ids)
    pool.release(block_ids)
    assert pool.num_free == 2 and [pool.num_holders(block_id) for block_id in block_ids] == [1, 1]
    pool.release(block_ids)
    assert pool.num_free == 4 and pool.num_unreferenced(block_ids) == 2
    with pytest.raises(AssertionError, match="without a holder"):
        pool.release(block_ids)
    with pytest.raises(AssertionError, match="5 blocks asked of 4"):
        pool.allocate(5)
    with pytest.raises(AssertionError, match="nothing to share"):
        pool.acquire([3])


def test_the_first_block_of_equal_content_stays_the_known_one():
    pool = BlockPool(4, 4)
    first, second = fill(pool, "a", 1), fill(pool, "a", 1)
    assert pool.lookup(digests("a", 1)) == first
    pool.release(second)
    assert pool.num_cached == 0
    pool.check([first])


def test_without_caching_nothing_is_kept():
    pool = BlockPool(4, 4, enable_prefix_caching=False)
    pool.release(fill(pool, "a", 2))
    assert pool.num_cached == 0 and pool.lookup(digests("a", 2)) == []
    pool.check([])


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_random_steps(seed):
    rng = random.Random(seed)
    pool = BlockPool(23, 4)
    holders: list[list[int]] = []
    claims: list[range] = []
    for step in range(1000):
        action = rng.random()
        if action < 0.4 and pool.num_free:
            count = rng.randint(1, pool.num_free)
            after = rng.choice(holders)[-1] if holders and rng.random() < 0.5 else None
            block_ids = pool.allocate(count, after=after, room=rng.randint(0, 8))
            assert len(set(block_ids)) == count
            if rng.random() < 0.5:
                claims.append(pool.claim(block_ids[-1] + 1, rng.randint(0, 6)))
            for block_id in block_ids[: rng.randint(0, count)]:
                pool.register(block_id, f"{rng.randint(0, 40)}".encode())
            holders.append(block_ids)
        elif action < 0.55:
            found = pool.lookup([f"{rng.randint(0, 40)}".encode() for _ in range(2)])
            found = list(dict.fromkeys(found))
            if found:
                pool.acquire(found)
                holders.append(found)
        elif holders:
            pool.release(holders.pop(rng.randrange(len(holders))))
            if claims:
                pool.unclaim(claims.pop())
        pool.check(holders)
        assert pool.num_free == 23 - len({block_id for block_ids in holders for block_id in block_ids}), step
    for block_ids in holders:
        pool.release(block_ids)
    assert pool.num_free == 23
