"""int8 linears of the CPU in every form that whole numbers are multiplied in, against their formulas in float64.

Sums are whole numbers and come out exact; the last scaling is float32's.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from executor.device.cpu import int8
from executor.device.cpu.capability import capability
from executor.device.cpu.int8_products import DIGITS, EXPANDED, ONE_CALL, PRODUCTS
from executor.device.cpu.ops import CpuOps
from executor.device.weights import DynamicInt4, DynamicInt8, MixedInt8, StaticInt8, WeightInt8, pack_int4
from executor.parallel.groups import Group
from tests.reference import REPO

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(1, 1), (33, 48), (77, 1001), (40, 11008), (3, 29568)]


@pytest.fixture(params=[ONE_CALL, DIGITS, EXPANDED])
def device(request) -> CpuOps:
    found = capability()
    if request.param != EXPANDED and found.int8 == EXPANDED or request.param == ONE_CALL != found.int8:
        pytest.skip(f"no exact int8 products by {request.param} on this CPU")
    return CpuOps(replace(found, int8=request.param), decode_rows=4)


def whole(*shape: int) -> torch.Tensor:
    """All int8 values, and rows of the largest in neighbouring places, where 16 bits overflow."""
    x = torch.randint(-128, 128, shape, dtype=torch.int8)
    x[0] = -128
    x[-1] = 127
    return x


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_sums_are_exact(device, m, n, rows):
    torch.manual_seed(0)
    values, x = whole(m, n), whole(rows, n)
    got = PRODUCTS[device.capability.int8](values).sums(x)
    assert torch.equal(got, (x.double() @ values.double().t()).float())


@pytest.mark.parametrize("offset", [-128.0, 0.0, 37.0])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_static(device, offset, rows):
    """quant_bias at the end of int32 stands beside a row of zeros, where msmodelslim saturates it."""
    torch.manual_seed(0)
    values, scale = whole(33, 2048), torch.rand(33) * 0.01 + 0.001
    values[5] = 0
    quant_bias = (torch.randint(-9999, 9999, (33,)) - offset * values.sum(1)).to(torch.int32)
    quant_bias[5] = -(2**31)
    rounded = torch.randint(-128, 128, (rows, 2048)).float()
    multiply = device.prepare_linear(
        StaticInt8(values, scale, quant_bias, torch.tensor([0.5]), torch.tensor([offset])), None
    )
    wanted = (rounded.double() @ values.double().t() + quant_bias) * scale.double()
    for dtype, tolerance in ((F32, 3e-7), (BF16, 4e-3)):
        got = multiply(((rounded - offset) * 0.5).to(dtype))
        assert got.dtype == dtype and got.shape == wanted.shape
        assert not rows or ((got - wanted).abs() <= tolerance * wanted.abs().amax(0)).all()


@pytest.mark.parametrize("rows", [0, 1, 17, 300])
def test_dynamic(device, rows):
    torch.manual_seed(0)
    values, scale, bias = whole(33, 1001), torch.rand(33), torch.randn(33)
    x = torch.randn(rows, 1001)
    x[1:2] = 0
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / step.masked_fill(step == 0, 1)).round().double()
    wanted = (rounded @ values.double().t()) * step.double() * scale.double() + bias.double()
    got = device.prepare_linear(DynamicInt8(values, scale), bias)(x)
    assert got.shape == wanted.shape
    assert not rows or (got - wanted).abs().max() <= 3e-7 * wanted.abs().max()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype, tolerance", [(F32, 4e-6), (BF16, 4e-3)], ids=["fp32", "bf16"])
def test_weight_only_keeps_activations_float(device, groups, dtype, tolerance):
    torch.manual_seed(0)
    values, scale, bias = whole(33, 1000), torch.rand(33, groups), torch.randn(33)
    offset = torch.randint(-20, 20, (33, groups)).float()
    x = torch.randn(9, 1000).to(dtype)
    weight = (values.double().unflatten(1, (groups, -1)) - offset.unsqueeze(-1)) * scale.double().unsqueeze(-1)
    wanted = x.double() @ weight.flatten(1).t() + bias
    got = device.prepare_linear(WeightInt8(values, scale, offset), bias)(x)
    assert got.dtype == dtype and (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_weight_only_by_many_rows_of_bfloat16(device, monkeypatch):
    """Alone and between the two products of an MLP; both digits count where one input is far above the others."""
    torch.manual_seed(0)
    monkeypatch.setattr(int8, "_ADDED_ROWS", 20)
    up, down = WeightInt8(whole(96, 64), torch.rand(96, 1) * 0.01), WeightInt8(whole(33, 48), torch.rand(33, 1))
    x = torch.randn(20, 64).to(BF16)
    x[:, 0] *= 100
    x[3] = 0
    gate_up, plain = device.prepare_linear(up, None), device.prepare_linear(down, None)

    def product(x, weight):
        return x.double() @ (weight.values.double() * weight.scale.double()).t()

    wanted = product(x, up)
    assert (gate_up(x) - wanted).abs().max() <= 4e-3 * wanted.abs().max()
    between = device.swiglu(gate_up(x))
    wanted = product(between, down)
    for got in (plain(between), device.gated_mlp(x, gate_up, plain)):
        assert got.dtype is BF16 and (got - wanted).abs().max() <= 4e-3 * wanted.abs().max()


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_an_int8_mlp_of_few_rows(device, rows):
    torch.manual_seed(0)
    up = device.prepare_linear(DynamicInt8(whole(48, 32), torch.rand(48) * 0.01), None)
    down = device.prepare_linear(DynamicInt8(whole(32, 24), torch.rand(32) * 0.01), None)
    x = torch.randn(rows, 32)
    torch.testing.assert_close(device.gated_mlp(x, up, down), down(device.swiglu(up(x))), atol=1e-5, rtol=1e-5)


def test_experts_read_rows_that_are_rounded_once(device, monkeypatch):
    torch.manual_seed(0)
    values, scale = torch.randint(-128, 128, (3, 48, 32), dtype=torch.int8), torch.rand(3, 48) * 0.01
    gate_up, down = DynamicInt8(values, scale), DynamicInt8(values.mT[..., :24].contiguous(), scale[:, :32])
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [0, 2]]), torch.rand(5, 2)
    wanted = torch.zeros(5, 32)
    for row, (experts, factors) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, factor in zip(experts, factors, strict=True):
            up, back = (
                device.prepare_linear(DynamicInt8(w.values[expert], w.scale[expert]), None) for w in (gate_up, down)
            )
            wanted[row] += back(device.swiglu(up(x[row : row + 1])))[0] * factor
    run, rounded = device.prepare_experts(gate_up, down), []
    plain = int8.Dynamic.rounded
    monkeypatch.setattr(int8.Dynamic, "rounded", lambda self, x: rounded.append(x.shape) or plain(self, x))
    torch.testing.assert_close(run(x, ids, weights), wanted, atol=1e-5, rtol=1e-5)
    assert rounded.count((5, 32)) == 1 and all(shape[1] == 24 for shape in rounded if shape != (5, 32))
    assert torch.equal(run(x[:0], ids[:0], weights[:0]), x[:0])


def test_four_bits(device):
    torch.manual_seed(0)
    values, scale, x = torch.randint(-8, 8, (34, 50), dtype=torch.int8), torch.rand(34), torch.randn(3, 50)
    four, eight = DynamicInt4(pack_int4(values), scale), DynamicInt8(values, scale)
    assert torch.equal(device.prepare_linear(four, None)(x), device.prepare_linear(eight, None)(x))


def test_a_mix_is_static_in_decode_steps_and_dynamic_in_larger_ones(device):
    torch.manual_seed(0)
    values, ones = whole(33, 48), torch.ones(33)
    quant_bias = torch.full((33,), 1000, dtype=torch.int32)
    static = StaticInt8(values, ones, quant_bias, torch.tensor([0.02]), torch.tensor([7.0]))
    dynamic, bias = DynamicInt8(values, ones), torch.randn(33)
    mixed = device.prepare_linear(MixedInt8(static, dynamic), bias)
    for rows, form in ((4, device.prepare_linear(static, None)), (5, device.prepare_linear(dynamic, bias))):
        x = torch.randn(rows, 48)
        assert torch.equal(mixed(x), form(x))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_partial_sums_stay_float32_until_they_are_added(device, size):
    """A rank's part has the zero point's part still in it: in bfloat16 it would lose what is left in the end."""
    torch.manual_seed(0)
    values, scale, offset, reduced = whole(33, 64), torch.full((33,), 0.01), -100.0, []

    class Collecting(Group):
        def all_reduce(self, x):
            reduced.append(x.clone())
            return x

    quant_bias = (-offset * values.sum(1)).to(torch.int32)
    x = torch.randn(3, 64).to(BF16)
    for rank, part in enumerate(values.chunk(size, 1)):
        added = quant_bias if rank == 0 else torch.zeros_like(quant_bias)
        weight = StaticInt8(part.contiguous(), scale, added, torch.tensor([0.02]), torch.tensor([offset]))
        multiply = device.prepare_summed_linear(weight, None, Collecting(rank, size))
        assert multiply(x.chunk(size, 1)[rank]).dtype is BF16
    rounded = (x.float() / 0.02 + offset).round().clamp(-128, 127).double()
    wanted = (rounded @ values.double().t() + quant_bias) * 0.01
    total = torch.stack(reduced).double().sum(0)
    assert all(x.dtype is F32 for x in reduced)
    assert (total - wanted).abs().max() <= 3e-6 * wanted.abs().max()


def test_a_gated_mlp_in_tiles_is_the_same(device, monkeypatch):
    torch.manual_seed(0)
    up = device.prepare_linear(DynamicInt8(whole(48, 32), torch.rand(48) * 0.01), None)
    down = device.prepare_linear(DynamicInt8(whole(32, 24), torch.rand(32) * 0.01), None)
    x = torch.randn(300, 32)
    wanted = down(device.swiglu(up(x)))
    monkeypatch.setattr(int8, "_NEAR_ELEMENTS", 24 * 7)
    monkeypatch.setattr(int8, "_RESULT_BYTES", 1)
    torch.testing.assert_close(device.gated_mlp(x, up, down), wanted, atol=1e-5, rtol=1e-5)


SATURATING = """
import torch
from executor.device.cpu.capability import capability
from executor.device.cpu.int8_products import ONE_CALL, PRODUCTS
values = torch.full((64, 512), 127, dtype=torch.int8)
x = torch.full((3, 512), 127, dtype=torch.int8)
chosen = capability().int8
print(chosen != ONE_CALL, bool((PRODUCTS[chosen](values).sums(x) == 127 * 127 * 512).all()))
"""


def test_without_vnni_a_form_is_chosen_that_does_not_saturate():
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SATURATING], env=os.environ | limits, cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_no_product_takes_reference_code():
    """oneDNN falls back to it without a word, for signed activations on most CPUs: a thousand times as long."""
    if capability().int8 != ONE_CALL:
        pytest.skip("oneDNN's int8 product is not used on this CPU")
    program = (
        "import torch\n"
        "from executor.device.cpu.int8_products import OneCall\n"
        "product = OneCall(torch.ones(300, 96, dtype=torch.int8))\n"
        "for rows in (1, 2, 40, 300):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        product.scaled(torch.ones(rows, 96, dtype=torch.int8), product.ones, product.ones, dtype, 3)\n"
        "        product.two_digits(torch.ones(2, rows, 96, dtype=torch.int8), product.ones, dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"ONEDNN_VERBOSE": "1"}, cwd=REPO, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    products = [line for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert len(products) == 24
    assert [line for line in products if ",ref" in line] == []
