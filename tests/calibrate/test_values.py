"""The numbers of a quantized linear: msmodelslim's formulas, bit for bit, and rounding better than to nearest."""

import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from executor.calibrate.observe import ChannelRange, Histogram
from executor.calibrate.rounding import (
    LEAST_SCALE,
    four_bit_scales,
    gptq,
    low_entropy_scales,
    nearest,
    row_scales,
)
from executor.calibrate.tensors import (
    InputRange,
    four_bit_tensors,
    integer_bias,
    mixed_tensors,
    row_tensors,
    static_tensors,
)
from executor.checkpoint.headers import Checkpoint
from executor.quant.fields import scale_of_bits
from tests.reference import REPO


def tensors_of(folder):
    return {k: v for file in Checkpoint(folder).files for k, v in load_file(file).items()}


def test_weights_and_scales_are_msmodelslims_to_the_bit(msmodelslim):
    """Layers 1 and 2: their weights are the source's, and the tool computes them in float32."""
    written = tensors_of(msmodelslim("qwen3_vl_w8a16"))
    source = tensors_of(REPO / "models" / "tiny" / "qwen3_vl")
    names = [name.removesuffix(".weight_scale") for name in written if name.endswith(".weight_scale")]
    names = [name for name in names if ".layers.1." in name or ".layers.2." in name]
    assert len(names) == 14
    for name in names:
        weight = source[f"{name}.weight"].float()
        made = row_tensors(nearest(weight, row_scales(weight)).to(torch.int8), row_scales(weight))
        for suffix, tensor in made.items():
            assert torch.equal(tensor, written[f"{name}.{suffix}"]), f"{name}.{suffix}"


@pytest.mark.parametrize("folder, count", [("qwen3_vl_w8a8s", 39), ("qwen3_vl_w8a8", 18), ("qwen3_vl_moe_w8a8", 12)])
def test_the_integer_bias_is_msmodelslims_to_the_bit(msmodelslim, folder, count):
    """From its own values, scales and float biases. bfloat16 runs compute the encoder in bfloat16: the text only."""
    written = tensors_of(msmodelslim(folder))
    names = [name.removesuffix(".quant_bias") for name in written if name.endswith(".quant_bias")]
    names = [name for name in names if folder.endswith("s") or ".visual." not in name]
    assert len(names) == count
    for name in names:
        scale, bias = scale_of_bits(written[f"{name}.deq_scale"]), written.get(f"{name}.bias")
        made = integer_bias(written[f"{name}.weight"], scale, bias, written[f"{name}.input_offset"])
        assert torch.equal(made, written[f"{name}.quant_bias"]), name


def test_a_static_linear_computes_what_the_float_one_does():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    x = torch.randn(64, 40, generator=generator) * 2 + 0.7
    scale = row_scales(weight)
    values = nearest(weight, scale).to(torch.int8)
    seen = ChannelRange()
    seen.see(x[:30])
    seen.see(x[30:])
    inputs = seen.over(None)
    assert (inputs.low, inputs.high) == (float(x.min()), float(x.max()))
    made = mixed_tensors(values, scale, bias, inputs, int64_scale=False)
    xq = (x / made["input_scale"] + made["input_offset"]).round().clamp(-128, 127)
    y = (xq.double() @ values.double().t() + made["quant_bias"]) * made["deq_scale"]
    wanted = x @ weight.t() + bias
    assert float((y - wanted).norm() / wanted.norm()) < 0.01
    assert torch.equal(made["weight_scale"], scale) and not made["weight_offset"].any()


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.5, 2.0), (-3.0, -1.0), (-1.0, 3.0)])
def test_zero_is_exact_in_every_range(low, high):
    """Zero lies between least and largest, so that it becomes a whole number: nothing that pads is off."""
    inputs = InputRange(low, high)
    offset = float(inputs.offset)
    assert offset == round(offset) and -128 <= offset <= 127
    assert float(inputs.scale) == pytest.approx(max((max(high, 0) - min(low, 0)) / 255, LEAST_SCALE))


def test_rows_of_zeros_and_large_biases_saturate():
    values, scale = torch.zeros(2, 4, dtype=torch.int8), torch.full((2, 1), LEAST_SCALE)
    made = static_tensors(values, scale, torch.tensor([-5000.0, 5000.0]), InputRange(-1e-3, 1e-3), False)
    assert made["quant_bias"].tolist() == [-(2**31), 2**31 - 1]


def test_the_scale_of_float16_models_is_a_float32s_bits_in_int64():
    values, scale = torch.ones(3, 4, dtype=torch.int8), torch.tensor([[0.1], [0.2], [3.0]])
    made = static_tensors(values, scale, None, InputRange(-1.0, 1.0), True)["deq_scale"]
    wanted = static_tensors(values, scale, None, InputRange(-1.0, 1.0), False)["deq_scale"]
    assert made.dtype is torch.int64 and (made >> 32 == 0).all()
    assert torch.equal(scale_of_bits(made), wanted)


