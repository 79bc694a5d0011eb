"""Which sets of ranks talk to each other, and with what buffers: for the groups that are made, and for the memory that
they take.

Knows numbers of ranks only; the groups themselves are made in executor/parallel/groups.py.
"""

from collections import defaultdict
from functools import cache

SUMS_MB = 200  # what is sent by prefill: tokens of a step by hidden size
ROWS_MB = 100  # gathered for experts: one replica's tokens


def communicators(world_size: int, attn_tp_size: int) -> dict[tuple[int, ...], int]:
    """Sets of ranks, each with the MB of its messages, in the order in which every rank makes them.

    The world, the replicas, and the ranks that have the same place in every replica. Equal sets are one; sets of one
    rank are named here and have no communicator.
    """
    uses = [(tuple(range(world_size)), SUMS_MB)]
    uses += [(tuple(range(first, first + attn_tp_size)), SUMS_MB) for first in range(0, world_size, attn_tp_size)]
    uses += [(tuple(range(first, world_size, attn_tp_size)), ROWS_MB) for first in range(attn_tp_size)]
    buffers_mb: dict[tuple[int, ...], int] = defaultdict(int)
    for ranks, buffer_mb in uses:
        buffers_mb[ranks] = max(buffers_mb[ranks], buffer_mb)
    return dict(buffers_mb)


@cache  # a planner asks for the same degrees thousands of times
def buffer_bytes(world_size: int, attn_tp_size: int, own_mb: int | None = None) -> int:
    """Of one rank's communicators: each has one buffer for what is sent and one for what comes (CANN: HCCL_BUFFSIZE).

    `own_mb`: the size that the user has set for all of them.
    """
    joined = [
        own_mb or buffer_mb
        for ranks, buffer_mb in communicators(world_size, attn_tp_size).items()
        if 0 in ranks and len(ranks) > 1
    ]
    return 2 * sum(joined) << 20
