"""Token embedding and output head, split over the vocabulary.

Legend: T tokens, V vocabulary, n hidden size.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from executor.checkpoint.load import EMBEDDING
from executor.checkpoint.pull import Catalog, Pull, empty
from executor.device import ops
from executor.layers.linear import Linear
from executor.parallel.groups import Group
from executor.parallel.partition import part
from executor.quant.scheme import Scheme


class Embedding(nn.Module):
    """`ids [T] -> [T, n]`; each rank holds a slice of the vocabulary and the parts are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, group: Group) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.rows = part(vocab_size, group, "vocabulary")
        self.group = group
        self.weight = empty(self.rows.stop - self.rows.start, hidden_size)

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        yield Pull(f"{prefix}.weight", self.shape, (self.rows, slice(None)), self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        compute_dtype = ops.bound().compute_dtype(self.weight.dtype)
        if self.group.size == 1:
            return F.embedding(ids, self.weight).to(compute_dtype)
        wanted = ids - self.rows.start
        local = wanted.clamp(0, len(self.weight) - 1)
        others = (wanted != local).unsqueeze(-1)  # ids that another rank holds
        return self.group.all_reduce(F.embedding(local, self.weight).masked_fill_(others, 0).to(compute_dtype))


class Head(nn.Module):
    """`[T, n] -> logits [T, V]` in fp32, gathered over the group.

    `tied`: the checkpoint has one tensor for both. The head shares the embedding's weight, or has its own, made of the
    same tensor, where it takes another scheme.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: Group, tied: Embedding | None) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.group = group
        self.prefix = ""  # its name in checkpoints, from the first `pulls` on
        self.tied = tied is not None
        self.own = None if self.tied else Linear(hidden_size, vocab_size, shard="out", group=group)
        self.weight = tied.weight if self.tied else None
        self._multiply: Callable[[Tensor], Tensor] | None = self.own

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        self.prefix = prefix
        if self.own is not None:
            yield from self.own.pulls(catalog, EMBEDDING if self.tied else prefix)
            self.own.prefix = prefix

    def take(self, scheme: Scheme) -> None:
        """Another scheme, before anything is loaded. The table of a tied head stays as it is: rows are looked up."""
        if self.own is not None:
            self.own.take(scheme, self.own.share.has_bias)
            return
        vocab_size, hidden_size = self.shape
        self.own = Linear(hidden_size, vocab_size, shard="out", group=self.group, scheme=scheme)
        self.own.prefix = self.prefix
        self.weight, self._multiply = None, self.own

    def prepare(self) -> None:
        if self.own is None:
            self._multiply = ops.bound().prepare_tied_head(self.weight.data)
            del self.weight
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_gather(self._multiply(x)).to(torch.float32)
