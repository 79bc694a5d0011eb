"""Quantization and quantized products against integer arithmetic."""

import pytest
import torch
import torch.distributed as dist
import torch_npu

from emulator.formats import NZ
from emulator.graph import fake_world
from emulator.kernels.quant import scale_of_param
from emulator.limits import LimitError
from tests.emulator.helpers import BF16, FP16, FP32, HALF, close, like_meta, rand


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_quantize(a2, dtype) -> None:
    x, scale = rand(4, 6, dtype=dtype) * 5, torch.rand(6) + 0.1
    got = like_meta(torch_npu.npu_quantize, x, scale, torch.full((6,), 2, dtype=torch.int8), torch.qint8, -1, True)
    assert torch.equal(got, (x.float() / scale + 2).round().clamp(-128, 127).to(torch.int8))
    by_row = torch_npu.npu_quantize(x, scale[:4], None, torch.int32, 0, True)
    assert torch.equal(by_row, (x.float() / scale[:4, None]).round().to(torch.int32))
    one = torch_npu.npu_quantize(x, scale[:1].to(dtype), None, torch.qint8, -1, False)
    assert torch.equal(one, (x.float() * scale[:1].to(dtype).float()).round().clamp(-128, 127).to(torch.int8))


def test_quantize_rounds_half_to_even_and_saturates(a2) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, 300.0, -300.0]])
    got = torch_npu.npu_quantize(x, torch.ones(1), None, torch.qint8, -1, True)
    assert got.tolist() == [[0, 2, 2, 0, 127, -128]]


@pytest.mark.parametrize("dtype", HALF)
def test_dynamic_quant(a2, dtype) -> None:
    x, smooth = rand(2, 3, 64, dtype=dtype), rand(64, dtype=dtype, seed=1).abs() + 0.5
    x[0, 1] = 0
    for given, factor in ((None, 1.0), (smooth, smooth.float())):
        y, scale = like_meta(torch_npu.npu_dynamic_quant, x, smooth_scales=given)
        wide = x.float() * factor
        close(scale, wide.abs().amax(-1) / 127)
        assert (y * scale.unsqueeze(-1) - wide).abs().max() <= scale.max() * 0.51
        assert not y[0, 1].any() and scale[0, 1] == 0


def test_int4_is_packed_eight_to_an_int32(a2) -> None:
    x = torch.tensor([[0.0, 1, 2, 3, -1, -2, -8, 7], [7, 6, 5, 4, 3, 2, 1, -8]])
    got = like_meta(torch_npu.npu_quantize, x, torch.ones(1), None, torch.quint4x2, -1, False)
    back = torch.stack([(got >> shift & 0xF) for shift in range(0, 32, 4)], -1).flatten(1)
    assert torch.equal(torch.where(back > 7, back - 16, back), x.int())
    y, scale = like_meta(torch_npu.npu_dynamic_quant, x.to(BF16), dst_type=torch.quint4x2)
    assert y.shape == (2, 1) and torch.equal(scale, torch.full((2,), 8 / 7))


def test_dynamic_quant_by_groups(a2) -> None:
    x, smooth = rand(5, 32), rand(2, 32, seed=1).abs() + 0.5
    y, _ = torch_npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=torch.tensor([2, 5], dtype=torch.int32))
    assert torch.equal(y[:2], torch_npu.npu_dynamic_quant(x[:2], smooth_scales=smooth[0])[0])
    assert torch.equal(y[2:], torch_npu.npu_dynamic_quant(x[2:], smooth_scales=smooth[1])[0])
    with pytest.raises(LimitError, match="group_index must be cumulative"):
        torch_npu.npu_dynamic_quant(x, smooth_scales=smooth, group_index=torch.tensor([5, 2], dtype=torch.int32))


def test_trans_quant_param_keeps_19_bits(a2) -> None:
    scale, offset = torch.rand(8) * 1e-2, torch.arange(-4.0, 4.0)
    packed = like_meta(torch_npu.npu_trans_quant_param, scale, offset)
    back, steps = scale_of_param(packed)
    assert torch.equal(steps, offset)
    assert ((back - scale).abs() <= scale * 2**-10).all() and (back <= scale).all()
    near, _ = scale_of_param(torch_npu.npu_trans_quant_param(scale, None, 1))
    assert ((near - scale).abs() <= scale * 2**-11 * 1.01).all()
    assert ((packed >> 46) == 1).all() and (packed & 0x1FFF == 0).all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("out", [FP16, BF16])
@pytest.mark.parametrize("tokens", [True, False])
def test_quant_matmul(a2, rows, out, tokens) -> None:
    x, w, scale = int8(rows, 96), int8(96, 32, seed=1), torch.rand(32) * 1e-3
    per_token, bias = (torch.rand(rows) + 0.5 if tokens else None), torch.randint(-500, 500, (32,), dtype=torch.int32)
    got = like_meta(torch_npu.npu_quant_matmul, x, w, scale, pertoken_scale=per_token, bias=bias, output_dtype=out)
    if not tokens and out == FP16:  # the op puts a float32 scale through npu_trans_quant_param first
        scale = scale_of_param(torch_npu.npu_trans_quant_param(scale))[0]
    wanted = (x.double() @ w.double() + bias) * scale * (per_token[:, None] if tokens else 1)
    close(got, wanted.to(out))


