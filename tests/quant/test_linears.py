"""Every scheme's linear, as a checkpoint has it and split over ranks, against its formula in float64."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from executor.checkpoint.description import Description
from executor.checkpoint.pull import finalize
from executor.checkpoint.weights import check_complete
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.parallel.groups import Group
from executor.parallel.partition import Part, part
from executor.quant.choose import MADE, SCHEMES, choose_schemes
from executor.quant.scheme import Scheme
from executor.quant.w8a16 import W8A16

PARTS, NUM_IN = {"q_proj": 16, "k_proj": 8, "v_proj": 8}, 64
KINDS = ("W8A8", "W8A8S", "W8A8_DYNAMIC", "W8A8_MIX", "W8A16", "W8A16 groups", "wint8")


@pytest.fixture(autouse=True)
def bound():
    ops.bind(CpuOps())


class Silent(Group):
    """One of several ranks, whose sums the test takes itself."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


def scheme_of(kind: str) -> Scheme:
    if kind == "W8A16 groups":
        return W8A16(8)
    return MADE[kind] if kind in MADE else SCHEMES[kind]


@dataclass
class Stored:
    """One linear's tensors as a checkpoint has them, and what it computes."""

    kind: str
    tensors: dict[str, Tensor]

    def product(self, x: Tensor, many_rows: bool = False) -> Tensor:
        kind, t = self.kind, {name: x.double() for name, x in self.tensors.items()}
        bias = t.get("bias", 0)
        if kind == "W8A8_MIX":
            kind = "W8A8_DYNAMIC" if many_rows else "W8A8"
        if kind == "wint8":
            scale = t["weight"].abs().amax(1, keepdim=True) / 127
            return x.double() @ ((t["weight"] / scale).round() * scale).t() + bias
        if kind.startswith("W8A16"):
            groups = t["weight_scale"].shape[1]
            values = t["weight"].unflatten(1, (groups, -1)) - t["weight_offset"].unsqueeze(-1)
            return x.double() @ (values * t["weight_scale"].unsqueeze(-1)).flatten(1).t() + bias
        if kind == "W8A8_DYNAMIC":
            step = (x.abs().amax(1, keepdim=True) / 127).double()
            return (x / step.float()).round().double() @ t["weight"].t() * step * t["weight_scale"].flatten() + bias
        rounded = (x / t["input_scale"].float() + t["input_offset"].float()).round().clamp(-128, 127).double()
        return (rounded @ t["weight"].t() + t["quant_bias"]) * t["deq_scale"]


def make(kind: str, num_out: int, with_bias: bool) -> Stored:
    bias = {"bias": torch.randn(num_out)} if with_bias else {}
    if kind == "wint8":
        return Stored(kind, {"weight": torch.randn(num_out, NUM_IN)} | bias)
    tensors = {"weight": torch.randint(-128, 128, (num_out, NUM_IN), dtype=torch.int8)}
    groups = 8 if kind == "W8A16 groups" else 1
    if kind.startswith(("W8A8_DYNAMIC", "W8A8_MIX", "W8A16")):
        tensors["weight_scale"] = torch.rand(num_out, groups) * 0.01 + 0.001
        tensors["weight_offset"] = torch.zeros(num_out, groups)
    if kind == "W8A16 groups":
        tensors["weight_offset"] = torch.randint(-9, 9, (num_out, groups)).float()
    if kind in ("W8A8", "W8A8S", "W8A8_MIX"):
        tensors |= {"input_scale": torch.tensor([0.02]), "input_offset": torch.tensor([7.0])}
        tensors["deq_scale"] = torch.rand(num_out) * 1e-4
        tensors["quant_bias"] = torch.randint(-(2**20), 2**20, (num_out,), dtype=torch.int32)
    return Stored(kind, tensors | bias)


def checkpoint_of(linears: dict[str, Stored]) -> dict[str, Tensor]:
    return {f"m.{name}.{suffix}": x for name, stored in linears.items() for suffix, x in stored.tensors.items()}


def load(layer: Linear, checkpoint: dict[str, Tensor], prefix: str) -> Linear:
    catalog = {name: SimpleNamespace(shape=tuple(x.shape)) for name, x in checkpoint.items()}
    pulls = list(layer.pulls(catalog, prefix))
    check_complete(layer, pulls)
    for pull in pulls:
        assert tuple(checkpoint[pull.name].shape) == pull.file_shape, pull.name
        x = checkpoint[pull.name][pull.file_index]
        if pull.into.numel():
            pull.into.copy_(x if pull.convert is None else pull.convert(x))
    finalize(layer)
    return layer


