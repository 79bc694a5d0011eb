"""Each op of the NPU backend against the CPU reference, on every chip, in its own dtypes and layouts."""

from types import SimpleNamespace

import pytest
import torch
import torch_npu

from emulator.formats import is_nz
from executor.device.npu import soc as chips
from executor.device.npu.linear import FusedSummedLinear, SummedLinear
from executor.device.npu.ops import NpuOps
from executor.device.npu.soc import COMPOSED, SOCS, chip_named, choose
from executor.errors import UserError
from executor.layers.vision import widen
from executor.parallel.groups import Group
from tests.device.inside.npu import A2, A3, CPU, DUO, backend
from tests.emulator.helpers import close, rand

CASES = [(soc, dtype) for soc in SOCS for dtype in SOCS[soc].dtypes]
WIDE = torch.float32


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def npu(request):
    """(backend, dtype)."""
    soc, dtype = request.param
    return backend(soc), dtype


@pytest.fixture(params=[(soc, cache) for soc in (A2, A3) for cache in ("ND", "NZ")] + [(DUO, "NZ")], ids="-".join)
def paged(request):
    """(backend, dtype) for every cache layout of every chip."""
    soc, cache = request.param
    device = backend(soc, cache=cache)
    return device, SOCS[soc].dtypes[0]


