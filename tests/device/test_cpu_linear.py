"""Linears of the CPU backend in every form a weight is kept in, whatever this machine would choose by itself."""

import pytest
import torch

from executor.device.cpu import linear
from executor.device.cpu.capability import PACKED_FP16, PLAIN, REORDERED, Capability, capability
from executor.device.cpu.ops import CpuOps
from executor.errors import UserError

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OTHER = Capability("other", "DEFAULT", frozenset(), packs_fp16=False)


def ops_of(isa: str) -> CpuOps:
    """The backend of a CPU of that kind; skips where this machine cannot be one."""
    if isa == "other":
        return CpuOps(OTHER)
    try:
        return CpuOps(capability(isa))
    except UserError as error:
        pytest.skip(f"this CPU: {error}")


@pytest.mark.parametrize("many_rows", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "other"])
@pytest.mark.parametrize("dtype, tolerance", [(F32, 1e-6), (BF16, 1e-2), (FP16, 1e-3)], ids=["fp32", "bf16", "fp16"])
def test_linear_is_a_matrix_product(isa, dtype, tolerance, many_rows):
    torch.manual_seed(0)
    device = ops_of(isa)
    weight, bias = torch.randn(33, 48).to(dtype), torch.randn(33).to(dtype)
    multiply = device.prepare_linear(weight.clone(), bias, many_rows)
    for rows in (0, 1, 3, 64):
        x = torch.randn(rows, 48).to(dtype)
        wanted = x.double() @ weight.double().t() + bias.double()
        got = multiply(x)
        assert got.dtype == dtype and got.shape == (rows, 33)
        assert not rows or (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("many_rows", [False, True], ids=["few", "many"])
def test_without_avx512_products_of_16_bit_weights_are_float32s(dtype, many_rows):
    """Activations are not rounded: the result is as near to float64's as float32 weights of the same values give."""
    torch.manual_seed(0)
    device = ops_of("avx2")
    assert device.compute_dtype(dtype) is F32
    weight, bias, x = (torch.randn(70, 300) * 0.02).to(dtype), torch.randn(70).to(dtype), torch.randn(5, 300)
    wanted = x.double() @ weight.double().t() + bias.double()
    got = device.prepare_linear(weight, bias, many_rows)(x)
    assert got.dtype is F32
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    "low, high",
    [(-12, 0), (-38, -30), (0, 6), (4, 38), (-10, 4)],
    ids=["subnormal in fp16", "tiny", "above 65504", "huge", "both"],
)
@pytest.mark.parametrize("shape", [(20, 40), (40, 20)], ids=["scales outputs", "scales inputs"])
def test_bfloat16_weights_outside_fp16s_range(low, high, shape):
    """Magnitudes of 10^low to 10^high, packed times a power of two: off by 2^-39 of the largest at most."""
    torch.manual_seed(0)
    device = ops_of("avx2")
    magnitude = 10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(low, high)
    weight = (magnitude * torch.randn(shape).sign()).to(BF16)
    bias, x = torch.randn(shape[0]).to(BF16), torch.rand(3, shape[1]) + 0.5
    multiply = device.prepare_linear(weight, bias)
    assert isinstance(multiply, linear.PackedFp16)
    wanted = x.double() @ weight.double().t() + bias.double()
    size = x.double() @ weight.double().abs().t() + bias.double().abs()
    allowed = 1e-6 * size + 2.0**-39 * weight.double().abs().max() * x.double().sum(1, keepdim=True)
    assert ((multiply(x).double() - wanted).abs() <= allowed).all()