def close(found: Tensor, wanted: Tensor) -> None:
    """A CPU may round float activations to 15 bits and more where it multiplies them by int8 weights."""
    torch.testing.assert_close(found.double(), wanted, atol=6e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_outputs_over_ranks(kind, with_bias, size):
    torch.manual_seed(0)
    stored = {name: make(kind, rows, with_bias) for name, rows in PARTS.items()}
    x = torch.randn(5, NUM_IN)
    found = []
    for rank in range(size):
        group = Silent(rank, size)
        parts = tuple(Part(name, rows, part(rows, group, name)) for name, rows in PARTS.items())
        layer = Linear(NUM_IN, sum(PARTS.values()), shard="out", group=group, parts=parts)
        layer.take(scheme_of(kind), with_bias)
        found.append(
            load(layer, checkpoint_of(stored), "m.qkv_proj")(x).split([rows // size for rows in PARTS.values()], 1)
        )
    for number, name in enumerate(PARTS):
        close(torch.cat([each[number] for each in found], 1), stored[name].product(x))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_summed_inputs_over_ranks(kind, with_bias, size):
    """Biases and zero points are added once. Dynamic rows are rounded by what each rank has of them."""
    torch.manual_seed(1)
    stored, x = make(kind, 24, with_bias), torch.randn(5, NUM_IN)
    # Every rank's part of a row has the row's largest number, so that all round alike.
    x[:, :: NUM_IN // 4] = x.abs().amax(1, keepdim=True)
    total = torch.zeros(5, 24)
    for rank in range(size):
        layer = Linear(NUM_IN, 24, shard="in", group=Silent(rank, size))
        layer.take(scheme_of(kind), with_bias)
        load(layer, checkpoint_of({"o_proj": stored}), "m.o_proj")
        total += layer(x[:, layer.share.columns])
    close(total, stored.product(x))


@pytest.mark.parametrize("num_rows", [5, 64])
def test_a_mix_is_static_in_steps_of_few_rows_and_its_bias_is_the_dynamic_forms(num_rows):
    torch.manual_seed(2)
    stored, x = make("W8A8_MIX", 24, with_bias=True), torch.randn(num_rows, NUM_IN)
    layer = Linear(NUM_IN, 24)
    layer.take(SCHEMES["W8A8_MIX"], True)
    close(load(layer, checkpoint_of({"fc1": stored}), "m.fc1")(x), stored.product(x, num_rows > 16))
    assert float((stored.product(x, True) - stored.product(x, False)).abs().max()) > 1


@pytest.mark.parametrize("kind", ["FLOAT", "W8A8_DYNAMIC", "W8A16"])
@pytest.mark.parametrize("size", [1, 2])
def test_parts_of_which_some_have_a_bias(kind, size):
    """The architecture has none; a quantizer gave k_proj one. Where the architecture has one it must be there."""
    torch.manual_seed(3)
    stored = {name: make("W8A16" if kind == "FLOAT" else kind, rows, name == "k_proj") for name, rows in PARTS.items()}
    if kind == "FLOAT":
        for each in stored.values():
            each.kind, each.tensors["weight"] = "FLOAT", torch.randn_like(each.tensors["weight"].float())
            del each.tensors["weight_scale"], each.tensors["weight_offset"]
    x = torch.randn(5, NUM_IN)
    for rank in range(size):
        group = Silent(rank, size)
        parts = tuple(Part(name, rows, part(rows, group, name)) for name, rows in PARTS.items())
        layer = Linear(NUM_IN, sum(PARTS.values()), shard="out", group=group, parts=parts)
        layer.take(SCHEMES[kind], True)
        found = load(layer, checkpoint_of(stored), "m.qkv_proj")(x).split([each.num_local for each in parts], 1)
        for each, rows in zip(found, parts, strict=True):
            t = stored[rows.name].tensors
            whole = x.double() @ t["weight"].double().t() + t.get("bias", 0) if kind == "FLOAT" else None
            close(each, (stored[rows.name].product(x) if whole is None else whole)[:, rows.rows])
    layer = Linear(
        NUM_IN, sum(PARTS.values()), bias=True, parts=tuple(Part(n, r, slice(0, r)) for n, r in PARTS.items())
    )
    layer.take(SCHEMES[kind], True)
    asked = {pull.name for pull in layer.pulls({}, "m.qkv_proj")}
    assert {f"m.{name}.bias" for name in PARTS} <= asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 1), (24,), (1,), (1, 1)])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A16"])
def test_scales_of_rows_in_every_shape_and_type(kind, shape, dtype):
    torch.manual_seed(4)
    stored, x = make(kind, 24, False), torch.randn(5, NUM_IN)
    scale = stored.tensors["weight_scale"].to(dtype)
    scale = scale[:1] if shape[0] == 1 else scale
    offset = torch.full_like(scale, 3.0 if kind == "W8A16" else 0.0)
    as_stored = {"weight_scale": scale.reshape(shape), "weight_offset": offset.reshape(shape)}
    layer = Linear(NUM_IN, 24)
    layer.take(SCHEMES[kind], False)
    found = load(layer, checkpoint_of({"fc1": Stored(kind, stored.tensors | as_stored)}), "m.fc1")(x)
    spread = {name: tensor.reshape(-1, 1).expand(24, 1) for name, tensor in as_stored.items()}
    close(found, Stored(kind, stored.tensors | spread).product(x))


def bits(scale: Tensor, encoding: str) -> Tensor:
    """deq_scale as int64: a float32's bits, or as npu_trans_quant_param writes them."""
    plain = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return plain if encoding == "plain" else plain & 0xFFFFE000 | 1 << 46


@pytest.mark.parametrize("encoding", ["float", "plain", "cut"])
@pytest.mark.parametrize("shape", [(24,), (1,), (24, 1)])
def test_deq_scale_in_every_encoding(encoding, shape):
    torch.manual_seed(5)
    stored, x = make("W8A8", 24, False), torch.randn(5, NUM_IN)
    scale = stored.tensors["deq_scale"][: shape[0]].reshape(shape)
    meant = scale
    if encoding == "cut":
        meant = (scale.view(torch.int32) & -0x2000).view(torch.float32)  # without its last 13 bits
    written = scale if encoding == "float" else bits(scale, encoding)
    layer = Linear(NUM_IN, 24)
    layer.take(SCHEMES["W8A8"], False)
    found = load(layer, checkpoint_of({"fc1": Stored("W8A8", stored.tensors | {"deq_scale": written})}), "m.fc1")(x)
    close(found, Stored("W8A8", stored.tensors | {"deq_scale": meant.flatten().expand(24)}).product(x))


def test_a_dynamic_weight_with_an_offset_is_refused():
    stored = make("W8A8_DYNAMIC", 24, False)
    stored.tensors["weight_offset"][3] = 2
    layer = Linear(NUM_IN, 24)
    layer.take(SCHEMES["W8A8_DYNAMIC"], False)
    with pytest.raises(UserError, match="fc1.weight_offset. must hold zeros, as .* symmetric, got 2; quantize"):
        load(layer, checkpoint_of({"fc1": stored}), "m.fc1")


def test_a_group_is_never_cut():
    group = Group(1, 16)
    layer = Linear(NUM_IN, 24, shard="in", group=group)
    with pytest.raises(UserError, match="one element holds 8 inputs .weight_scale.*at input 4.*multiples of 8"):
        layer.take(W8A16(8), False)


def test_inputs_in_groups_are_not_rearranged():
    layer = Linear(NUM_IN, 24)
    layer.take(W8A16(8), False)
    with pytest.raises(UserError, match="scales for groups of inputs.*by channel, or leave it float"):
        layer.map_dim("in", lambda x: x)


class Alone(nn.Module):
    """A model of one linear whose inputs are spread over two ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.o_proj = Linear(NUM_IN, 24, shard="in", group=Silent(rank, 2))

    def pulls(self, catalog):
        return self.o_proj.pulls(catalog, "m.o_proj")


@pytest.mark.parametrize("kind", ["FLOAT", "W8A8_DYNAMIC"])
def test_a_gained_bias_is_only_missed_where_it_is_added(kind):
    """The parts of compressed weights hold what each rank reads, under one description."""
    types = {"m.o_proj.weight": kind, "m.o_proj.bias": "FLOAT"}
    description = Description(Path("description.json"), types, kind)
    with pytest.raises(UserError, match="'m.o_proj.bias' is described, and is in none of the files"):
        choose_schemes(Alone(0), {}, description)
    model = Alone(1)
    choose_schemes(model, {}, description)
    assert "m.o_proj.bias" not in {pull.name for pull in model.pulls({})}
    catalog = {"m.o_proj.bias": SimpleNamespace(shape=(24,))}
    assert "m.o_proj.bias" in {pull.name for pull in model.pulls(catalog)}, "where it is, it must fit"