@pytest.mark.parametrize("shape", [(1, 96), (5, 512), (7, 3, 128)])
def test_norms(npu, shape) -> None:
    device, dtype = npu
    x, residual, weight = (rand(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape, shape[-1:])))
    close(device.rms_norm(x, weight, 1e-6), CPU.rms_norm(x.float(), weight.float(), 1e-6))
    if len(shape) == 2:
        y, total = device.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, x + residual)
        close(y, CPU.rms_norm(total.float(), weight.float(), 1e-6))
        first, same = device.add_rms_norm(x, None, weight, 1e-6)
        assert torch.equal(same, x) and torch.equal(first, device.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("heads", [(4, 2), (16, 16), (8, 1)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 9])
def test_rope(npu, heads, dim, tokens) -> None:
    device, dtype = npu
    q, k = (rand(tokens, n, dim, dtype=dtype, seed=n) for n in heads)
    half = rand(tokens, dim // 2, dtype=WIDE, seed=3).mul(10)
    cos, sin = (torch.cat((f(half), f(half)), -1).to(dtype) for f in (torch.cos, torch.sin))
    wanted = [CPU.rope(x.float(), cos.float(), sin.float()) for x in (q, k)]
    for form in ("npu_apply_rotary_pos_emb", "npu_rotary_mul", COMPOSED):
        if form == "npu_rotary_mul" and device.soc.name == DUO and dim == 64:
            continue  # the chip's op is for 128 only
        device.calls["rope"] = form
        for got, true in zip(device.rope_pair(q.clone(), k.clone(), cos, sin), wanted, strict=True):
            close(got, true, scale=4)


@pytest.mark.parametrize("columns", [32, 80, 64, 6840])
def test_swiglu(npu, columns) -> None:
    device, dtype = npu
    x = rand(3, columns, dtype=dtype)
    close(device.swiglu(x), CPU.swiglu(x.float()), scale=4)


@pytest.mark.parametrize("sizes", [(48, 32), (17, 5), (96, 1), (1, 64)])
@pytest.mark.parametrize("weight_nz", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(npu, sizes, weight_nz, bias) -> None:
    device, dtype = npu
    device.weight_nz = weight_nz or device.soc.always_nz
    num_in, num_out = sizes
    x, weight = rand(4, num_in, dtype=dtype), rand(num_out, num_in, dtype=dtype, seed=1)
    b = rand(num_out, dtype=dtype, seed=2) if bias else None
    wanted = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
    close(device.prepare_linear(weight, b)(x), wanted, scale=16)


def test_weights_are_in_nz_but_for_single_rows(npu) -> None:
    device, dtype = npu
    from executor.device.npu import layout

    stored = rand(48, 32, dtype=dtype)
    kept = layout.weight(stored, device.weight_nz)
    assert is_nz(kept) and torch.equal(kept, stored.t())
    assert not is_nz(layout.weight(rand(1, 32, dtype=dtype), True))


@pytest.mark.parametrize("tokens", [1, 13, 1025])
@pytest.mark.parametrize("renormalize", [True, False])
def test_experts(npu, tokens, renormalize) -> None:
    device, dtype = npu
    x, logits = rand(tokens, 64, dtype=dtype), rand(tokens, 6, dtype=dtype, seed=1)
    gate_up = rand(6, 96, 64, dtype=dtype, seed=2).mul_(0.1)
    down = rand(6, 64, 48, dtype=dtype, seed=3).mul_(0.1)
    weights, ids = device.gate_topk(logits, 2, renormalize)
    true_weights, true_ids = CPU.gate_topk(logits, 2, renormalize)
    close(weights, true_weights)
    ties = logits.gather(1, ids.long()) == logits.gather(1, true_ids)
    assert bool(ties.all())
    wanted = CPU.prepare_experts(gate_up.float(), down.float())(x.float(), ids.long(), weights.float())
    close(device.prepare_experts(gate_up, down)(x, ids, weights), wanted, scale=8)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_dealt_experts_add_up(npu, tokens, groups) -> None:
    """Ranks that hold some of the experts: their results together are the whole, also where one has no row at all."""
    device, dtype = npu
    x, logits = rand(tokens, 64, dtype=dtype), rand(tokens, 6, dtype=dtype, seed=1)
    gate_up = rand(6, 96, 64, dtype=dtype, seed=2).mul_(0.1)
    down = rand(6, 64, 48, dtype=dtype, seed=3).mul_(0.1)
    weights, ids = device.gate_topk(logits, 2, True)
    whole = device.prepare_experts(gate_up, down)(x, ids, weights)
    size, total = 6 // groups, torch.zeros_like(x, dtype=torch.float32)
    for first in range(0, 6, size):
        mine = slice(first, first + size)
        total += device.prepare_experts(gate_up[mine], down[mine], first, 6)(x, ids, weights).float()
    close(total.to(dtype), whole.float(), scale=8)


def test_sums_are_fused_with_products_over_one_group_only() -> None:
    """The first group's, where the chip has it and the ranks are as many as the kernel takes."""
    groups = [Group(size=size, handle=SimpleNamespace(group_name=str(size))) for size in (16, 2, 4)]
    weight = rand(16, 32, dtype=torch.float16)
    for soc in SOCS:
        device = backend(soc)
        found = [type(device.prepare_summed_linear(weight, None, group)) for group in (*groups, groups[1])]
        fused = FusedSummedLinear if soc == A2 else SummedLinear
        assert found == [SummedLinear, fused, SummedLinear, fused]


def test_counts_may_come_as_int32(npu, monkeypatch) -> None:
    """As another kernel gives them, which some releases take on A2 and A3 for 128 experts of width 2048."""
    device, dtype = npu
    x, ids = rand(5, 32, dtype=dtype), torch.randint(0, 4, (5, 2), dtype=torch.int32)
    weights = torch.rand(5, 2).to(dtype)
    experts = device.prepare_experts(rand(4, 64, 32, dtype=dtype) * 0.1, rand(4, 32, 32, dtype=dtype, seed=3) * 0.1)
    wanted, plain = experts(x, ids, weights), torch_npu.npu_moe_init_routing_v2

    def other_kernel(*args, **options):
        rows, places, counts, _ = plain(*args, **options)
        return rows, places, counts.int(), counts.int()

    monkeypatch.setattr(torch_npu, "npu_moe_init_routing_v2", other_kernel)
    assert torch.equal(experts(x, ids, weights), wanted)


def test_all_tokens_to_one_expert(npu) -> None:
    device, dtype = npu
    x, ids = rand(5, 32, dtype=dtype), torch.full((5, 1), 3, dtype=torch.int32)
    gate_up, down = rand(4, 64, 32, dtype=dtype, seed=2), rand(4, 32, 32, dtype=dtype, seed=3)
    weights = torch.ones(5, 1, dtype=dtype)
    wanted = CPU.prepare_experts(gate_up.float(), down.float())(x.float(), ids.long(), weights.float())
    assert torch.isfinite(wanted).all()
    got = device.prepare_experts(gate_up * 0.1, down * 0.1)(x, ids, weights)
    true = CPU.prepare_experts(gate_up.float() * 0.1, down.float() * 0.1)(x.float(), ids.long(), weights.float())
    close(got, true, scale=8)


ROWS = {
    "one token": ([1], [1]),
    "prefill": ([5, 16, 33], [5, 16, 33]),
    "decode": ([1, 1, 1, 1], [1, 16, 17, 90]),
    "block boundary": ([16, 1, 17], [32, 32, 48]),
    "verify": ([2, 16, 4], [40, 17, 4]),
    "mixed": ([1, 7, 1, 20], [33, 7, 64, 50]),
}


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (16, 1)])
@pytest.mark.parametrize("case", ROWS)
def test_paged_attention(paged, heads, case) -> None:
    """History is written first, then the step's tokens; blocks lie in any order."""
    device, dtype = paged
    q_lens, kv_lens = ROWS[case]
    num_heads, num_kv_heads = heads
    block_size, dim, scale = 16, 128, 0.09
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(-(-kv_len // block_size))] for kv_len in kv_lens]
    (cache,) = device.kv_cache(1, 64, block_size, num_kv_heads, dim, dtype)
    (true,) = CPU.kv_cache(1, 64, block_size, num_kv_heads, dim, WIDE)

    def written(first: list[int], last: list[int], seed: int) -> None:
        slots = [b[i // block_size] * block_size + i % block_size
                 for b, low, high in zip(tables, first, last, strict=True) for i in range(low, high)]  # fmt: skip
        if not slots:
            return
        k, v = (rand(len(slots), num_kv_heads, dim, dtype=dtype, seed=seed + i) for i in (0, 1))
        device.kv_write(k, v, cache, torch.tensor(slots, dtype=device.slot_dtype))
        CPU.kv_write(k.float(), v.float(), true, torch.tensor(slots))

    starts = [kv - q for q, kv in zip(q_lens, kv_lens, strict=True)]
    written([0] * len(starts), starts, 10)
    written(starts, kv_lens, 20)
    q = rand(sum(q_lens), num_heads, dim, dtype=dtype)
    got = device.paged_attention(q, cache, device.prepare_attention(q_lens, kv_lens, tables, block_size), scale)
    step = CPU.prepare_attention(q_lens, kv_lens, tables, block_size)
    close(got, CPU.paged_attention(q.float(), true, step, scale), scale=2)


@pytest.mark.parametrize("lengths", [[1], [16, 16, 4], [64] * 5 + [30, 2]])
@pytest.mark.parametrize("dim", [64, 128])
def test_varlen_attention(npu, lengths, dim) -> None:
    device, dtype = npu
    q, k, v = (rand(sum(lengths), 3, dim, dtype=dtype, seed=i) for i in range(3))
    wanted = CPU.varlen_attention(q.float(), k.float(), v.float(), lengths, 0.1)
    close(device.varlen_attention(q, k, v, lengths, 0.1), wanted, scale=2)


def test_more_segments_than_a_call_takes(npu) -> None:
    device, dtype = npu
    lengths = [1, 2] * 2100
    q, k, v = (rand(sum(lengths), 1, 64, dtype=dtype, seed=i) for i in range(3))
    wanted = CPU.varlen_attention(q.float(), k.float(), v.float(), lengths, 0.1)
    close(device.varlen_attention(q, k, v, lengths, 0.1), wanted, scale=2)


@pytest.mark.parametrize("dim", [72, 80])
def test_widened_heads_attend_as_before(npu, dim) -> None:
    """Zeros after each half: rotation, scores and values are those of the narrow head."""
    device, dtype = npu
    tokens, heads, wide = 12, 2, device.vision_head_dim(dim)
    assert wide == 128
    q, k, v = (rand(tokens, heads, dim, dtype=dtype, seed=i) for i in range(3))
    angles = rand(tokens, dim // 2, dtype=WIDE, seed=4)
    narrow = [torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin)]
    angles = torch.nn.functional.pad(angles, (0, (wide - dim) // 2))
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))

    def widened(x):
        return widen(x.flatten(1).t(), dim, wide).t().unflatten(1, (heads, wide)).contiguous()

    turned = device.rope_pair(widened(q), widened(k), cos, sin)
    got = device.varlen_attention(*turned, widened(v), [5, 7], dim**-0.5).unflatten(1, (heads, 2, wide // 2))
    qt, kt = (CPU.rope(x.float(), *narrow) for x in (q, k))
    wanted = CPU.varlen_attention(qt, kt, v.float(), [5, 7], dim**-0.5)
    close(got[..., : dim // 2].flatten(1), wanted, scale=8)
    assert not got[..., dim // 2 :].any()


def test_the_installed_release_decides(caplog) -> None:
    hidden = {"npu_apply_rotary_pos_emb", "npu_swiglu"}
    chosen = choose(SOCS[A2], lambda call: call not in hidden)
    assert (chosen["rope"], chosen["swiglu"]) == ("npu_rotary_mul", COMPOSED)
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="npu_fused_infer_attention_score_v2"):
        choose(SOCS[A3], lambda call: "fused_infer" not in call)


def test_composed_forms_equal_the_fused(npu) -> None:
    device, dtype = npu
    composed = backend(device.soc.name)
    composed.calls |= {op: COMPOSED for op, _, _, _, calls in chips.TABLE if COMPOSED in calls}
    x, residual, weight = (rand(4, 64, dtype=dtype, seed=i) for i in range(3))
    for one, other in zip(
        device.add_rms_norm(x, residual, weight[0], 1e-6), composed.add_rms_norm(x, residual, weight[0], 1e-6),
        strict=True,
    ):  # fmt: skip
        close(one, other.float(), scale=2)
    close(device.swiglu(x), composed.swiglu(x).float(), scale=2)
    for one, other in zip(device.gate_topk(x, 3, True), composed.gate_topk(x, 3, True), strict=True):
        close(one, other, scale=2)


@pytest.mark.parametrize(
    "name, soc",
    [("Ascend910B4", A2), ("Ascend910B2C", A2), ("Ascend910_9391", A3), ("Ascend310P3", DUO), ("Ascend910A", None)],
)
def test_chips_by_their_runtime_names(name, soc) -> None:
    found = chip_named(name)
    assert (found.name if found else None) == soc


def test_communicators_have_buffers_by_use(monkeypatch) -> None:
    """HCCL's options are made as torch_npu takes them; the user's own size is left alone."""
    emulated = backend(A3)
    device = NpuOps(SOCS[A3], torch.device("npu", 0))
    assert device.collectives == "hccl"
    monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    assert device.group_options(100).hccl_config == {"hccl_buffer_size": 100}
    monkeypatch.setenv("HCCL_BUFFSIZE", "300")
    assert device.group_options(100) is None
    monkeypatch.delenv("HCCL_BUFFSIZE")
    assert (emulated.collectives, emulated.group_options(100)) == ("gloo", None), "an emulated chip talks over gloo"
