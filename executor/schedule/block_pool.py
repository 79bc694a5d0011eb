"""The pool of KV blocks: who holds which, which hold a known prefix, which to hand out next.

A block is clean (nobody holds it, nothing worth keeping), cached (nobody holds it, its content is known by digest) or
used (one or more requests hold it). Clean blocks may be claimed: free for all, but handed out last, because a running
request is expected to grow into them. Clean blocks are handed out lowest first and in one run where there is one, so
that a backend can read a request's keys and values as a view instead of gathering them.

Invariants (`check`): every block is in exactly one state; a digest names one block and a block has at most one digest.
Knows nothing of requests or tokens, nor what is stored.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

_CLEAN, _CLAIMED, _CACHED, _USED = range(4)
_CLAIMED_AS_CLEAN = bytes.maketrans(bytes([_CLAIMED]), bytes([_CLEAN]))
_AVAILABLE = bytes([_CLEAN, _CLAIMED])


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, counted by reference."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0, f"a pool of {num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # One byte a block: a run of n clean blocks is found by searching n zero bytes, at memory speed.
        self._states = bytearray(num_blocks)
        self._num_holders = [0] * num_blocks
        self._num_clean = num_blocks  # claimed ones included
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, least recently used first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: clean, claimed and cached."""
        return self._num_clean + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds whose content is kept for a later request."""
        return len(self._cached)

    def num_holders(self, block_id: int) -> int:
        return self._num_holders[block_id]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """`count` blocks with one holder each; the caller has seen that `num_free` allows it.

        They follow block `after` when those are clean, else form the lowest run that fits, one with up to `room` clean
        blocks behind it if there is one, else they are the lowest ones. Cached blocks are evicted only for lack of
        clean ones, least recently used first.
        """
        assert 0 < count <= self.num_free, f"{count} blocks asked of {self.num_free} free"
        while self._num_clean < count:
            self._evict()
        if after is not None and self._is_available(after + 1, count):
            block_ids = list(range(after + 1, after + 1 + count))
        else:
            start = self._find_run(count, room)
            block_ids = self._lowest(count) if start < 0 else list(range(start, start + count))
        for block_id in block_ids:
            self._states[block_id] = _USED
            self._num_holders[block_id] = 1
        self._num_clean -= count
        return block_ids

    def claim(self, start: int, count: int) -> range:
        """Have clean blocks from `start` on handed out last; returns those claimed, maybe none, for `unclaim`."""
        free = self._states[start : start + count]
        claimed = len(free) - len(free.lstrip(bytes([_CLEAN])))
        self._states[start : start + claimed] = bytes([_CLAIMED]) * claimed
        return range(start, start + claimed)

    def unclaim(self, claimed: range) -> None:
        """End a claim. Blocks used meanwhile are left alone."""
        for block_id in claimed:
            if self._states[block_id] == _CLAIMED:
                self._states[block_id] = _CLEAN

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more holder for each of these cached or used blocks."""
        for block_id in block_ids:
            if self._states[block_id] == _CACHED:
                del self._cached[block_id]
                self._states[block_id] = _USED
            assert self._states[block_id] == _USED, f"block {block_id} holds nothing to share"
            self._num_holders[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder fewer for each. The last of them are evicted first: a prefix is worth more than its end."""
        for block_id in reversed(block_ids):
            assert self._num_holders[block_id] > 0, f"block {block_id} is released without a holder"
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id]:
                continue
            if block_id in self._digest_of:
                self._states[block_id] = _CACHED
                self._cached[block_id] = None
            else:
                self._states[block_id] = _CLEAN
                self._num_clean += 1

    def register(self, block_id: int, digest: bytes) -> None:
        """Make a used, filled block findable. When another block has the same content, that one stays the known one."""
        assert self._states[block_id] == _USED, f"block {block_id} is registered while nobody holds it"
        if not self.enable_prefix_caching or digest in self._block_of:
            return
        assert block_id not in self._digest_of, f"block {block_id} has a digest already"
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `digests`, in order. They are not acquired."""
        block_ids = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def knows(self, digest: bytes) -> bool:
        """Whether some block holds this; from any thread, true for the moment."""
        return digest in self._block_of

    def num_unreferenced(self, block_ids: Iterable[int]) -> int:
        """How many of these would leave `num_free` when acquired."""
        return sum(1 for block_id in block_ids if not self._num_holders[block_id])

    def forget_cached(self) -> None:
        """Keep no content that nobody holds."""
        while self._cached:
            self._evict()

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert all invariants, given the block ids of every holder. O(num_blocks)."""
        count = Counter(block_id for block_ids in held for block_id in block_ids)
        for block_id, state in enumerate(self._states):
            holders = self._num_holders[block_id]
            assert holders == count[block_id], f"block {block_id}: {holders} holders counted, {count[block_id]} exist"
            assert (state == _USED) == (holders > 0), f"block {block_id}: state {state} with {holders} holders"
            assert (state == _CACHED) == (block_id in self._cached), f"block {block_id}: state {state} and its LRU"
            if state != _USED:
                assert (state == _CACHED) == (block_id in self._digest_of), f"block {block_id}: lost or stale digest"
        available = sum(state in _AVAILABLE for state in self._states)
        assert available == self._num_clean, f"{self._num_clean} clean blocks counted, {available} exist"
        assert {block_id: digest for digest, block_id in self._block_of.items()} == self._digest_of
        assert len(self._block_of) == len(self._digest_of)

    def _is_available(self, start: int, count: int) -> bool:
        if count == 1:
            return start < self.num_blocks and self._states[start] in _AVAILABLE
        run = self._states[start : start + count]
        return len(run) == count and not run.strip(_AVAILABLE)

    def _find_run(self, count: int, room: int) -> int:
        """Start of the lowest run of `count` clean blocks with much of `room` behind, then of claimed ones; or -1."""
        while True:
            start = self._states.find(bytes(count + room))
            if start >= 0:
                return start
            if not room:
                return self._states.translate(_CLAIMED_AS_CLEAN).find(bytes(count))
            room //= 2

    def _lowest(self, count: int) -> list[int]:
        """Clean blocks in no run: the lowest, claimed ones only when the others do not suffice."""
        block_ids: list[int] = []
        for state in _AVAILABLE:
            position = self._states.find(state)
            while position >= 0 and len(block_ids) < count:
                block_ids.append(position)
                position = self._states.find(state, position + 1)
        return sorted(block_ids)

    def _evict(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block_id)]
        self._states[block_id] = _CLEAN
        self._num_clean += 1
