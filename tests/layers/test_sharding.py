"""Layers split over ranks, without processes: the ranks' parts, summed or joined by hand, are the whole layer."""

import pytest
import torch

from executor.checkpoint.pull import finalize, pull_all
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError
from executor.layers.attention import Attention
from executor.layers.linear import Linear
from executor.layers.mlp import GatedMLP, PlainMLP
from executor.layers.moe import Experts, MoE
from executor.layers.vision import VisionAttention
from executor.parallel.groups import SINGLE, Group, Parallel
from executor.parallel.partition import kv_heads_part, part


class Silent(Group):
    """A rank whose collective adds nothing: the caller sums the ranks."""

    def all_reduce(self, x):
        return x


@pytest.fixture(autouse=True)
def bound():
    ops.bind(CpuOps())


def fill(module, tensors):
    """What the loader does, from a dict; tensors are made on first sight."""
    for pull in pull_all(module, {}, "m"):
        if pull.name not in tensors:
            tensors[pull.name] = torch.randn(pull.shape)
        pull.into.copy_(tensors[pull.name][pull.file_index])
    finalize(module)
    return module


def summed(make, run, size):
    torch.manual_seed(0)
    tensors = {}
    with torch.no_grad():
        whole = run(fill(make(Group()), tensors))
        parts = [run(fill(make(Silent(rank, size)), tensors)) for rank in range(size)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_mlps(size):
    x = torch.randn(5, 24)
    summed(lambda g: GatedMLP(24, 32, g, bias=True), lambda m: m(x), size)
    summed(lambda g: PlainMLP(24, 32, 12, g, tanh=True), lambda m: m(x), size)


@pytest.mark.parametrize("groups, columns", [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2)])
def test_experts_dealt_whole_and_in_slices(groups, columns):
    x, ids, weights = torch.randn(6, 24), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)

    def make(group):
        if group.size == 1:
            return torch.nn.ModuleDict({"experts": Experts(24, 16, 4, SINGLE)})
        places = Group(group.rank // columns, groups), Group(group.rank % columns, columns)
        return torch.nn.ModuleDict(
            {"experts": Experts(24, 16, 4, Parallel(expert_groups=places[0], expert_columns=places[1]))}
        )

    summed(make, lambda m: m["experts"](x, ids, weights), groups * columns)


def test_experts_answer_for_the_padded_tokens_of_all_replicas():
    torch.manual_seed(0)
    tensors, mine, theirs = {}, torch.randn(3, 24), torch.randn(5, 24)
    joined = []

    class Peers(Group):
        """Rank 1 of two replicas: the other brings five tokens."""

        def stack(self, x):
            joined.append(x.shape)
            return torch.stack((theirs, x))

    def moe(parallel):
        return fill(torch.nn.ModuleDict({"mlp": MoE(24, 16, 4, 2, True, parallel)}), tensors)["mlp"]

    with torch.no_grad():
        alone = moe(SINGLE)(mine)
        together = moe(Parallel(replicas=Peers(1, 2)))(mine, padded_tokens=5)
    assert joined == [(5, 24)]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("size", [2, 4])
def test_vision_attention(size):
    x, cos, sin = torch.randn(10, 48), torch.randn(10, 12), torch.randn(10, 12)
    summed(lambda g: VisionAttention(48, 4, g), lambda m: m(x, cos, sin, [6, 4]), size)


@pytest.mark.parametrize("bias, eps", [(True, None), (False, 1e-6)])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_attention_with_replicated_kv_heads(size, bias, eps):
    x, cos, sin = torch.randn(9, 40), torch.randn(9, 16), torch.randn(9, 16)

    def run(layer):
        device = ops.bound()
        (cache,) = device.kv_cache(1, 1, 16, layer.num_kv_heads, 16, torch.float32)
        return layer(x, cos, sin, cache, torch.arange(9), device.prepare_attention([9], [9], [[0]], 16))

    summed(lambda g: Attention(40, 8, 2, 16, g, qkv_bias=bias, qk_norm_eps=eps), run, size)


def test_a_column_linear_joins_to_the_whole():
    torch.manual_seed(0)
    x, tensors = torch.randn(3, 8), {}

    def make(group):
        return torch.nn.ModuleDict({"l": Linear(8, 12, bias=True, shard="out", group=group)})

    with torch.no_grad():
        whole = fill(make(Group()), tensors)["l"](x)
        parts = [fill(make(Group(rank, 3)), tensors)["l"](x) for rank in range(3)]
    torch.testing.assert_close(torch.cat(parts, -1), whole)


def test_degrees_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"28 cannot be split over 8 ranks; degrees that work: \[1, 2, 4\]"):
        part(28, Group(0, 8), "query heads")
    with pytest.raises(UserError, match="neither split nor replicated over 16 ranks"):
        kv_heads_part(3, Group(0, 16))


def test_kv_heads_are_dealt_in_order():
    assert [kv_heads_part(2, Group(rank, 8)).start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [kv_heads_part(8, Group(rank, 2)) for rank in range(2)] == [slice(0, 4), slice(4, 8)]
