"""The CPU reference against plain definitions of each op; its linears are in test_cpu_linear.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from executor.device.cpu import attention, ops
from executor.device.cpu.capability import Capability
from executor.device.cpu.linear import Expanded
from executor.device.cpu.ops import CpuOps
from executor.device.cpu.tiled_attention import tiled_attention

OPS = CpuOps()
PLAIN = CpuOps(Capability("other", "DEFAULT", frozenset(), packs_fp16=False))


def naive_causal(q, k, v, scale):
    """Attention of the last len(q) positions over all of k, in fp64: q [n, H, D], k, v [L, K, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k) * scale
    allowed = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
    probabilities = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", probabilities, v).flatten(1)


@pytest.mark.parametrize(
    "tables",
    [[[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]], [[5, 0, 3], [2], [4, 1], [9, 6, 8, 7]]],
    ids=["consecutive", "spread"],
)
def test_paged_attention_of_mixed_rows(tables):
    """A decode row, a whole prompt, and few and many queries behind a prefix, in one step."""
    torch.manual_seed(0)
    block_size, heads, kv_heads, dim = 16, 6, 2, 24
    q_lens, kv_lens = [1, 9, 11, 40], [40, 9, 30, 60]
    (cache,) = OPS.kv_cache(1, 10, block_size, kv_heads, dim, torch.float32)
    keys, values = [], []
    for table, length in zip(tables, kv_lens, strict=True):
        keys.append(torch.randn(length, kv_heads, dim))
        values.append(torch.randn(length, kv_heads, dim))
        places = torch.arange(length)
        slots = torch.tensor(table)[places // block_size] * block_size + places % block_size
        OPS.kv_write(keys[-1], values[-1], cache, slots)
    q = torch.randn(sum(q_lens), heads, dim)
    got = OPS.paged_attention(q, cache, OPS.prepare_attention(q_lens, kv_lens, tables, block_size), 0.2)
    wanted = [naive_causal(*x, 0.2) for x in zip(q.split(q_lens), keys, values, strict=True)]
    torch.testing.assert_close(got, torch.cat(wanted).float(), atol=1e-5, rtol=1e-5)


def filled(cache, tables, lengths, block_size):
    """Keys and values of rows, written to a cache whose other slots are not numbers."""
    for each in (cache.k, cache.v):
        each.fill_(float("nan"))
    shape = cache.k.shape[2:]
    keys, values = ([torch.randn(length, *shape) for length in lengths] for _ in range(2))
    for table, length, k, v in zip(tables, lengths, keys, values, strict=True):
        places = torch.arange(length)
        slots = torch.tensor(table)[places // block_size] * block_size + places % block_size
        OPS.kv_write(k, v, cache, slots)
    return keys, values


@pytest.mark.parametrize("order", ["consecutive", "spread"])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "num_together"),
    [
        ([1] * 6, [3, 40, 17, 64, 1, 64], [6]),
        ([1] * 5, [20] * 5, [5]),
        ([1] * 3, [20] * 3, []),
        ([1] * 12, [250] * 12, [8, 4]),
        ([1] * 10, [250] * 10, [8]),
        ([1, 1, 7, 1, 300, 1, 1, 1], [9, 30, 7, 400, 300, 12, 1, 256], [5]),
    ],
)
def test_short_decode_rows_are_attended_together(order, q_lens, kv_lens, num_together):
    """Each reads its own tokens, whatever lies in the cache behind them; as a step further on, and as one made anew."""
    torch.manual_seed(0)
    block_size, heads, kv_heads, dim = 16, 6, 2, 24
    sizes = [length // block_size + 1 for length in kv_lens]
    blocks = list(range(sum(sizes))) if order == "consecutive" else torch.randperm(sum(sizes)).tolist()
    tables = [[blocks.pop(0) for _ in range(size)] for size in sizes]
    (cache,) = OPS.kv_cache(1, sum(sizes), block_size, kv_heads, dim, torch.float32)
    keys, values = filled(cache, tables, kv_lens, block_size)
    q = torch.randn(sum(q_lens), heads, dim)
    wanted = torch.cat([naive_causal(*x, 0.2) for x in zip(q.split(q_lens), keys, values, strict=True)]).float()
    step = OPS.prepare_attention(q_lens, kv_lens, tables, block_size)
    assert [some.shape[0] for some in step.together] == num_together
    torch.testing.assert_close(OPS.paged_attention(q, cache, step, 0.2), wanted, atol=1e-5, rtol=1e-5)
    if set(q_lens) == {1} and min(kv_lens) > 1:
        walked = OPS.prepare_attention(q_lens, [length - min(kv_lens) + 1 for length in kv_lens], tables, block_size)
        for back in reversed(range(min(kv_lens) - 1)):
            lengths = [length - back for length in kv_lens]
            entered = [row for row, length in enumerate(lengths) if length % block_size == 1]
            walked = OPS.advance_attention(walked, lengths, tables, block_size, entered)
        torch.testing.assert_close(OPS.paged_attention(q, cache, walked, 0.2), wanted, atol=1e-5, rtol=1e-5)


def test_rows_that_grow_too_long_are_attended_apart():
    torch.manual_seed(0)
    block_size, kv_heads, dim, most = 16, 2, 24, 270
    tables = [list(range(row * 17, row * 17 + 17)) for row in range(5)]
    (cache,) = OPS.kv_cache(1, 85, block_size, kv_heads, dim, torch.float32)
    kv_lens = [most - 12 * row for row in range(5)]
    keys, values = filled(cache, tables, kv_lens, block_size)
    q = torch.randn(5, 6, dim)
    step = OPS.prepare_attention([1] * 5, [length - 40 for length in kv_lens], tables, block_size)
    assert len(step.together) == 1
    for back in reversed(range(40)):
        lengths = [length - back for length in kv_lens]
        entered = [row for row, length in enumerate(lengths) if length % block_size == 1]
        step = OPS.advance_attention(step, lengths, tables, block_size, entered)
    assert not step.together and len(step.alone) == 5, "two have more than 256 tokens, and three are too few"
    wanted = [naive_causal(*x, 0.2) for x in zip(q.split(1), keys, values, strict=True)]
    torch.testing.assert_close(
        OPS.paged_attention(q, cache, step, 0.2), torch.cat(wanted).float(), atol=1e-5, rtol=1e-5
    )


def test_engines_beside_each_other_share_no_memory():
    """Of one device, each in a thread: rows that are attended together, and weights that are made fp32 in blocks."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200).bfloat16()
    expanded = Expanded(weight, None, OPS.scratch)
    jobs = []
    for length in (200, 230):
        (cache,) = OPS.kv_cache(1, 64, 16, 2, 24, torch.float32)
        cache.k.normal_(), cache.v.normal_()
        tables = [list(range(15 * row, 15 * row + 15)) for row in range(4)]
        step, q = OPS.prepare_attention([1] * 4, [length] * 4, tables, 16), torch.randn(4, 6, 24)
        x = torch.randn(7, 200)
        jobs.append(lambda q=q, cache=cache, step=step, x=x: (OPS.paged_attention(q, cache, step, 0.2), expanded(x)))
    wanted = [job() for job in jobs]

    def repeated(number):
        return all(torch.equal(*pair) for _ in range(150) for pair in zip(jobs[number](), wanted[number], strict=True))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeated, range(2))) == [True, True]


AVX512 = CpuOps(Capability("avx512", "AVX512", frozenset((torch.bfloat16,)), packs_fp16=True))


def relative(x, wanted):
    return float((x.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1.0, 8.0])
@pytest.mark.parametrize(("q_len", "kv_len"), [(600, 600), (70, 700), (513, 1000)])
def test_tiles_of_bfloat16_lose_about_as_little_as_the_fused_kernel(monkeypatch, q_len, kv_len, size):
    """Of prompts, chunks behind cached tokens, and segments; scores of up to 40 have no coarser steps than small ones.

    At most twice its error."""
    torch.manual_seed(0)
    block_size, heads, kv_heads, dim = 16, 6, 2, 40
    blocks = -(-kv_len // block_size)
    (cache,) = OPS.kv_cache(1, blocks, block_size, kv_heads, dim, torch.bfloat16)
    k, v = (torch.randn(kv_len, kv_heads, dim).bfloat16() for _ in range(2))
    OPS.kv_write(k, v, cache, torch.arange(kv_len))
    q = (torch.randn(q_len, heads, dim) * size).bfloat16()
    step = OPS.prepare_attention([q_len], [kv_len], [list(range(blocks))], block_size)
    used = []
    for module in (attention, ops):
        monkeypatch.setattr(module, "tiled_attention", lambda *x, **y: used.append(1) or tiled_attention(*x, **y))
    wanted = naive_causal(q, k, v, dim**-0.5)
    fused, tiled = (device.paged_attention(q, cache, step, dim**-0.5) for device in (PLAIN, AVX512))
    assert used and relative(tiled, wanted) < max(0.004, 2 * relative(fused, wanted))
    same = (x.repeat_interleave(3, 1)[:q_len] for x in (k, v))
    lengths = [q_len] if q_len < 600 else [8, q_len - 8]
    packed = (q, *same)
    wanted = PLAIN.varlen_attention(*(x.double() for x in packed), lengths, dim**-0.5)
    fused, tiled = (device.varlen_attention(*packed, lengths, dim**-0.5) for device in (PLAIN, AVX512))
    assert len(used) == 1 + (max(lengths) >= 512) and relative(tiled, wanted) < max(0.004, 2 * relative(fused, wanted))


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [4, 4, 7, 1, 7, 7]])
def test_varlen_attention_stays_inside_segments(lengths):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 3, 10) for _ in range(3))
    wanted = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("nhd,lhd->hnl", qs, ks) * 0.3
        wanted.append(torch.einsum("hnl,lhd->nhd", scores.softmax(-1), vs).flatten(1))
    torch.testing.assert_close(OPS.varlen_attention(q, k, v, lengths, 0.3), torch.cat(wanted), atol=1e-5, rtol=1e-5)


def test_rope_turns_pairs_of_the_two_halves():
    torch.manual_seed(0)
    x, angles = torch.randn(4, 2, 6), torch.randn(4, 3)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(4, 1, 3), angles.unsqueeze(1))
    before = x.clone()
    torch.testing.assert_close(OPS.rope(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 32), (5, 32), (32,), (32,)))
    normed, total = OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    wanted = F.rms_norm(total.float(), (32,), weight.float(), 1e-6)
    torch.testing.assert_close(normed.float(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    assert torch.equal(OPS.layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (32,), weight, bias, 1e-6))


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_are_a_weighted_sum_of_gated_mlps(renormalize):
    torch.manual_seed(0)
    num_experts, inner, hidden, tokens = 5, 7, 12, 9
    gate_up, down = torch.randn(num_experts, 2 * inner, hidden), torch.randn(num_experts, hidden, inner)
    x, logits = torch.randn(tokens, hidden), torch.randn(tokens, num_experts)
    weights, ids = OPS.gate_topk(logits, 2, renormalize)
    wanted = torch.zeros(tokens, hidden)
    for token in range(tokens):
        probabilities = logits[token].softmax(-1)
        best = probabilities.topk(2)
        scale = best.values / best.values.sum() if renormalize else best.values
        for expert, share in zip(best.indices.tolist(), scale, strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            wanted[token] += share * (down[expert] @ (F.silu(gate) * up))
    got = OPS.prepare_experts(gate_up, down)(x, ids, weights)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
