"""Mixture of experts: softmax router, top-k, renormalised, fused experts.

Legend: T tokens, n hidden size, E experts of this rank, I intermediate size of one expert on this rank, k experts per
token.
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull
from executor.device import ops
from executor.layers.linear import Linear, drop, keep, kept
from executor.parallel.groups import Parallel
from executor.parallel.partition import part
from executor.quant.float import FLOAT
from executor.quant.scheme import ExpertShare, Scheme


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
    """A rank's part of all experts: some of them, and of those a slice of the intermediate dim. Either may be all."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        parallel: Parallel,
        *,
        scheme: Scheme = FLOAT,
    ) -> None:
        super().__init__()
        experts = part(num_experts, parallel.expert_groups, "experts")
        columns = part(intermediate_size, parallel.expert_columns, "expert intermediate size")
        self.share = ExpertShare(num_experts, intermediate_size, hidden_size, experts, columns)
        self.prefix = ""  # its name in checkpoints, from the first `pulls` on
        self.scheme = scheme
        self._names = keep(self, scheme.expert_tensors(self.share))
        self._run: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def take(self, scheme: Scheme) -> None:
        """Another scheme, before anything is loaded. Raises UserError where the device has no such experts."""
        ops.bound().check_experts(scheme.form, self.share.hidden_size, self.share.num_columns)
        drop(self, self._names)
        self.scheme = scheme
        self._names = keep(self, scheme.expert_tensors(self.share))

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        self.prefix = prefix
        return self.scheme.pull_experts(self.share, kept(self, self._names), catalog, prefix)

    def prepare(self) -> None:
        self._run = self.scheme.prepare_experts(ops.bound(), self.share, kept(self, self._names))
        drop(self, self._names)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """This rank's part of `[T, n]`: the sum over the world is the answer."""
        return self._run(x, ids, weights)
