"""Quantized experts from files to products: every form of the tensors, dealt over ranks and sliced, on the CPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from executor.checkpoint.description import Description
from executor.checkpoint.pull import finalize
from executor.checkpoint.strangers import check_unread
from executor.checkpoint.weights import Checkpoint, check_complete, load_weights
from executor.device import ops
from executor.device.cpu.ops import CpuOps
from executor.device.weights import MixedInt8, experts_of, pack_int4, unpack_int4
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.layers.moe import Experts
from executor.parallel.groups import SINGLE, Group, Parallel
from executor.quant.choose import choose_schemes
from tests.quant.experts import KINDS, LINEARS, Made, error, make, pack, routed

PREFIX = "model.language_model.layers.0.mlp.experts"
E, N, INNER = 4, 24, 32
CLOSE = 2e-3  # a rounding to another whole number, now and then
FORMS = {
    "unstacked": {},
    "stacked": {"swapped": False},
    "swapped": {"swapped": True},
    "scale beside": {"spelling": "_weight_scale"},
    "bare": {"swapped": True, "spelling": "_scale"},
}


@pytest.fixture(autouse=True)
def bound():
    ops.bind(CpuOps())


class Model(nn.Module):
    """One layer's experts by their true name."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def pulls(self, catalog):
        yield from self.experts.pulls(catalog, PREFIX)


