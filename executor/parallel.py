"""Groups of ranks and which part of a dimension a rank holds. At size 1 every function is the identity.

Knows nothing of models. Processes and rendezvous belong to torch.distributed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from executor.errors import UserError


@dataclass(frozen=True)
class Group:
    """The ranks that share one collective. `handle` is torch.distributed's process group, None at size 1."""

    rank: int = 0
    size: int = 1
    handle: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' `[..., n]` to `[..., n * size]` in rank order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.handle)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Parallel:
    """The groups of one rank: text tensor parallel, vision tensor parallel (size 1 under `vision_parallel: data`)."""

    text: Group = field(default_factory=Group)
    vision: Group = field(default_factory=Group)


SINGLE = Parallel()


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
