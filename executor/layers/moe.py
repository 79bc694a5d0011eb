"""Mixture of experts: softmax router, top-k, renormalised, fused experts.

Legend: T tokens, n hidden size, E experts of this rank, I intermediate size of one expert on this rank, k experts per
token.
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, elsewhere, empty
from executor.device import ops
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.parallel.groups import Parallel
from executor.parallel.partition import part


class MoE(nn.Module):
    """`[T, n] -> [T, n]`; the experts are spread over the whole world and answer for the tokens of all replicas."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        parallel: Parallel,
    ) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, num_experts)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, parallel)
        self.top_k = top_k
        self.renormalize = renormalize
        self.world, self.replicas = parallel.world, parallel.replicas

    def forward(self, x: Tensor, padded_tokens: int | None = None) -> Tensor:
        """`padded_tokens`: what every replica brings to this step, its own T filled up; None: T is the same for all."""
        if self.replicas.size == 1:
            return self.world.all_reduce(self._route(x))
        num_tokens = len(x)
        padded_tokens = padded_tokens or num_tokens
        if num_tokens < padded_tokens:
            x = F.pad(x, (0, 0, 0, padded_tokens - num_tokens))
        y = self.world.all_reduce(self._route(self.replicas.stack(x).flatten(0, 1)))
        start = self.replicas.rank * padded_tokens
        return y[start : start + num_tokens]

    def _route(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        weights, ids = ops.bound().gate_topk(self.gate(x), self.top_k, self.renormalize)
        return self.experts(x, ids, weights)


class Experts(nn.Module):
    """The experts' weights, stacked: gate and up `[E, 2I, n]`, down `[E, n, I]`.

    A rank holds some of the experts, and of those a slice of the intermediate dim: either may be all.

    Checkpoints hold them stacked in this form, stacked with the last two dims swapped, or one tensor per expert;
    they are told apart by name and shape.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, parallel: Parallel) -> None:
        super().__init__()
        self.sizes = (num_experts, intermediate_size, hidden_size)
        self.mine = part(num_experts, parallel.expert_groups, "experts")
        self.columns = part(intermediate_size, parallel.expert_columns, "expert intermediate size")
        count, local = self.mine.stop - self.mine.start, self.columns.stop - self.columns.start
        self.gate_up = empty(count, 2 * local, hidden_size)
        self.down = empty(count, hidden_size, local)
        self._run: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        if f"{prefix}.gate_up_proj" in catalog:
            yield from self._stacked(catalog, prefix)
        else:
            yield from self._unstacked(prefix)

    def _stacked(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        num_experts, inner, hidden = self.sizes
        local = self.down.shape[2]
        every = slice(None)
        up_name, down_name = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        up_swapped = _swapped(catalog, up_name, (num_experts, 2 * inner, hidden))
        down_swapped = _swapped(catalog, down_name, (num_experts, hidden, inner))
        for half in (0, 1):
            rows = slice(half * inner + self.columns.start, half * inner + self.columns.stop)
            into = self.gate_up[:, half * local : (half + 1) * local]
            yield Pull(up_name, (num_experts, 2 * inner, hidden), (self.mine, rows, every), into, up_swapped)
        yield Pull(down_name, (num_experts, hidden, inner), (self.mine, every, self.columns), self.down, down_swapped)

    def _unstacked(self, prefix: str) -> Iterator[Pull]:
        num_experts, inner, hidden = self.sizes
        local = self.down.shape[2]
        every = slice(None)
        for expert in range(num_experts):
            up_names = [f"{prefix}.{expert}.{name}.weight" for name in ("gate_proj", "up_proj")]
            down_name = f"{prefix}.{expert}.down_proj.weight"
            if not self.mine.start <= expert < self.mine.stop:
                yield from (elsewhere(name, (inner, hidden)) for name in up_names)
                yield elsewhere(down_name, (hidden, inner))
                continue
            place = expert - self.mine.start
            for half, name in enumerate(up_names):
                into = self.gate_up[place, half * local : (half + 1) * local]
                yield Pull(name, (inner, hidden), (self.columns, every), into)
            yield Pull(down_name, (hidden, inner), (every, self.columns), self.down[place])

    def prepare(self) -> None:
        num_experts = self.sizes[0]
        self._run = ops.bound().prepare_experts(self.gate_up.data, self.down.data, self.mine.start, num_experts)
        del self.gate_up, self.down
        self.gate_up = self.down = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """This rank's part of `[T, n]`: the sum over the world is the answer."""
        return self._run(x, ids, weights)


def _swapped(catalog: Catalog, name: str, shape: tuple[int, int, int]) -> bool:
    """Whether the checkpoint stores `name` with its last two dims swapped. Raises UserError where neither form fits."""
    if name not in catalog:
        return False  # the loader reports it missing
    found = tuple(catalog[name].shape)
    if found == shape:
        return False
    if found == (shape[0], shape[2], shape[1]):
        return True
    raise UserError(
        f"tensor {name}: found shape {list(found)}, expected {list(shape)} or its last two dims swapped; "
        "config.json and the weights are not of the same model"
    )