def described(folder, tensors: dict[str, torch.Tensor], kind: str, **others: str) -> tuple[Checkpoint, Description]:
    """A folder with these tensors; those that are weights or have one are `kind`."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "quant_model_weights.safetensors")
    types = {name: "FLOAT" if name.endswith(".bias") else kind for name in tensors}
    return Checkpoint(folder), Description(folder / "quant_model_description.json", types | others, kind)


def load(folder, tensors, kind, parallel=SINGLE, hidden=N, inner=INNER, **others: str) -> nn.Module:
    checkpoint, description = described(folder, tensors, kind, **others)
    model = Model(Experts(hidden, inner, E, parallel))
    ignore = choose_schemes(model, checkpoint.catalog, description)
    pulls = list(model.pulls(checkpoint.catalog))
    check_complete(model, pulls)
    check_unread(pulls, checkpoint, ignore)
    assert load_weights(pulls, checkpoint, ignore=ignore).unread == ()
    finalize(model)
    return model.experts


def tensors_of(made: Made, form: str) -> dict[str, torch.Tensor]:
    return made.unstacked(PREFIX) if form == "unstacked" else made.stacked(PREFIX, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_every_scheme_computes_its_formula(tmp_path, kind, form) -> None:
    made = make(kind, E, N, INNER)
    layer = load(tmp_path, tensors_of(made, form), kind)
    x, ids, weights = routed(6, E, 2, N)
    assert error(layer(x, ids, weights), made.formula(x, ids, weights)) < CLOSE
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, N)
    assert not list(layer.parameters()), "the plain tensors are dropped"


@pytest.mark.parametrize("groups, columns", [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("form", ["unstacked", "swapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_experts_and_slices_of_them(tmp_path, kind, form, groups, columns) -> None:
    """Each rank against its own formula: quantized activations are those of the slice. Their sum is near the whole."""
    made = make(kind, E, N, INNER)
    tensors, (x, ids, weights) = tensors_of(made, form), routed(5, E, 2, N)
    total = torch.zeros(5, N, dtype=torch.float64)
    for group in range(groups):
        for column in range(columns):
            parallel = Parallel(expert_groups=Group(group, groups), expert_columns=Group(column, columns))
            layer = load(tmp_path, tensors, kind, parallel)
            got = layer(x, ids, weights)
            assert error(got, made.formula(x, ids, weights, layer.share.experts, layer.share.columns)) < CLOSE
            total += got
    assert error(total, made.formula(x, ids, weights)) < (CLOSE if columns == 1 or "16" in kind else 0.03)


def test_two_outputs_to_a_byte() -> None:
    values = torch.randint(-8, 8, (3, 6, 5), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(values)
    assert torch.equal(packed, torch.stack([pack(w) for w in values]))
    assert torch.equal(unpack_int4(packed), values)
    linear = Linear(5, 6)
    made = make("W4A8_DYNAMIC", 1, 8, 6).linears[0]["gate_proj"]
    from executor.quant.w4a8_dynamic import W4A8Dynamic

    linear.take(W4A8Dynamic(), False)
    linear.weight.data, linear.weight_scale.data = pack(made["values"]), made["weight_scale"]
    linear.map_dim("out", lambda x: x.flip(0))
    assert torch.equal(unpack_int4(linear.weight.data), made["values"].flip(0))
    assert torch.equal(linear.weight_scale.data, made["weight_scale"].flip(0))


@pytest.mark.parametrize("form", ["unstacked", "stacked"])
def test_a_slice_never_cuts_a_byte(tmp_path, form) -> None:
    made = make("W4A8_DYNAMIC", E, N, 6)
    parallel = Parallel(expert_columns=Group(1, 2))
    with pytest.raises(UserError, match="one element holds 2 outputs.*at output 3.*moe_ep_size"):
        load(tmp_path, tensors_of(made, form), "W4A8_DYNAMIC", parallel, inner=6)


@pytest.mark.parametrize("columns", [1, 2])
def test_an_older_writer_has_one_weight_to_a_byte(tmp_path, columns) -> None:
    """v0 of msmodelslim, without a version in its description: int8 as wide as the linear, no scale_bias."""
    made = make("W4A8_DYNAMIC", E, N, INNER)
    tensors = {name: x for name, x in made.unstacked(PREFIX).items() if not name.endswith("scale_bias")}
    tensors |= {
        f"{PREFIX}.{expert}.{name}.weight": part["values"]
        for expert, linears in enumerate(made.linears)
        for name, part in linears.items()
    }
    x, ids, weights = routed(5, E, 2, N)
    layer = load(tmp_path, tensors, "W4A8_DYNAMIC", Parallel(expert_columns=Group(columns - 1, columns)))
    assert error(layer(x, ids, weights), made.formula(x, ids, weights, columns=layer.share.columns)) < CLOSE
    tensors[f"{PREFIX}.1.up_proj.weight"] = torch.full((INNER, N), 8, dtype=torch.int8)
    with pytest.raises(UserError, match="1.up_proj.weight' has one weight to a byte and weights outside of -8 to 7"):
        load(tmp_path, tensors, "W4A8_DYNAMIC")


@pytest.mark.parametrize("columns", [1, 2])
def test_scales_by_groups_of_inputs(tmp_path, columns) -> None:
    """W8A16: a row's second half has twice the first one's scale, as if its weights were twice as large."""
    made, size = make("W8A16", E, INNER, INNER), INNER // 2
    tensors, doubled = made.unstacked(PREFIX), []
    for expert, linears in enumerate(made.linears):
        doubled.append({})
        for name, part in linears.items():
            scale, full = part["weight_scale"], f"{PREFIX}.{expert}.{name}"
            tensors[f"{full}.weight_scale"] = torch.stack((scale, 2 * scale), 1)
            tensors[f"{full}.weight_offset"] = torch.zeros(len(scale), 2)
            wide = torch.cat((part["values"][:, :size], part["values"][:, size:].int() * 2), 1)
            doubled[-1][name] = {"values": wide, "weight_scale": scale, "weight_offset": torch.zeros(len(scale))}
    x, ids, weights = routed(5, E, 2, INNER)
    parallel = Parallel(expert_columns=Group(columns - 1, columns))
    layer = load(tmp_path, tensors, "W8A16", parallel, hidden=INNER)
    wanted = Made("W8A16", INNER, INNER, doubled).formula(x, ids, weights, columns=layer.share.columns)
    assert error(layer(x, ids, weights), wanted) < CLOSE


def test_scale_bias_is_what_the_weights_say() -> None:
    """It is left in the file because it follows from them: eight times each row's sum, in parts for 16 ranks."""
    made = make("W4A8_DYNAMIC", 1, N, INNER)
    files = made.unstacked("e")
    for name in LINEARS:
        values = unpack_int4(files[f"e.0.{name}.weight"]).float()
        assert files[f"e.0.{name}.scale_bias"].shape == (len(values), 16 if name == "down_proj" else 1)
        derived = 8 * values.sum(-1) * files[f"e.0.{name}.weight_scale"][:, 0]
        torch.testing.assert_close(files[f"e.0.{name}.scale_bias"].sum(-1), derived, atol=1e-4, rtol=1e-5)