def test_what_fp16_holds_is_packed_as_it_is():
    weight = torch.tensor([[1.0, 65504.0, 2.0**-24, -(2.0**-14)]])
    assert linear.exact_scale(weight.half()) == 1
    assert linear.exact_scale(torch.tensor([[1.0, 2.0**-20]]).bfloat16()) == 1
    assert linear.exact_scale(torch.tensor([[1.0, 3 * 2.0**-25]]).bfloat16()) == 2.0**14
    assert linear.exact_scale(torch.tensor([[65536.0, 1.0]]).bfloat16()) == 0.25
    assert linear.exact_scale(torch.zeros(3, 4).bfloat16()) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_not_clamped(value):
    """FBGEMM would make the largest fp16 value of them, and a damaged checkpoint would look sound."""
    weight = torch.randn(8, 16).bfloat16()
    weight[3, 5] = value
    y = ops_of("avx2").prepare_linear(weight, None)(torch.ones(2, 16))
    assert not torch.isfinite(y[:, 3]).any() and torch.isfinite(y[:, :3]).all() and torch.isfinite(y[:, 4:]).all()


def test_big_weights_are_packed_and_expanded_in_parts(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "PACK_ELEMENTS", 100)
    monkeypatch.setattr(linear, "EXPAND_ELEMENTS", 100)
    weight, bias, x = torch.randn(23, 30).bfloat16(), torch.randn(23).bfloat16(), torch.randn(4, 30)
    device = ops_of("avx2")
    few, many = device.prepare_linear(weight, bias), device.prepare_linear(weight, bias, many_rows=True)
    assert len(few.parts) == 8 and many.rows == 3
    wanted = (x.double() @ weight.double().t() + bias.double()).float()
    for multiply in (few, many):
        torch.testing.assert_close(multiply(x), wanted, atol=1e-5, rtol=1e-5)
    assert device.scratch.buffer.numel() == 90, "one block for all linears"


@pytest.mark.parametrize("isa", ["avx2", "avx512", "other"])
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_a_tied_head_multiplies_what_the_embedding_holds(isa, dtype):
    torch.manual_seed(0)
    device = ops_of(isa)
    weight = torch.randn(50, 16).to(dtype)
    head = device.prepare_tied_head(weight)
    x = torch.randn(4, 16).to(device.compute_dtype(dtype))
    for rows in (1, 4):
        wanted = x[:rows].double() @ weight.double().t()
        assert (head(x[:rows]).double() - wanted).abs().max() <= 0.01 * wanted.abs().max()
    if not device.copies_tied_head(dtype):
        assert head.weight.data_ptr() == weight.data_ptr(), "a second copy"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_linear_keeps_no_view_of_the_plain_weight(isa):
    device, weight, x = ops_of(isa), torch.randn(8, 16), torch.randn(2, 16)
    multiply = device.prepare_linear(weight, None)
    before = multiply(x)
    weight.zero_()
    assert torch.equal(multiply(x), before)


def test_forms_by_what_was_found():
    every = frozenset((F32, BF16, FP16))
    big, small = Capability("avx512", "AVX512", every, True), Capability("avx2", "AVX2", frozenset((F32,)), True)
    emulating = Capability("avx2", "AVX512", every, True)  # oneDNN takes bfloat16 there, by slow emulation
    assert [big.form(dtype) for dtype in (F32, BF16, FP16)] == [REORDERED, REORDERED, REORDERED]
    assert [emulating.form(dtype) for dtype in (F32, BF16, FP16)] == [REORDERED, PACKED_FP16, PACKED_FP16]
    assert [small.form(dtype) for dtype in (F32, BF16, FP16)] == [REORDERED, PACKED_FP16, PACKED_FP16]
    assert [OTHER.form(dtype) for dtype in (F32, BF16, FP16)] == [PLAIN, PLAIN, PLAIN]
    arm = Capability("other", "DEFAULT", frozenset((F32, BF16)), False)
    assert [arm.form(dtype) for dtype in (F32, BF16, FP16)] == [REORDERED, REORDERED, PLAIN]
    assert [big.compute_dtype(dtype) for dtype in (F32, BF16, FP16)] == [F32, BF16, FP16]
    assert [small.compute_dtype(dtype) for dtype in (F32, BF16, FP16)] == [F32, F32, F32]
    assert [OTHER.compute_dtype(dtype) for dtype in (F32, BF16, FP16)] == [F32, BF16, FP16]
