"""Quantized experts of the NPU backend on every chip: against the float64 formula and the CPU, dealt and sliced."""

import pytest
import torch
import torch_npu

from executor.device.npu.soc import GROUPED, SOCS
from executor.device.weights import CompressedInt8, MixedInt8, StaticInt8, WeightInt8
from executor.errors import UserError
from tests.device.inside.npu import A2, A3, CPU, DUO, backend
from tests.quant.experts import error, make, routed

E = 4
SIZES = {"W8A8_DYNAMIC": (64, 48), "W8A16": (64, 48), "W4A8_DYNAMIC": (256, 256)}
CASES = [
    *((A2, dtype, kind) for dtype in SOCS[A2].dtypes for kind in SIZES),
    *((A3, torch.bfloat16, kind) for kind in SIZES),
    (DUO, torch.float16, "W8A8_DYNAMIC"),
]
NEAR = 0.012  # rounded to halves before it is quantized again, an activation may be another whole number


@pytest.fixture(params=CASES, ids=lambda case: "-".join((case[0], str(case[1])[6:], case[2])))
def chip(request):
    """(backend, dtype, kind)."""
    soc, dtype, kind = request.param
    return backend(soc, dtype=dtype), dtype, kind


def rows_of(num_tokens: int, hidden: int, dtype: torch.dtype, k: int = 2):
    x, ids, weights = routed(num_tokens, E, k, hidden)
    return x.to(dtype), ids, weights.to(dtype)


def run(device, made, x, ids, weights, experts=None, columns=None):
    experts = experts or made.every
    layer = device.prepare_experts(*made.weights(experts, columns), experts.start, E)
    return layer(x, ids.to(torch.int32), weights)