def broken(kind: str, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return make(kind, E, N, INNER).unstacked(PREFIX) | {f"{PREFIX}.{name}": x for name, x in changes.items()}


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16", "FLOAT"])
@pytest.mark.parametrize("name", ["2.up_proj.bias", "3.down_proj.bias"])
def test_a_bias_of_an_expert_is_not_ignored(tmp_path, kind, name) -> None:
    made = "W8A8_DYNAMIC" if kind == "FLOAT" else kind
    with pytest.raises(UserError, match=f"experts.{name}' stands beside .* experts have no biases"):
        load(tmp_path, broken(made, **{name: torch.zeros(INNER)}), kind)


def test_a_static_bias_is_in_quant_bias_already(tmp_path) -> None:
    made = make("W8A8", E, N, INNER)
    x, ids, weights = routed(4, E, 2, N)
    layer = load(tmp_path, broken("W8A8", **{"1.up_proj.bias": torch.ones(INNER)}), "W8A8")
    assert error(layer(x, ids, weights), made.formula(x, ids, weights)) < CLOSE


def test_what_does_not_fit_is_named(tmp_path) -> None:
    cases = (
        ("W4A8_DYNAMIC", {"1.up_proj.weight_scale_second": torch.ones(INNER, 2)}, {}, "1.up_proj.weight_scale_second'"),
        (
            "W4A8_DYNAMIC",
            {"0.up_proj.weight_offset": torch.ones(INNER, 1)},
            {},
            "0.up_proj.weight_offset' must hold zeros",
        ),
        (
            "W8A8_DYNAMIC",
            {"3.up_proj.weight_offset": torch.ones(INNER, 1)},
            {},
            "3.up_proj.weight_offset' must hold zeros",
        ),
        ("W8A8", {"2.up_proj.input_scale": torch.tensor([0.5])}, {}, "expert 2: gate_proj 0.04, up_proj 0.5"),
        ("W8A8_DYNAMIC", {}, {f"{PREFIX}.3.down_proj.weight": "FLOAT"}, "different types.*3.down_proj.weight is FLOAT"),
        ("W8A8_DYNAMIC", {"1.up_proj.weight": torch.ones(INNER, N + 1, dtype=torch.int8)}, {}, "1.up_proj.weight"),
        ("W4A8_DYNAMIC", {"1.up_proj.weight": torch.ones(INNER, N - 1, dtype=torch.int8)}, {}, "1.up_proj.weight"),
    )
    for kind, changes, types, message in cases:
        with pytest.raises(UserError, match=message):
            load(tmp_path, broken(kind, **changes), kind, **types)


@pytest.mark.parametrize("form", ["unstacked", "swapped"])
def test_experts_of_two_forms_are_read_and_take_the_dynamic_one(tmp_path, form) -> None:
    static = make("W8A8", E, N, INNER)
    both, dynamic = [], []
    for linears in static.linears:
        more = {
            name: {
                "weight_scale": part["deq_scale"] / part["input_scale"],
                "weight_offset": torch.zeros(len(part["values"])),
            }
            for name, part in linears.items()
        }
        both.append({name: part | more[name] for name, part in linears.items()})
        dynamic.append({name: {"values": part["values"], **more[name]} for name, part in linears.items()})
    layer = load(tmp_path, tensors_of(Made("W8A8_MIX", N, INNER, both), form), "W8A8_MIX")
    x, ids, weights = routed(5, E, 2, N)
    wanted = Made("W8A8_DYNAMIC", N, INNER, dynamic).formula(x, ids, weights)
    assert error(layer(x, ids, weights), wanted) < CLOSE


def test_mixed_experts_take_the_dynamic_form() -> None:
    """W8A8_MIX: static where rows are few, dynamic where they are many; an expert's are few in every step."""
    made, static = make("W8A8_DYNAMIC", E, N, INNER), make("W8A8", E, N, INNER)
    mixed = [MixedInt8(s, d) for s, d in zip(static.weights(), made.weights(), strict=True)]
    assert [type(w) for w in experts_of(mixed[0])] == [MixedInt8] * E
    x, ids, weights = routed(5, E, 2, N)
    got = CpuOps().prepare_experts(*mixed)(x, ids, weights)
    assert error(got, made.formula(x, ids, weights)) < CLOSE


def test_a_description_that_names_stacked_experts_counts_them() -> None:
    """By the linear's own name, as float checkpoints have them, or by the weight's."""
    for end in ("", ".weight"):
        types = {f"{PREFIX}.gate_up_proj{end}": "W8A8_DYNAMIC", "lm_head.weight": "FLOAT"}
        description = Description(Path("quant_model_description.json"), types, "W8A8_DYNAMIC")
        assert description.label == "w8a8_dynamic" and dict(description.samples) == {
            "w8a8_dynamic": f"{PREFIX}.gate_up_proj{end}"
        }


def test_a_quantized_router_is_a_linear_like_any(tmp_path) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Linear(N, 6)

        def pulls(self, catalog):
            yield from self.gate.pulls(catalog, "model.language_model.layers.0.mlp.gate")

    made = make("W8A8_DYNAMIC", 1, N, 6)
    files = {k.split("gate_proj.")[1]: x for k, x in made.unstacked("e").items() if "gate_proj" in k}
    tensors = {f"model.language_model.layers.0.mlp.gate.{name}": x for name, x in files.items()}
    checkpoint, description = described(tmp_path, tensors, "W8A8_DYNAMIC")
    model = Router()
    choose_schemes(model, checkpoint.catalog, description)
    load_weights(list(model.pulls(checkpoint.catalog)), checkpoint)
    finalize(model)
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(2))
    part = made.linears[0]["gate_proj"]
    wanted = torch.stack([made._product(part, row.double(), slice(None), slice(None)) for row in x])
    assert error(model.gate(x), wanted) < CLOSE