def test_quant_matmul_to_integers(a2) -> None:
    x, w, scale = int8(3, 64), int8(64, 16, seed=1), torch.rand(16) * 1e-2
    product = (x.double() @ w.double()).to(torch.int32)
    assert torch.equal(like_meta(torch_npu.npu_quant_matmul, x, w, scale, output_dtype=torch.int32), product)
    packed = torch_npu.npu_trans_quant_param(scale)
    offset = torch.full((16,), 3.0)
    got = like_meta(torch_npu.npu_quant_matmul, x, w, packed, offset=offset)
    wanted = (product.float() * scale_of_param(packed)[0] + 3).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("soc", ["a2", "duo"])
@pytest.mark.parametrize("out", [FP16, torch.int8])
def test_a_float32_scale_keeps_19_bits(request, soc, out) -> None:
    """As if it had been packed before, and only where the product is rounded to half or int8 without pertoken_scale."""
    request.getfixturevalue(soc)
    x, w = torch.tensor([[64]], dtype=torch.int8).expand(1, 16).contiguous(), torch.ones(16, 16, dtype=torch.int8)
    scale = torch.full((16,), 0.05 * (1 + 2**-11 * 1.5))
    packed = torch_npu.npu_trans_quant_param(scale)
    got = torch_npu.npu_quant_matmul(x, w, scale, output_dtype=out)
    assert torch.equal(got, torch_npu.npu_quant_matmul(x, w, packed, output_dtype=out))
    if out == FP16:
        assert not torch.equal(got, (1024 * scale).half().expand(1, 16)), "the bits that are cut show in half"
    if soc == "a2":
        tokens = torch_npu.npu_quant_matmul(x, w, scale, pertoken_scale=torch.ones(1), output_dtype=FP16)
        assert torch.equal(tokens, (1024 * scale).half().expand(1, 16)), "with pertoken_scale it stays whole"
        wide = torch_npu.npu_quant_matmul(x, w, torch.full((16,), 1 + 2**-11 * 1.5), output_dtype=BF16)
        assert torch.equal(wide, torch.full((1, 16), 1024 * (1 + 2**-11 * 1.5)).to(BF16))


def test_quant_matmul_of_a_transposed_weight(a2) -> None:
    x, w = int8(3, 64), int8(16, 64, seed=1)
    got = torch_npu.npu_quant_matmul(x, w.t(), torch.ones(1), output_dtype=torch.int32)
    assert torch.equal(got, (x.double() @ w.t().double()).to(torch.int32))


def test_quant_matmul_on_duo_wants_the_transposed_weight_cast(duo) -> None:
    x, w, scale = int8(3, 64), int8(16, 64, seed=1), torch.rand(16) * 1e-3
    packed = torch_npu.npu_format_cast(w, NZ)
    got = torch_npu.npu_quant_matmul(x, packed.t(), scale, output_dtype=FP16)
    kept = scale_of_param(torch_npu.npu_trans_quant_param(scale))[0]
    close(got, ((x.double() @ w.t().double()) * kept).to(FP16))
    with pytest.raises(LimitError, match="must have been transposed before the cast"):
        torch_npu.npu_quant_matmul(x, torch_npu.npu_format_cast(w.t(), NZ), scale, output_dtype=FP16)


def test_quant_matmul_limits(duo) -> None:
    x, w, scale = int8(3, 64), int8(64, 16, seed=1), torch.rand(16)
    torch_npu.npu_quant_matmul(x, w, scale, output_dtype=FP16)
    for wrong, message in (
        ({"output_dtype": BF16}, "output_dtype must be one of int8, float16"),
        ({"output_dtype": FP16, "pertoken_scale": torch.rand(3)}, "pertoken_scale must be None"),
        ({"output_dtype": FP16, "bias": torch.rand(16)}, "bias must be torch.int32"),
    ):
        with pytest.raises((LimitError, RuntimeError), match=message):
            torch_npu.npu_quant_matmul(x, w, scale, **wrong)


@pytest.mark.parametrize("bias", [True, False])
def test_mm_all_reduce_of_one_rank(a2, bias) -> None:
    x, w = rand(3, 32), rand(32, 16, seed=1)
    extra = rand(16, seed=2) if bias else None
    got = like_meta(torch_npu.npu_mm_all_reduce_base, x, w, "group", bias=extra)
    close(got, x.float() @ w.float() + (extra.float() if bias else 0), 4)


def test_fused_sums_of_a_model_share_one_domain(a2) -> None:
    x, w = rand(3, 32), rand(32, 16, seed=1)
    for _ in range(2):  # another world is another job
        with fake_world(2):
            whole, other = dist.group.WORLD.group_name, dist.new_group([0, 1]).group_name
            torch_npu.npu_mm_all_reduce_base(x, w, other)
            torch_npu.npu_mm_all_reduce_base(x, w, other)
            with pytest.raises(LimitError, match=f"must share one communication domain, here {other}"):
                torch_npu.npu_mm_all_reduce_base(x, w, whole)
    with fake_world(16), pytest.raises(LimitError, match="the group must have 1, 2, 4 or 8 ranks; got 16"):
        torch_npu.npu_mm_all_reduce_base(x, w, dist.group.WORLD.group_name)


def test_mm_all_reduce_does_not_exist_on_a3(a3) -> None:
    with pytest.raises(LimitError, match="npu_mm_all_reduce_base on Atlas 800I A3.*not available"):
        torch_npu.npu_mm_all_reduce_base(rand(3, 32), rand(32, 16), "group")


def test_weight_quant_batchmatmul(a2) -> None:
    x, w, scale = rand(3, 64), int8(64, 16, seed=1), (torch.rand(16) * 1e-2).to(BF16)
    got = like_meta(torch_npu.npu_weight_quant_batchmatmul, x, w, scale)
    close(got, (x.float() @ (w.float() * scale.float()).to(BF16).float()).to(BF16))
