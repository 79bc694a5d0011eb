"""The recorder, hidden ops, and the forms of ops in other torch_npu releases."""

import pytest
import torch
import torch_npu

from emulator import releases
from emulator.limits import LimitError
from emulator.record import Call, Recorder, hide
from tests.emulator.helpers import BF16, rand


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_calls_are_recorded_with_their_arguments(a2, device) -> None:
    x, weight = rand(2, 32).to(device), rand(32).to(device)
    with Recorder() as seen:
        torch_npu.npu_rms_norm(x + 1, weight, epsilon=1e-5)
        torch_npu.npu_swiglu(x)
    assert [call.op for call in seen.calls] == ["npu::npu_rms_norm", "npu::npu_swiglu"]
    bound = seen.calls[0].bound()
    assert bound["gamma"] is weight and bound["epsilon"] == 1e-5
    assert seen.calls[1].bound()["dim"] == -1
    assert seen.counts == {"npu_rms_norm": 1, "npu_swiglu": 1} and seen.kernels["aten::add"] == 1


def test_limits_hold_on_meta_tensors(a2, duo) -> None:
    x = torch.empty(2, 64, dtype=BF16, device="meta")
    with Recorder():
        torch_npu.npu_swiglu(x)
    with Recorder(check=True), pytest.raises(LimitError, match="npu_swiglu on Atlas 300I DUO.*float16"):
        torch_npu.npu_swiglu(x)


def test_a_traced_step_counts_work_and_collects_what_is_wrong(duo) -> None:
    x = torch.empty(2, 48, dtype=BF16, device="meta")
    with Recorder(check="collect") as seen:
        y = torch_npu.npu_swiglu(x.view(4, 24).view(2, 48))
        torch_npu.npu_scatter_pa_kv_cache(*[x.view(2, 3, 16)] * 2, *[x.view(1, 1, 6, 16)] * 2, x[:, 0].int())
        y.t().contiguous()
    assert [v.partition(":")[0] for v in seen.violations] == [
        "npu_swiglu on Atlas 300I DUO (atlas_300i_duo)",
        "npu_scatter_pa_kv_cache on Atlas 300I DUO (atlas_300i_duo)",
    ]
    assert seen.kernels["npu::npu_swiglu"] == 1 and seen.kernels["aten::clone"] == 1 and not seen.kernels["aten::view"]
    assert seen.moved_bytes > x.numel() * 2 * 1.5


def test_ops_can_be_hidden(a2) -> None:
    with hide("npu_swiglu", "_npu_paged_attention"):
        assert not hasattr(torch.ops.npu, "npu_swiglu") and not hasattr(torch_npu, "npu_swiglu")
        assert not hasattr(torch.ops.atb, "_npu_paged_attention")
        assert hasattr(torch.ops.npu, "npu_rms_norm") and torch.ops.npu.npu_rms_norm is not None
    assert hasattr(torch.ops.npu, "npu_swiglu") and hasattr(torch_npu, "npu_swiglu")
    assert torch_npu.npu_swiglu(rand(2, 32)).shape == (2, 16)


def test_forms_of_other_releases() -> None:
    assert not releases.forms("npu_qkv_rms_norm_rope_cache", "2.6.0.post5")
    assert releases.forms("npu_qkv_rms_norm_rope_cache", "2.7.1.post11")
    assert "BSH" in releases.forms("npu_apply_rotary_pos_emb", "2.8.0.post5")[0]
    assert "BSND" in releases.forms("npu_apply_rotary_pos_emb", "2.13.0")[0]


def test_calls_are_bound_to_other_releases(a2) -> None:
    x = rand(2, 32)
    plain = Call("npu::npu_add_rms_norm_dynamic_quant", (x, x, x[0]), {"epsilon": 1e-6})
    newer = Call("npu::npu_add_rms_norm_dynamic_quant", (x, x, x[0]), {"output_mask": None})
    hashed = Call("npu::npu_moe_gating_top_k", (x,), {"k": 2, "input_ids": None})
    for release in releases.SUPPORTED:
        assert not releases.misfit(plain, release)
    assert "output_mask" in releases.misfit(newer, "2.8.0.post5") and not releases.misfit(newer, "2.14.0")
    assert "input_ids" in releases.misfit(hashed, "2.8.0.post5") and not releases.misfit(hashed, "2.7.1.post11")
    assert "not in torch_npu" in releases.misfit(Call("atb::_npu_flash_attention_v3", (), {}), "2.8.0.post5")
    rows, index = rand(4, 32), torch.arange(4, dtype=torch.int32)
    back = Call("npu::npu_moe_finalize_routing", (rows, None, None, None, rand(2, 2), index, None, 2), {})
    assert not any(releases.misfit(back, release) for release in releases.SUPPORTED)
    assert "8 positional" in releases.misfit(Call(back.op, (*back.args, 2), {}), "2.8.0.post5")
    assert "needs the argument gamma" in releases.misfit(Call("npu::npu_rms_norm", (x,), {}), "2.14.0")
