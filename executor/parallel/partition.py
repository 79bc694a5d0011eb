"""Which part of a dimension a rank of a group holds. At size 1 the whole of it."""

from dataclasses import dataclass

from executor.errors import UserError
from executor.parallel.groups import Group


@dataclass(frozen=True)
class Part:
    """`rows` of tensor `name` (beside the fused layer; None: the layer's own name), `num_rows` of the whole tensor."""

    name: str | None
    num_rows: int
    rows: slice

    @property
    def num_local(self) -> int:
        return self.rows.stop - self.rows.start


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
    length = share(size, group, what)
    return slice(group.rank * length, (group.rank + 1) * length)


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