@pytest.mark.parametrize("nz", [True, False])
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts(chip, tokens, nz) -> None:
    device, dtype, kind = chip
    device.weight_nz = nz or device.soc.always_nz
    made = make(kind, E, *SIZES[kind])
    x, ids, weights = rows_of(tokens, made.hidden, dtype)
    got = run(device, made, x, ids, weights)
    assert got.dtype == dtype and got.shape == x.shape
    wanted = made.formula(x, ids, weights)
    assert error(got, wanted) < NEAR
    on_cpu = CPU.prepare_experts(*made.weights())(x.float(), ids, weights.float())
    assert error(got, on_cpu.double()) < NEAR


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("experts, columns", [(2, 1), (4, 1), (1, 2), (2, 3)])
def test_ranks_hold_experts_and_slices_of_them(chip, tokens, experts, columns) -> None:
    """Also where a rank has no row at all."""
    device, dtype, kind = chip
    hidden, inner = SIZES[kind]
    inner = inner * columns if kind == "W4A8_DYNAMIC" else inner
    inner = inner * 2 if kind == "W8A8_DYNAMIC" and columns == 2 else inner  # 300I DUO: multiples of 16
    made, (x, ids, weights) = make(kind, E, hidden, inner), rows_of(tokens, hidden, dtype)
    whole = made.formula(x, ids, weights)
    for part in range(experts):
        mine = slice(part * E // experts, (part + 1) * E // experts)
        for column in range(columns):
            some = slice(column * inner // columns, (column + 1) * inner // columns)
            got = run(device, made, x, ids, weights, mine, some)
            wanted = made.formula(x, ids, weights, mine, some)
            assert torch.isfinite(got).all()
            assert (got.double() - wanted).norm() < NEAR * whole.norm()


def test_all_tokens_to_one_expert_and_none_at_all(chip) -> None:
    device, dtype, kind = chip
    made = make(kind, E, *SIZES[kind])
    x, _, weights = rows_of(5, made.hidden, dtype, k=1)
    ids = torch.full((5, 1), 3)
    assert error(run(device, made, x, ids, weights), made.formula(x, ids, weights)) < NEAR
    x[2] = 0  # a row of zeros has no largest value
    got = run(device, made, x, ids, weights)
    assert torch.isfinite(got).all() and error(got, made.formula(x, ids, weights)) < NEAR
    assert run(device, made, x[:0], ids[:0], weights[:0]).shape == (0, made.hidden)


def test_a_single_expert(chip) -> None:
    """A single count is its own running total."""
    device, dtype, kind = chip
    made = make(kind, 1, *SIZES[kind])
    x, ids, weights = rows_of(5, made.hidden, dtype, k=1)
    ids = ids * 0
    layer = device.prepare_experts(*made.weights())
    assert error(layer(x, ids.to(torch.int32), weights), made.formula(x, ids, weights)) < NEAR


@pytest.mark.parametrize("soc", [A2, A3])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W4A8_DYNAMIC"])
def test_without_the_fused_product(soc, kind) -> None:
    """An older torch_npu, plain weights, or more columns than it takes: activation and quantization by themselves."""
    made = make(kind, E, *SIZES[kind])
    x, ids, weights = rows_of(6, made.hidden, torch.bfloat16)
    fused, plain, other = backend(soc), backend(soc, weight_nz=False), backend(soc)
    other.calls |= {"int8_experts": GROUPED, "int4_experts": GROUPED}
    found = {}
    for name, device in (("fused", fused), ("plain", plain), ("other", other)):
        layer = device.prepare_experts(*made.weights())
        found[name] = layer.product.fused
        assert error(layer(x, ids.to(torch.int32), weights), made.formula(x, ids, weights)) < NEAR
    assert found == {"fused": True, "plain": False, "other": False}
    if kind == "W8A8_DYNAMIC":
        wide = make(kind, 1, 32, 5136)
        assert not fused.prepare_experts(*wide.weights()).product.fused


def test_calls_of_a_step(monkeypatch) -> None:
    """Rows are quantized where they are sorted, and where they are activated: nowhere else."""
    seen = []
    for name in ("npu_moe_init_routing_v2", "npu_grouped_matmul_swiglu_quant_v2", "npu_grouped_matmul",
                 "npu_dynamic_quant", "npu_swiglu", "npu_moe_finalize_routing"):  # fmt: skip
        plain = getattr(torch_npu, name)

        def noted(*args, name=name, plain=plain, **options):
            seen.append(name)
            return plain(*args, **options)

        monkeypatch.setattr(torch_npu, name, noted)
    for kind in ("W8A8_DYNAMIC", "W4A8_DYNAMIC"):
        made = make(kind, E, *SIZES[kind])
        run(backend(A3), made, *rows_of(6, made.hidden, torch.bfloat16))
        assert seen == [
            "npu_moe_init_routing_v2", "npu_grouped_matmul_swiglu_quant_v2", "npu_grouped_matmul",
            "npu_moe_finalize_routing",
        ]  # fmt: skip
        seen.clear()


def test_what_a_chip_has_not_is_refused_before_loading() -> None:
    chips = {soc: backend(soc) for soc in SOCS}
    for soc, kind, sizes, message in (
        (
            A2,
            "W8A8",
            (64, 48),
            "atlas_800i_a2 has no kernel for W8A8 experts, allowed W8A8_DYNAMIC, W4A8_DYNAMIC, W8A16",
        ),
        (DUO, "W8A8", (64, 48), "atlas_300i_duo has no kernel for W8A8 experts, allowed W8A8_DYNAMIC;"),
        (DUO, "W4A8_DYNAMIC", (256, 256), "atlas_300i_duo has no kernel for W4A8_DYNAMIC experts"),
        (DUO, "W8A16", (64, 48), "atlas_300i_duo has no kernel for W8A16 experts"),
        (DUO, "W8A8_DYNAMIC", (64, 40), "multiples of 16; got 64 and 40.*moe_ep_size"),
        (A3, "W4A8_DYNAMIC", (256, 128), "multiples of 256, at most 18432; got 256 and 128"),
        (A3, "W4A8_DYNAMIC", (256, 18688), "at most 18432; got 256 and 18688"),
    ):
        form = type(make(kind, 1, 16, 16).weights()[0])
        with pytest.raises(UserError, match=message):
            chips[soc].check_experts(form, *sizes)
    with pytest.raises(UserError, match="no kernel for W8A8SC experts"):
        chips[A2].check_experts(CompressedInt8, 64, 64)
    for device in chips.values():
        device.check_experts(torch.Tensor, 7, 9)
        device.check_experts(MixedInt8, 64, 48)
    made = make("W8A8", E, 64, 48)
    with pytest.raises(UserError, match="no kernel for W8A8 experts"):
        chips[A2].prepare_experts(*made.weights())
    gate_up, down = make("W8A16", E, 64, 48).weights()
    grouped = WeightInt8(gate_up.values, gate_up.scale.expand(-1, -1, 2).contiguous())
    with pytest.raises(UserError, match="scales by groups of inputs have no kernel"):
        chips[A2].prepare_experts(grouped, down)


def test_mixed_experts_take_their_dynamic_form() -> None:
    made, static = make("W8A8_DYNAMIC", E, 64, 48), make("W8A8", E, 64, 48)
    mixed = [MixedInt8(s, d) for s, d in zip(static.weights(), made.weights(), strict=True)]
    assert isinstance(mixed[0].static, StaticInt8)
    x, ids, weights = rows_of(5, 64, torch.float16)
    for soc in SOCS:
        got = backend(soc, dtype=torch.float16).prepare_experts(*mixed)(x, ids.to(torch.int32), weights)
        assert error(got, made.formula(x, ids, weights)) < NEAR