def test_four_bits_stand_two_rows_to_a_byte():
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2).view(2, 16)
    values[1] = values[1].flip(0)
    made = four_bit_tensors(values, torch.tensor([[0.5], [2.0]]), is_split_by_inputs=True)
    packed = made["weight"]
    assert packed.shape == (1, 16)
    assert torch.equal((packed << 4) >> 4, values[:1]) and torch.equal(packed >> 4, values[1:])
    assert made["scale_bias"].shape == (2, 16) and float(made["scale_bias"][0, 0]) == 8 * 0.5 * -8
    whole = four_bit_tensors(values, torch.tensor([[0.5], [2.0]]), is_split_by_inputs=False)["scale_bias"]
    torch.testing.assert_close(whole, made["scale_bias"].sum(1, keepdim=True))


def test_four_bit_steps_lose_less_than_those_of_the_largest_value():
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    weight[:, 0] *= 6
    widest = weight.abs().amax(1, keepdim=True) / 7
    errors = [float((nearest(weight, s, (-8, 7)) * s - weight).norm()) for s in (four_bit_scales(weight), widest)]
    assert errors[0] < 0.8 * errors[1]


def test_gptq_loses_less_than_nearest_on_inputs_that_go_together():
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(160, 160, generator=generator) * torch.logspace(0, -2, 160)
    x = torch.randn(2000, 160, generator=generator) @ mixing
    x[:, 7] = 0  # an input that is never anything but zero
    weight = torch.randn(20, 160, generator=generator)
    scale = row_scales(weight) * 16
    errors = []
    for values in (gptq(weight, scale, x.t() @ x), nearest(weight, scale)):
        assert torch.equal(values, values.round()) and values.abs().max() <= 128
        errors.append(float((x @ (values * scale - weight).t()).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_low_entropy_values_pack_into_four_bits_like_msmodelslims(msmodelslim):
    """Four bits of entropy for normal rows; a row with one far value still fits."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    weight[0, 0] = 60.0
    scale = low_entropy_scales(weight)
    values = nearest(weight, scale)
    assert entropy(values[1:]) < 4.1 and values.abs().max() <= 127
    assert float((values[0, 0] * scale[0] - 60).abs()) < 0.5
    written = tensors_of(msmodelslim("qwen3_vl_w8a8s"))["model.language_model.layers.1.mlp.up_proj.weight"]
    assert entropy(values[1:]) <= entropy(written) + 0.05


def entropy(values):
    counts = Counter(values.flatten().tolist())
    return -sum(n / values.numel() * math.log2(n / values.numel()) for n in counts.values())


def test_a_percentile_leaves_out_as_many_below_as_above():
    x = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(4))
    x[0, 0], x[1, 1] = 50.0, -80.0
    histogram = Histogram(InputRange(-80.0, 50.0))
    histogram.see(x)
    found, exact = histogram.within(99.0), x.flatten().quantile(torch.tensor([0.005, 0.995])).tolist()
    assert exact[0] * (1 + 1 / 256) <= found.low <= exact[0] * (1 - 1 / 256)
    assert exact[1] * (1 - 1 / 256) <= found.high <= exact[1] * (1 + 1 / 256)
    whole = histogram.within(100.0)
    assert (whole.low, whole.high) == (-80.0, 50.0)


def test_a_percentile_is_as_fine_beside_large_outliers_and_for_many_equal_values():
    """Some values are thousands of times the others; and one value occurs more often than float32 counts."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(5)).mul_(0.05)
    x[::2000] = torch.linspace(-1000, 1000, 100)
    histogram = Histogram(InputRange(-1000.0, 1000.0))
    histogram.see(x.view(-1, 100).bfloat16())
    histogram.see(x.view(-1, 100).bfloat16())
    ordered = x.bfloat16().float().repeat(2).sort().values
    for percentile in (99.0, 99.9, 99.94):
        left_out = int((1 - percentile / 100) / 2 * len(ordered))
        low, high = float(ordered[left_out]), float(ordered[-1 - left_out])
        found = histogram.within(percentile)
        assert low * (1 + 1 / 512) <= found.low <= low and high <= found.high <= high * (1 + 1 / 512)
    many = Histogram(InputRange(0.0, 8.0))
    many.see(torch.tensor([1.0]).expand(1 << 24).view(4096, -1))
    many.see(torch.tensor([8.0, 1.0, 1.0]))
    assert int(many.counts.sum()) == (1 << 24) + 3 and many.counts.max() == (1 << 24) + 2
    assert many.within(99.9).high <= 1 + 1 / 512
