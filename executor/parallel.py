"""Groups of ranks and which part of a dimension a rank holds. At size 1 every function is the identity.

Knows nothing of models. Processes and rendezvous belong to torch.distributed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from executor.errors import UserError


@dataclass
class Traffic:
    """What a group has sent so far: collectives and bytes of this rank's own tensors. Graphs are not counted."""

    collectives: int = 0
    bytes: int = 0

    def add(self, x: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():
            self.collectives += 1
            self.bytes += x.numel() * x.element_size()


@dataclass(frozen=True)
class Group:
    """The ranks that share one collective. `handle` is torch.distributed's process group, None at size 1.

    `rank` is the place in the group. A place without a handle (size above 1) tells which part a rank holds, no more.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        if self.size > 1:
            self.traffic.add(x)
            dist.all_reduce(x, group=self._joined())
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' `[T, n]` to `[T, n * size]` in rank order."""
        if self.size == 1:
            return x
        return self.stack(x).transpose(0, 1).flatten(1)

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' `x [...]` as `[size, ...]` in rank order."""
        if self.size == 1:
            return x.unsqueeze(0)
        self.traffic.add(x)
        whole = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=self._joined())
        return whole.unflatten(0, (self.size, -1))

    def _joined(self) -> Any:
        # torch.distributed takes None for the whole world, which is never meant here.
        assert self.handle is not None, f"rank {self.rank} of {self.size} is a place without a communicator"
        return self.handle


@dataclass(frozen=True)
class Parallel:
    """The groups of one rank.

    `text`: tensor parallel, one replica of attention, MLP and vocabulary. `vision`: the same for the encoder, size 1
    under `vision_parallel: data`. `world`: all ranks, where experts are summed. `replicas`: this rank's peers in the
    other replicas. `expert_groups`: which of the groups that experts are dealt to, `expert_columns`: which slice of
    each expert's intermediate size; places without communicators.
    """

    text: Group = field(default_factory=Group)
    vision: Group = field(default_factory=Group)
    world: Group = field(default_factory=Group)
    replicas: Group = field(default_factory=Group)
    expert_groups: Group = field(default_factory=Group)
    expert_columns: Group = field(default_factory=Group)


SINGLE = Parallel()


def groups(world_size: int, attn_tp_size: int, moe_ep_size: int, vision_parallel: str, rank: int) -> Parallel:
    """The groups of `rank`, in an initialised process group of `world_size` ranks; every rank calls this alike.

    A replica is `attn_tp_size` neighbouring ranks; experts are dealt to `moe_ep_size` groups of neighbouring ranks.
    Equal sets of ranks share one communicator.
    """
    replica, place = divmod(rank, attn_tp_size)
    sets = [tuple(range(world_size))]
    sets += [tuple(range(first, first + attn_tp_size)) for first in range(0, world_size, attn_tp_size)]
    sets += [tuple(range(first, world_size, attn_tp_size)) for first in range(attn_tp_size)]
    handles: dict[tuple[int, ...], Any] = {}
    for ranks in sets:  # in the same order everywhere: making a group is a collective of the whole world
        if len(ranks) > 1 and ranks not in handles:
            handles[ranks] = dist.new_group(list(ranks))
    made: dict[tuple[int, ...], Group] = {}

    def group(*ranks: int) -> Group:
        if ranks not in made:
            made[ranks] = Group(ranks.index(rank), len(ranks), handles.get(ranks))
        return made[ranks]

    text = group(*range(replica * attn_tp_size, (replica + 1) * attn_tp_size))
    ranks_per_expert = world_size // moe_ep_size
    return Parallel(
        text=text,
        vision=text if vision_parallel == "tp" else Group(),
        world=group(*range(world_size)),
        replicas=group(*range(place, world_size, attn_tp_size)),
        expert_groups=Group(rank // ranks_per_expert, moe_ep_size),
        expert_columns=Group(rank % ranks_per_expert, ranks_per_expert),
    )


def share(size: int, group: Group, what: str) -> int:
    """How many of `size` equal things one rank of the group holds.

    Raises UserError where the group's size does not divide, naming the degrees that do.
    """
    if size % group.size:
        degrees = [d for d in (1, 2, 4, 8, 16) if size % d == 0]
        raise UserError(f"{what}: {size} cannot be split over {group.size} ranks; degrees that work: {degrees}")
    return size // group.size


def part(size: int, group: Group, what: str) -> slice:
    """The rank's slice of a dimension of `size` equal things."""
    mine = share(size, group, what)
    return slice(group.rank * mine, (group.rank + 1) * mine)


def kv_heads_part(num_kv_heads: int, group: Group) -> slice:
    """The rank's KV heads; replicated over `group.size / num_kv_heads` ranks where there are fewer heads than ranks."""
    if num_kv_heads >= group.size:
        return part(num_kv_heads, group, "key/value heads")
    if group.size % num_kv_heads:
        degrees = [d for d in (1, 2, 4, 8, 16) if num_kv_heads % d == 0 or d % num_kv_heads == 0]
        raise UserError(
            f"{num_kv_heads} key/value heads can be neither split nor replicated over {group.size} ranks; "
            f"degrees that work: {degrees}"
        )
    head = group.rank * num_kv_heads // group.size
    return slice(head, head + 1)
