"""Groups of ranks and which part of a dimension a rank holds. At size 1 every function is the identity.

Knows nothing of models. Processes and rendezvous belong to torch.distributed.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from executor.device.ops import Ops
from executor.errors import UserError
from executor.host.env import rank_place
from executor.recipe.communicators import communicators
from executor.recipe.schema import Recipe

# The name since torch 2.13, which deprecates the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PATIENCE = timedelta(days=365)
"""Timeout of collectives whose other side may rightly take hours: it waits for a request, or reads another replica's
files. That a rank is gone is noticed by the launcher, not by this timeout."""


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

    `rank` is the place in the group. At a size above 1 a group without a handle says which part of the weights a rank
    holds, and cannot communicate.
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
        _all_gather(whole, x.contiguous(), group=self._joined())
        return whole.unflatten(0, (self.size, -1))

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Rank `source`'s `x` to all, in place."""
        if self.size > 1:
            self.traffic.add(x)
            dist.broadcast(x, group=self._joined(), group_src=source)
        return x

    def max(self, *numbers: int) -> tuple[int, ...]:
        """The largest that any rank gives, of each number. Only over a group of CPU tensors."""
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.int64)
        self.traffic.add(values)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._joined())
        return tuple(values.tolist())

    def min(self, *numbers: int) -> tuple[int, ...]:
        """The smallest that any rank gives, of each number."""
        return tuple(-number for number in self.max(*(-number for number in numbers)))

    def _joined(self) -> Any:
        # torch.distributed takes None for the whole world, which is never meant here.
        assert self.handle is not None, f"rank {self.rank} of {self.size} is a place without a communicator"
        return self.handle


@dataclass(frozen=True)
class Parallel:
    """The groups of one rank.

    `text`: tensor parallel, one replica of attention, MLP and vocabulary. `vision`: the same for the encoder, and
    `pictures`: the ranks that whole pictures are dealt to; one of them is of size 1 (`vision_parallel`). `world`: all
    ranks, where experts are summed. `replicas`: this rank's peers in the other replicas. `expert_groups`: which of the
    groups that experts are dealt to, `expert_columns`: which slice of each expert's intermediate size; places without
    communicators.
    Over CPU tensors, for plans and agreements: `control`: the ranks of this replica, `peers`: those of `replicas`,
    `job`: all ranks.
    `store`: torch.distributed's key-value store of the job.
    """

    text: Group = field(default_factory=Group)
    vision: Group = field(default_factory=Group)
    pictures: Group = field(default_factory=Group)
    world: Group = field(default_factory=Group)
    replicas: Group = field(default_factory=Group)
    expert_groups: Group = field(default_factory=Group)
    expert_columns: Group = field(default_factory=Group)
    control: Group = field(default_factory=Group)
    peers: Group = field(default_factory=Group)
    job: Group = field(default_factory=Group)
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def leads(self) -> bool:
        """Whether this is its replica's first rank, which schedules and samples for all of it."""
        return self.control.rank == 0

    def disconnect(self) -> None:
        """Leave the job's groups; every rank does, and may connect again."""
        if dist.is_initialized():
            dist.destroy_process_group()


SINGLE = Parallel()

_connections = itertools.count()


def connect(recipe: Recipe, device: Ops) -> Parallel:
    """Join the job that a launcher has made this process a rank of, and build its groups.

    Raises UserError where the job has another number of ranks than the recipe.
    """
    place, degrees = rank_place(), recipe.parallel
    if place.world_size != degrees.world_size:
        raise UserError(
            f"parallel_config.world_size: the recipe is for {degrees.world_size} ranks, and this process is one of "
            f"{place.world_size}; start {degrees.world_size} processes (bash infer.sh does), or set world_size"
        )
    if place.world_size == 1:
        return replace(SINGLE, store=dist.HashStore())
    store, rank, world_size = next(dist.rendezvous("env://", place.rank, place.world_size))
    store.set_timeout(PATIENCE)
    store = dist.PrefixStore(f"connection/{next(_connections)}", store)
    joined = dist.PrefixStore("groups", store)
    dist.init_process_group("gloo", store=joined, rank=rank, world_size=world_size)
    vision = degrees.vision_parallel

    def on_device(ranks: list[int], buffer_mb: int) -> Any:
        return dist.new_group(ranks, backend=device.collectives, pg_options=device.group_options(buffer_mb))

    def on_host(ranks: list[int], buffer_mb: int) -> Any:
        return dist.new_group(ranks, backend="gloo", timeout=PATIENCE)

    made = groups(world_size, recipe.attn_tp_size, degrees.moe_ep_size, vision, rank, on_device)
    host = groups(world_size, recipe.attn_tp_size, 1, vision, rank, on_host)
    store = dist.PrefixStore("job", store)
    return replace(made, control=host.text, peers=host.replicas, job=host.world, store=store)


def groups(
    world_size: int,
    attn_tp_size: int,
    moe_ep_size: int,
    vision_parallel: str,
    rank: int,
    new_group: Callable[[list[int], int], Any] = lambda ranks, buffer_mb: dist.new_group(ranks),
) -> Parallel:
    """The groups of `rank`, in an initialised process group of `world_size` ranks; every rank calls this alike.

    A replica is `attn_tp_size` neighbouring ranks; experts are dealt to `moe_ep_size` groups of neighbouring ranks.
    `new_group` makes the communicator of some ranks with buffers for messages of so many MB; equal sets share one.
    """
    replica, place = divmod(rank, attn_tp_size)
    made: dict[tuple[int, ...], Group] = {}
    # In one order everywhere: making a group takes the whole world.
    for ranks, buffer_mb in communicators(world_size, attn_tp_size).items():
        handle = new_group(list(ranks), buffer_mb) if len(ranks) > 1 else None
        if rank in ranks:
            made[ranks] = Group(ranks.index(rank), len(ranks), handle)
    text = made[tuple(range(replica * attn_tp_size, (replica + 1) * attn_tp_size))]
    ranks_per_expert = world_size // moe_ep_size
    return Parallel(
        text=text,
        vision=text if vision_parallel == "tp" else Group(),
        pictures=text if vision_parallel == "data" else Group(),
        world=made[tuple(range(world_size))],
        replicas=made[tuple(range(place, world_size, attn_tp_size))],
        expert_groups=Group(rank // ranks_per_expert, moe_ep_size),
        expert_columns=Group(rank % ranks_per_expert, ranks_per_expert),
    )
