"""Norms, rotary embeddings and activations against the CPU backend's formulas."""

import pytest
import torch
import torch_npu

from emulator.limits import LimitError
from executor.device.cpu.ops import CpuOps
from tests.emulator.helpers import BF16, FP16, FP32, close, like_meta, rand

CPU = CpuOps()
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
ROWS = pytest.mark.parametrize("rows", [1, 7, 64])


@DTYPES
@ROWS
def test_rms_norm(a2, dtype, rows) -> None:
    x, weight = rand(rows, 96, dtype=dtype), rand(96, dtype=dtype, seed=1)
    y, rstd = like_meta(torch_npu.npu_rms_norm, x, weight, 1e-6)
    close(y, CPU.rms_norm(x, weight, 1e-6), 2)
    close(rstd, (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt())


@DTYPES
@ROWS
def test_add_rms_norm(a2, dtype, rows) -> None:
    x, residual, weight = (
        rand(rows, 96, dtype=dtype),
        rand(rows, 96, dtype=dtype, seed=2),
        rand(96, dtype=dtype, seed=1),
    )
    y, _, total = like_meta(torch_npu.npu_add_rms_norm, x, residual, weight, 1e-6)
    wanted, wanted_total = CPU.add_rms_norm(x, residual, weight, 1e-6)
    close(y, wanted, 2)
    assert torch.equal(total, wanted_total)


def test_add_rms_norm_of_no_rows(a2) -> None:
    x = torch.empty(0, 32, dtype=BF16)
    with pytest.raises(LimitError, match="npu_add_rms_norm.*empty tensors are not supported"):
        torch_npu.npu_add_rms_norm(x, x, torch.ones(32, dtype=BF16))


@pytest.mark.parametrize("soc, void", [("a2", False), ("a3", False), ("duo", True)])
def test_rstd_of_add_rms_norm_is_void_on_duo(request, soc, void) -> None:
    request.getfixturevalue(soc)
    x = rand(3, 32, dtype=FP16)
    y, rstd, total = torch_npu.npu_add_rms_norm(x, x, torch.ones(32, dtype=FP16))
    assert bool(rstd.isnan().all()) == void and rstd.shape == (3, 1)
    assert y.isfinite().all() and torch.equal(total, x + x)


@pytest.mark.parametrize("rank", [1, 2])
def test_rms_norm_quant_takes_gamma_as_a_row(a2, rank) -> None:
    x, gamma, beta = rand(4, 64, dtype=FP16), rand(64, dtype=FP16, seed=1), rand(64, dtype=FP16, seed=2)
    scale, offset = torch.tensor([0.05], dtype=FP16), torch.tensor([3], dtype=torch.int8)
    shaped = [x.view(1, -1) if rank == 2 else x for x in (gamma, beta)]
    got = torch_npu.npu_rms_norm_quant(x, *shaped, scale, offset, 1e-6)
    wide = CPU.rms_norm(x.float(), gamma.float(), 1e-6) + beta.float()
    assert torch.equal(got, (wide / scale.float() + 3).round().clamp(-128, 127).to(torch.int8))
    for wrong in (gamma.view(64, 1), gamma[:32], gamma.expand(4, 64)):
        with pytest.raises(LimitError, match=r"gamma must have shape \[64\] or \[1, 64\]"):
            torch_npu.npu_rms_norm_quant(x, wrong, beta, scale, offset)


@pytest.mark.parametrize("divide", [True, False])
def test_add_rms_norm_quant(a2, divide) -> None:
    x, residual, weight = rand(5, 64), rand(5, 64, seed=2), rand(64, seed=1)
    scale, zero = torch.full((64,), 0.03), torch.full((64,), 3, dtype=torch.int32)
    y, _, total = like_meta(
        torch_npu.npu_add_rms_norm_quant, x, residual, weight, scale if divide else 1 / scale, zero, div_mode=divide
    )
    wanted = (CPU.rms_norm((x + residual).float(), weight.float(), 1e-6) / 0.03 + 3).round().clamp(-128, 127)
    assert (y.float() - wanted).abs().max() <= 1
    assert (y.float() != wanted).float().mean() < 0.01
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize(
    "soc, dtype, scale, zero, fits",
    [
        ("a2", BF16, BF16, BF16, True),
        ("a3", BF16, FP32, torch.int32, True),
        ("a2", FP16, FP32, torch.int32, True),
        ("duo", FP16, FP32, torch.int32, True),
        ("a2", BF16, FP32, BF16, False),
        ("a3", BF16, BF16, torch.int32, False),
        ("a2", FP16, BF16, BF16, False),
    ],
)
def test_types_that_go_together_in_add_rms_norm_quant(request, soc, dtype, scale, zero, fits) -> None:
    request.getfixturevalue(soc)
    x, weight = rand(3, 32, dtype=dtype), torch.ones(32, dtype=dtype)
    call = (x, x, weight, torch.full((32,), 0.03125, dtype=scale), torch.full((32,), 3, dtype=zero))
    if fits:
        wanted = (CPU.rms_norm((x + x).float(), weight.float(), 1e-6) / 0.03125 + 3).round().clamp(-128, 127)
        assert (torch_npu.npu_add_rms_norm_quant(*call)[0] - wanted).abs().max() <= 1
        return
    with pytest.raises(LimitError, match="bfloat16"):
        torch_npu.npu_add_rms_norm_quant(*call)


def test_add_rms_norm_dynamic_quant(a2) -> None:
    x, residual, weight, smooth = rand(5, 64), rand(5, 64, seed=2), rand(64, seed=1), rand(64, seed=4).abs() + 0.5
    y, _, total, scale, _ = like_meta(
        torch_npu.npu_add_rms_norm_dynamic_quant, x, residual, weight, smooth_scale1=smooth, output_mask=[True, False]
    )
    wanted = CPU.rms_norm((x + residual).float(), weight.float(), 1e-6) * smooth.float()
    close(scale, wanted.abs().amax(-1) / 127, 16)
    assert (y.float() * scale[:, None] - wanted).abs().max() <= scale.max() * 0.51
    assert torch.equal(total, x + residual)


@DTYPES
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_apply_rotary_pos_emb(a2, dtype, dim, layout) -> None:
    q, k = rand(6, 4, dim, dtype=dtype), rand(6, 2, dim, dtype=dtype, seed=1)
    angles = rand(6, dim // 2, dtype=FP32, seed=2)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    wanted = CPU.rope(q.float(), cos.float(), sin.float()), CPU.rope(k.float(), cos.float(), sin.float())
    given = [q.clone(), k.clone(), cos.unsqueeze(1), sin.unsqueeze(1)]
    if layout == "BSND":
        given = [x.unsqueeze(0) for x in given]
    got = like_meta(torch_npu.npu_apply_rotary_pos_emb, *given, layout, "half")
    for mine, theirs, source in zip(got, wanted, given[:2], strict=True):
        close(mine.view(theirs.shape), theirs)
        assert torch.equal(source, mine), "the op is documented to work in place"


@DTYPES
def test_rotary_mul(a2, dtype) -> None:
    x, angles = rand(1, 6, 4, 128, dtype=dtype), rand(1, 6, 1, 64, dtype=FP32, seed=2)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    got = like_meta(torch_npu.npu_rotary_mul, x, cos, sin)
    close(got[0], CPU.rope(x[0].float(), cos[0, :, 0].float(), sin[0, :, 0].float()))
    flipped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    close(torch_npu.npu_rotary_mul(x, cos, sin, "interleave"), x.float() * cos.float() + flipped.float() * sin.float())
    turn = torch.eye(128, dtype=dtype).roll(1, 0)
    close(
        torch_npu.npu_rotary_mul(x, cos, sin, rotate=turn),
        x.float() * cos.float() + (x.float() @ turn.float()) * sin.float(),
    )


@DTYPES
@ROWS
def test_swiglu(a2, dtype, rows) -> None:
    x = rand(rows, 64, dtype=dtype)
    close(like_meta(torch_npu.npu_swiglu, x), CPU.swiglu(x.float()))
    close(torch_npu.npu_swiglu(x.view(rows, 2, 32), 1)[:, 0], CPU.swiglu(x.float()))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dequant_swiglu_quant(a2, left, bias) -> None:
    x = torch.randint(-3000, 3000, (5, 128), dtype=torch.int32)
    weight_scale, token_scale = torch.rand(1, 128) * 1e-3, torch.rand(5) + 0.5
    extra = torch.randint(-50, 50, (128,), dtype=torch.int32) if bias else None
    y, scale = torch_npu.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=token_scale, bias=extra, activate_left=left, quant_mode=1
    )
    wide = (x + (extra if bias else 0)).float() * weight_scale * token_scale[:, None]
    halves = wide.chunk(2, -1) if left else wide.chunk(2, -1)[::-1]
    wanted = CPU.swiglu(torch.cat(halves, -1))
    close(scale, wanted.abs().amax(-1) / 127, 16)
    assert (y * scale[:, None] - wanted).abs().max() <= scale.max() * 0.51


def test_dequant_swiglu_quant_by_a_scale_of_its_own(a3) -> None:
    """Static: one scale and offset; sums that need no scale of rows have none."""
    x, weight_scale = torch.randint(-3000, 3000, (5, 128), dtype=torch.int32), torch.rand(1, 128) * 1e-3
    step, offset = torch.tensor([0.02]), torch.tensor([-9.0])
    static = {"quant_scale": step, "quant_offset": offset, "activate_left": True}
    y, _ = torch_npu.npu_dequant_swiglu_quant(x, weight_scale=weight_scale, **static)
    halves = x.float() * weight_scale
    assert torch.equal(y, (CPU.swiglu(halves) / step + offset).round().clamp(-128, 127).to(torch.int8))
    again, _ = torch_npu.npu_dequant_swiglu_quant(halves.bfloat16(), **static)
    wanted = (CPU.swiglu(halves.bfloat16().float()) / step + offset).round().clamp(-128, 127)
    assert torch.equal(again, wanted.to(torch.int8))
    with pytest.raises(LimitError, match="needs quant_scale and quant_offset"):
        torch_npu.npu_dequant_swiglu_quant(x, weight_scale=weight_scale, quant_scale=step)
    with pytest.raises(LimitError, match="an int32 x needs weight_scale"):
        torch_npu.npu_dequant_swiglu_quant(x, **static)


def test_dequant_swiglu_quant_by_groups(a2) -> None:
    x, counts = torch.randint(-3000, 3000, (6, 128), dtype=torch.int32), torch.tensor([2, 0, 3])
    weight_scale, token_scale = torch.rand(3, 128) * 1e-3, torch.rand(6) + 0.5
    y, scale = torch_npu.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=token_scale, group_index=counts, activate_left=True, quant_mode=1
    )
    for rows, group in ((slice(0, 2), 0), (slice(2, 5), 2)):
        wanted = CPU.swiglu(x[rows].float() * weight_scale[group] * token_scale[rows, None])
        assert (y[rows] * scale[rows, None] - wanted).abs().max() <= scale[rows].max() * 0.51
    assert scale[5].isnan(), "rows beyond the groups are undefined"


def test_the_clamped_swiglu(a2) -> None:
    x = rand(4, 64, dtype=BF16) * 6
    y, scale = torch_npu.npu_dequant_swiglu_quant(
        x, quant_mode=1, swiglu_mode=1, clamp_limit=5.0, glu_alpha=1.5, glu_bias=0.5
    )
    gate, linear = x[:, ::2].float().clamp(max=5), x[:, 1::2].float().clamp(-5, 5)
    wanted = gate * torch.sigmoid(1.5 * gate) * (linear + 0.5)
    assert (y * scale[:, None] - wanted).abs().max() <= scale.max() * 0.51
