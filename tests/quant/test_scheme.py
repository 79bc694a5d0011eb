"""The seam of quantization: a layer takes a scheme, and a scheme of another kind needs no change of the layer."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from executor.checkpoint.pull import Pull, finalize
from executor.checkpoint.weights import Checkpoint, load_weights
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.layers.moe import Experts
from executor.parallel.groups import SINGLE, Group
from executor.parallel.partition import Part, part
from executor.quant.float import FLOAT
from executor.quant.scheme import LinearShare
from executor.quant.sizes import weight_bytes
from executor.quant.w8a8 import W8A8


@pytest.fixture(autouse=True)
def bound():
    ops.bind(CpuOps())


class Scaled:
    """int8 weights with a scale per output row, as W8A16 has them; fused parts keep their own scales."""

    name = "scaled"

    def linear_tensors(self, share: LinearShare):
        weight = nn.Parameter(torch.empty(share.num_rows, share.num_columns, dtype=torch.int8), requires_grad=False)
        scale = nn.Parameter(torch.empty(share.num_rows, 1), requires_grad=False)
        return {"weight": weight, "weight_scale": scale, "bias": None}

    def pull_linear(self, share, tensors, catalog, prefix):
        for name, each, rows in share.named(prefix):
            shape = (each.num_rows, share.num_in)
            yield Pull(f"{name}.weight", shape, (each.rows, share.columns), tensors["weight"][rows])
            yield Pull(f"{name}.weight_scale", (each.num_rows, 1), (each.rows,), tensors["weight_scale"][rows])

    def prepare_linear(self, device, share, tensors, many_rows):
        return device.prepare_linear(tensors["weight"].float() * tensors["weight_scale"], None, many_rows)


def load(layer, checkpoint, prefix):
    for pull in layer.pulls({}, prefix):
        pull.into.copy_(checkpoint[pull.name][pull.file_index])
    finalize(layer)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_linear_of_another_scheme_is_fused_and_split_like_any(rank):
    torch.manual_seed(0)
    group = Group(rank, 2)
    parts = tuple(Part(name, rows, part(rows, group, name)) for name, rows in (("q_proj", 6), ("k_proj", 4)))
    layer = Linear(8, 10, shard="out", group=group, parts=parts, scheme=Scaled())
    checkpoint, wanted = {}, []
    for each in parts:
        weight, scale = torch.randint(-9, 9, (each.num_rows, 8), dtype=torch.int8), torch.rand(each.num_rows, 1)
        checkpoint |= {f"attn.{each.name}.weight": weight, f"attn.{each.name}.weight_scale": scale}
        wanted.append((weight * scale)[each.rows])
    load(layer, checkpoint, "attn.qkv_proj")
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), x @ torch.cat(wanted).t(), atol=1e-5, rtol=1e-5)
    assert list(layer.parameters()) == [], "the plain tensors are dropped"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float_tensors_have_the_bytes_that_the_estimate_counts(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        linear, experts = Linear(8, 6), Experts(8, 4, 3, SINGLE)
    finally:
        torch.set_default_dtype(before)
    for layer, count in ((linear, 6 * 8), (experts, 3 * (2 * 4 * 8 + 8 * 4))):
        held = sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())
        assert held == count * weight_bytes("none", dtype)


def test_the_bias_of_summed_parts_is_added_once():
    whole, halves = (Part(None, 6, slice(0, 6)),), (slice(0, 4), slice(4, 8))
    shares = [LinearShare(8, half, whole, "in", Group(rank, 2), has_bias=True) for rank, half in enumerate(halves)]
    assert [share.adds_bias for share in shares] == [True, False] and all(share.is_summed for share in shares)
    assert [FLOAT.linear_tensors(share)["bias"] is not None for share in shares] == [True, False]
    named = [[pull.name for pull in FLOAT.pull_linear(s, FLOAT.linear_tensors(s), {}, "a.o")] for s in shares]
    assert named == [["a.o.weight", "a.o.bias"]] * 2, "the checkpoint is held to have it on every rank"


def test_experts_take_a_scheme():
    asked = []

    class Asked(type(FLOAT)):
        def prepare_experts(self, device, share, tensors):
            asked.append((share.num_local, share.num_columns, sorted(tensors)))
            return super().prepare_experts(device, share, tensors)

    layer = Experts(8, 4, 3, SINGLE, scheme=Asked())
    names = SimpleNamespace(shape=(3, 8, 8))  # 2I = n: told apart by nothing, so taken as it stands
    assert len(list(layer.pulls({"m.gate_up_proj": names, "m.down_proj": SimpleNamespace(shape=(3, 8, 4))}, "m"))) == 3
    layer.prepare()
    assert asked == [(3, 4, ["down", "gate_up"])]


def test_what_another_rank_adds_is_held_to_be_there(tmp_path):
    """quant_bias is int32 and added once: the ranks that leave it to another still want it in the checkpoint."""
    tensors = {
        "a.o.weight": torch.ones(6, 8, dtype=torch.int8),
        "a.o.deq_scale": torch.ones(6),
        "a.o.quant_bias": torch.ones(6, dtype=torch.int32),
        "a.o.input_scale": torch.ones(1),
        "a.o.input_offset": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for rank, wanted in enumerate((5, 4)):
        layer = Linear(8, 6, shard="in", group=Group(rank, 2), scheme=W8A8("w8a8"))
        pulls = list(layer.pulls(checkpoint.catalog, "a.o"))
        assert load_weights(pulls, checkpoint).unread == ()
        held = {name: tensor.data for name, tensor in layer.tensors.items() if tensor is not None}
        held.setdefault("quant_bias", torch.zeros(6, dtype=torch.int32))
        got = CpuOps().prepare_linear(layer.scheme.weight(layer.share, held), None)(torch.ones(1, 4))
        assert got.tolist() == [[float(wanted)] * 6]
    del tensors["a.o.quant_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="quant_bias"):
        load_weights(pulls, Checkpoint(tmp_path))
