"""Experts: each op against a loop, and the whole chain against the CPU backend; sampling's filter."""

import pytest
import torch
import torch_npu

from emulator.formats import NZ
from emulator.limits import LimitError
from executor.device.cpu.ops import CpuOps
from tests.emulator.helpers import BF16, FP16, FP32, close, like_meta, rand

CPU = CpuOps()
E, K, N, INNER = 8, 3, 32, 48


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("rows", [1, 9])
def test_gating(a2, dtype, rows) -> None:
    x = rand(rows, E, dtype=dtype)
    wanted, ids = CPU.gate_topk(x.float(), K, False)
    weights, experts, order = like_meta(torch_npu.npu_moe_gating_top_k_softmax, x, None, K)
    close(weights, wanted)
    assert torch.equal(experts.long(), ids) and order.tolist() == [
        [i + j * rows for j in range(K)] for i in range(rows)
    ]
    weights, experts, _ = like_meta(torch_npu.npu_moe_gating_top_k, x, k=K, norm_type=0)
    close(weights, wanted)
    assert torch.equal(experts.long(), ids)
    renormed, experts, _ = like_meta(torch_npu.npu_moe_gating_top_k_softmax_v2, x, k=K, renorm=1)
    close(renormed, CPU.gate_topk(x.float(), K, True)[0], 2)
    assert torch.equal(experts.long(), ids)


def test_gating_of_finished_rows_and_ties(a2) -> None:
    x = torch.zeros(2, E)
    _, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(x, torch.tensor([False, True]), K)
    assert experts.tolist() == [[0, 1, 2], [E, E, E]]


def test_sigmoid_gating_in_groups(a2) -> None:
    x, bias = rand(4, E, dtype=FP32), rand(E, dtype=FP32, seed=1)
    weights, experts, norm = torch_npu.npu_moe_gating_top_k(
        x,
        k=2,
        bias=bias,
        k_group=1,
        group_count=2,
        group_select_mode=1,
        norm_type=1,
        out_flag=True,
        routed_scaling_factor=2.0,
    )
    scores = x.sigmoid()
    for row in range(4):
        halves = (scores[row] + bias).view(2, -1)
        best = int(halves.topk(2, -1).values.sum(-1).argmax())
        ids = halves[best].topk(2).indices + best * 4
        assert experts[row].tolist() == ids.tolist()
        close(weights[row], 2 * scores[row, ids] / scores[row, ids].sum())
    assert torch.equal(norm, scores)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("active", [(0, E), (2, 5)])
def test_init_routing(a2, kind, active) -> None:
    x = rand(5, N)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(5)]).to(torch.int32)
    expanded, index, counts, _ = like_meta(
        torch_npu.npu_moe_init_routing_v2, x, ids, expert_num=E, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=list(active), row_idx_type=kind,
    )  # fmt: skip
    flat = ids.flatten().tolist()
    assert counts.tolist() == [flat.count(e) for e in range(*active)]
    order = [i for e in range(*active) for i, f in enumerate(flat) if f == e]
    assert torch.equal(expanded[: len(order)], x[[i // K for i in order]])
    assert expanded[len(order) :].isnan().all(), "rows of other ranks' experts are undefined"
    if kind == 0:
        assert index.tolist() == [order.index(i) if i in order else -1 for i in range(5 * K)]
    else:
        assert index[: len(order)].tolist() == order


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("active", [0, 7])
def test_init_routing_of_duo(duo, kind, active) -> None:
    """Its kernel gives running totals in int32, whatever is asked, and fills nothing into the fourth output."""
    x, ids = rand(5, N, dtype=FP16), torch.stack([torch.randperm(E - 1)[:K] for _ in range(5)]).to(torch.int32)
    expanded, index, totals, fourth = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=active, expert_num=E, expert_tokens_num_type=kind, expert_tokens_num_flag=True
    )
    flat = ids.flatten().tolist()
    order = sorted(range(5 * K), key=lambda i: flat[i])
    kept = order[: active or 5 * K]
    assert torch.equal(expanded, x[[i // K for i in kept]])
    assert index.dtype == torch.int32 and index.tolist() == [order.index(i) for i in range(5 * K)]
    assert totals.dtype == torch.int32 and totals.tolist() == [sum(f <= e for f in flat) for e in range(E)]
    assert fourth.dtype == torch.int32 and fourth.shape == (E,)


@pytest.mark.parametrize("wrong, message", [
    ({"active_expert_range": [0, E - 1]}, "active_expert_range is not handed on"),
    ({"active_expert_range": [2, E]}, "active_expert_range is not handed on"),
    ({"row_idx_type": 1}, "row_idx_type is not handed on"),
    ({"quant_mode": 1}, "quant_mode is not handed on"),
    ({"drop_pad_mode": 1, "expert_capacity": 4}, "drop_pad_mode is not handed on"),
    ({"scale": torch.ones(4)}, "scale must be None"),
    ({"expert_tokens_num_type": 2}, "expert_tokens_num_type must be 0"),
    ({"active_num": -1}, "active_num must be 0"),
    ({"x": torch.ones(4, N, dtype=BF16)}, "x must be float16 or float32"),
    ({"x": torch.ones(4, N, dtype=torch.int8)}, "x must be float16 or float32"),
    ({"expert_num": 3}, r"expert ids must lie in \[0, 3\)"),
])  # fmt: skip
def test_what_duo_does_not_hand_on_is_refused(duo, wrong, message) -> None:
    x, ids = torch.ones(4, N, dtype=FP16), torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]], dtype=torch.int32)
    call = {"active_num": 0, "expert_num": E, "expert_tokens_num_type": 0, "expert_tokens_num_flag": True} | wrong
    with pytest.raises(LimitError, match=f"npu_moe_init_routing_v2 on Atlas 300I DUO.*{message}"):
        torch_npu.npu_moe_init_routing_v2(call.pop("x", x), ids, **call)


def test_the_form_of_a2_does_not_run_on_duo(duo) -> None:
    """Counts of all experts, given on as counts: the totals that come instead are int32, which no product takes."""
    x, ids, w = rand(4, N, dtype=FP16), torch.zeros(4, 1, dtype=torch.int32), rand(E, N, 16, dtype=FP16)
    rows, _, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, ids, active_num=4, expert_num=E, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, E], row_idx_type=0,
    )  # fmt: skip
    call = {"split_item": 2, "group_type": 0, "group_list_type": 1}
    with pytest.raises(LimitError, match="group_list must be int64; got int32"):
        torch_npu.npu_grouped_matmul([rows], [w], group_list=counts, **call)
    with pytest.raises(LimitError, match="must add up to x's 4 rows"):
        torch_npu.npu_grouped_matmul([rows], [w], group_list=counts.long(), **call)
    call["group_list_type"] = 0
    close(
        torch_npu.npu_grouped_matmul([rows], [w], group_list=counts.long(), **call)[0], rows.float() @ w[0].float(), 4
    )


def test_init_routing_keeps_the_first_rows(a2) -> None:
    x, ids = rand(4, N), torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]], dtype=torch.int32)
    common = {
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
    }
    expanded, index, counts, scale = like_meta(torch_npu.npu_moe_init_routing_v2, x, ids, active_num=3, **common)
    assert torch.equal(expanded, x[[0, 2, 0]]) and counts.tolist() == [2, 3, 2, 1]
    assert index.tolist() == [0, 2, -1, -1, -1, 1, -1, -1] and len(scale) == 3


def test_init_routing_quantizes(a2) -> None:
    x, ids = rand(4, N), torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]], dtype=torch.int32)
    common = {
        "expert_num": 4,
        "expert_tokens_num_type": 2,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
    }
    y, index, pairs, scale = like_meta(torch_npu.npu_moe_init_routing_v2, x, ids, quant_mode=1, **common)
    back = (y * scale[:, None])[index.long()].view(4, 2, N)
    assert (back - x.float().unsqueeze(1)).abs().max() <= scale.max() * 0.51
    assert pairs.tolist() == [[0, 2], [1, 3], [2, 2], [3, 1]]


@pytest.mark.parametrize("mode", [0, 2])
def test_finalize_routing(a2, mode) -> None:
    rows, experts = rand(5 * K, N), torch.randint(0, E, (5, K), dtype=torch.int32)
    scales, bias, skip = rand(5, K, seed=1), rand(E, N, seed=2), rand(5, N, seed=3)
    index = torch.randperm(5 * K).to(torch.int32)
    got = like_meta(torch_npu.npu_moe_finalize_routing, rows, skip, None, bias, scales, index, experts, mode)
    wanted = skip.float().clone()
    for i in range(5):
        for j in range(K):
            source = int(index[i + j * 5] if mode == 0 else index[i * K + j])
            wanted[i] += scales[i, j].float() * (rows[source].float() + bias[int(experts[i, j])].float())
    close(got, wanted, 2)
    with pytest.raises(LimitError, match=r"must lie in \[0, 15\)"):
        torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, index - 1, None, mode)


@pytest.mark.parametrize("mode", [1, 3])
def test_finalize_routing_without_what_was_dropped(a2, mode) -> None:
    rows, scales = rand(E, 4, N), rand(5, K, seed=1)
    index = torch.randperm(E * 4)[: 5 * K].to(torch.int32)
    index[::3] = -1
    got = like_meta(torch_npu.npu_moe_finalize_routing, rows, None, None, None, scales, index, None, mode)
    wanted = torch.zeros(5, N)
    for i in range(5):
        for j in range(K):
            source = int(index[i + j * 5] if mode == 1 else index[i * K + j])
            if source >= 0:
                wanted[i] += scales[i, j].float() * rows[source // 4, source % 4].float()
    close(got, wanted, 2)
    with pytest.raises(LimitError, match=r"must lie in \[-1, "):
        torch_npu.npu_moe_finalize_routing(rows, None, None, None, scales, index - 1, None, mode)
    with pytest.raises(LimitError, match="must have 3 dimensions"):
        torch_npu.npu_moe_finalize_routing(rows.flatten(0, 1), None, None, None, scales, index, None, mode)


def test_permute_and_back(a2) -> None:
    x, ids = rand(6, N), torch.randint(0, E, (6, K))
    permuted, index = like_meta(torch_npu.npu_moe_token_permute, x, ids)
    assert torch.equal(permuted[index.long()], x.repeat_interleave(K, 0))
    order = ids.flatten()[index.long().argsort()]
    assert (order.diff() >= 0).all()
    probs = torch.rand(6, K, dtype=FP32)
    got = like_meta(torch_npu.npu_moe_token_unpermute, permuted, index, probs)
    close(got, x.float() * probs.sum(1, keepdim=True), 2)


@pytest.mark.parametrize("list_type", [0, 1])
@pytest.mark.parametrize("soc,dtype", [("a2", BF16), ("a2", FP16), ("duo", FP16)])
def test_grouped_matmul(request, soc, dtype, list_type) -> None:
    request.getfixturevalue(soc)
    counts = torch.tensor([2, 0, 3, 1])
    x, w = rand(6, N, dtype=dtype), rand(4, N, INNER, dtype=dtype, seed=1)
    groups = counts if list_type else counts.cumsum(0)
    call = {"group_list": groups, "split_item": 2, "group_type": 0, "group_list_type": list_type}
    got = torch_npu.npu_grouped_matmul([x], [w], **call)[0]
    wanted = torch.cat([rows.float() @ w[i].float() for i, rows in enumerate(x.split(counts.tolist()))])
    close(got, wanted, 4)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(torch_npu.npu_grouped_matmul([x], [transposed], **call)[0], got)


def test_grouped_matmul_quantized(a2) -> None:
    counts = torch.tensor([2, 0, 3])
    x, w = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((5, N), (3, N, 16)))
    scale, tokens = torch.rand(3, 16) * 1e-3, torch.rand(5) + 0.5
    call = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    product = torch.cat([rows.double() @ w[i].double() for i, rows in enumerate(x.split(counts.tolist()))])
    raw = torch_npu.npu_grouped_matmul([x], [w], output_dtype=torch.int32, **call)[0]
    assert torch.equal(raw, product.to(torch.int32))
    got = torch_npu.npu_grouped_matmul([x], [w], scale=[scale], per_token_scale=[tokens], output_dtype=FP16, **call)[0]
    spread = scale.repeat_interleave(counts, 0)
    close(got, product * spread * tokens[:, None], 2)


@pytest.mark.parametrize("split", [0, 3])
@pytest.mark.parametrize("form", ["one x", "many x"])
def test_grouped_matmul_of_lists(a2, form, split) -> None:
    weights = [rand(N, 16, seed=s) for s in range(3)]
    parts = [rand(n, N, seed=n) for n in (2, 1, 4)]
    x = parts if form == "many x" else [torch.cat(parts)]
    got = torch_npu.npu_grouped_matmul(x, weights, group_list=[2, 3, 7], split_item=split)
    wanted = [p.float() @ w.float() for p, w in zip(parts, weights, strict=True)]
    for mine, theirs in zip(got, wanted if split == 0 else [torch.cat(wanted)], strict=True):
        close(mine, theirs, 4)
    if form == "many x" and split == 0:
        plain = torch_npu.npu_grouped_matmul(x, weights, group_type=-1, split_item=0)
        assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_lists_hold_each_weight_against_its_own_scales(a2) -> None:
    """Weights of a list may differ in width: so do their scales, biases and offsets."""
    x = [torch.randint(-128, 128, (n, N), dtype=torch.int8) for n in (2, 3)]
    w = [torch.randint(-128, 128, (N, n), dtype=torch.int8) for n in (16, 32)]
    scale = [torch.rand(n) * 1e-3 for n in (16, 32)]
    packed = [torch_npu.npu_trans_quant_param(s) for s in scale]
    bias = [torch.randint(-50, 50, (n,), dtype=torch.int32) for n in (16, 32)]
    tokens = [torch.rand(n) + 0.5 for n in (2, 3)]
    call = {"group_type": -1, "split_item": 0}
    got = torch_npu.npu_grouped_matmul(x, w, scale=packed, bias=bias, **call)
    for y, a, b, p, extra in zip(got, x, w, packed, bias, strict=True):
        wanted = (a.double() @ b.double() + extra) * (p & 0xFFFFFFFF).to(torch.int32).view(FP32)
        assert torch.equal(y, wanted.float().round().clamp(-128, 127).to(torch.int8))
    got = torch_npu.npu_grouped_matmul(x, w, scale=scale, per_token_scale=tokens, output_dtype=FP16, **call)
    for y, a, b, s, t in zip(got, x, w, scale, tokens, strict=True):
        close(y, a.double() @ b.double() * s * t[:, None], 2)
    for wrong, message in (
        ({"scale": scale[::-1]}, r"scale must have shape \[16\] for its weight; got \[32\]"),
        ({"scale": scale[:1]}, "scale must have one tensor for each weight, 2"),
        ({"scale": scale, "per_token_scale": tokens[::-1]}, r"per_token_scale must have shape \[2\]"),
        ({"scale": scale, "bias": bias[::-1]}, r"bias must have shape \[16\] for its weight"),
        ({"scale": [scale[0], scale[1].to(BF16)]}, "scale must be torch.float32"),
    ):
        with pytest.raises(LimitError, match=message):
            torch_npu.npu_grouped_matmul(x, w, output_dtype=FP16, **call | wrong)


def test_lists_of_half_inputs_with_int8_weights(a2) -> None:
    x, w = [rand(n, N) for n in (2, 3)], [torch.randint(-128, 128, (N, n), dtype=torch.int8) for n in (16, 32)]
    scale, offset = ([(torch.rand(n) * 0.01).to(BF16) for n in (16, 32)] for _ in range(2))
    got = torch_npu.npu_grouped_matmul(x, w, antiquant_scale=scale, antiquant_offset=offset, group_type=-1)
    for y, a, b, s, o in zip(got, x, w, scale, offset, strict=True):
        close(y, a.float() @ ((b.float() + o.float()) * s.float()).to(BF16).float(), 4)
    with pytest.raises(LimitError, match=r"antiquant_scale must have shape \[16\] for its weight"):
        torch_npu.npu_grouped_matmul(x, w, antiquant_scale=scale[::-1], group_type=-1)


def test_nothing_given_is_the_default(a2) -> None:
    x, w, totals = rand(5, N), rand(2, N, 16, seed=1), torch.tensor([2, 5])
    call = {"group_list": totals, "split_item": 2, "group_type": 0}
    (wanted,) = torch_npu.npu_grouped_matmul([x], [w], group_list_type=0, act_type=0, **call)
    (got,) = torch_npu.npu_grouped_matmul([x], [w], group_list_type=None, act_type=None, **call)
    assert torch.equal(got, wanted)
    parts, weights = [x[:2], x[2:]], list(w)
    plain = torch_npu.npu_grouped_matmul(parts, weights, group_type=-1, split_item=None)
    assert torch.equal(torch.cat(plain), wanted)
    with pytest.raises((LimitError, RuntimeError), match="group_type is needed where there is no group_list"):
        torch_npu.npu_grouped_matmul(parts, weights, split_item=0)


def test_a_single_count_is_no_list_of_counts(a2) -> None:
    x, w, rows = rand(5, N), rand(1, N, 16, seed=1), torch.tensor([3])
    call = {"group_list": rows, "split_item": 2, "group_type": 0}
    (got,) = torch_npu.npu_grouped_matmul([x], [w], group_list_type=0, **call)
    close(got[:3], x[:3].float() @ w[0].float(), 4)
    with pytest.raises(LimitError, match="with group_list_type 1 group_list must have more than one entry"):
        torch_npu.npu_grouped_matmul([x], [w], group_list_type=1, **call)


def test_grouped_matmul_with_int8_weights(a2) -> None:
    x, w = rand(5, N), torch.randint(-128, 128, (2, N, 16), dtype=torch.int8)
    scale, offset = rand(2, 16, seed=1) * 0.01, rand(2, 16, seed=2)
    got = torch_npu.npu_grouped_matmul(
        [x], [w], antiquant_scale=[scale], antiquant_offset=[offset], group_list=torch.tensor([2, 5]), split_item=2,
        group_type=0,
    )[0]  # fmt: skip
    wide = ((w.float() + offset.float().unsqueeze(1)) * scale.float().unsqueeze(1)).to(BF16).float()
    close(got, torch.cat((x[:2].float() @ wide[0], x[2:].float() @ wide[1])), 4)


def test_grouped_matmul_swiglu_quant(a2) -> None:
    counts = torch.tensor([2, 3])
    x, w = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((5, N), (2, N, 32)))
    plain, w = w, torch_npu.npu_format_cast(w, NZ)
    scale, tokens = torch.rand(2, 32) * 1e-3, torch.rand(5) + 0.5
    y, out_scale = like_meta(
        torch_npu.npu_grouped_matmul_swiglu_quant_v2, x, [w], [scale], tokens, counts.cumsum(0), group_list_type=0
    )
    product = torch.cat([rows.double() @ w[i].double() for i, rows in enumerate(x.split(counts.tolist()))])
    wanted = CPU.swiglu((product * scale.repeat_interleave(counts, 0) * tokens[:, None]).float())
    assert (y * out_scale[:, None] - wanted).abs().max() <= out_scale.max() * 0.51
    with pytest.raises(LimitError, match="weight must be in FRACTAL_NZ.*got ND"):
        torch_npu.npu_grouped_matmul_swiglu_quant_v2(x, [plain], [scale], tokens, counts.cumsum(0))


@pytest.mark.parametrize("soc", ["a2", "a3"])
@pytest.mark.parametrize("rows", [1, 11])
def test_the_whole_chain(request, soc, rows) -> None:
    """Gate, route, two products, way back: what the CPU backend's experts compute."""
    request.getfixturevalue(soc)
    x, logits = rand(rows, N), rand(rows, E, seed=1)
    gate_up, down = rand(E, 2 * INNER, N, seed=2) * 0.2, rand(E, N, INNER, seed=3) * 0.2
    weights, ids = CPU.gate_topk(logits, K, True)
    wanted = CPU.prepare_experts(gate_up.float(), down.float())(x.float(), ids, weights.float())
    expanded, index, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        ids.to(torch.int32),
        expert_num=E,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, E],
    )
    call = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1}
    hidden = torch_npu.npu_grouped_matmul([expanded], [gate_up.transpose(1, 2)], **call)[0]
    out = torch_npu.npu_grouped_matmul([torch_npu.npu_swiglu(hidden)], [down.transpose(1, 2)], **call)[0]
    y = torch_npu.npu_moe_finalize_routing(out, None, None, None, weights.to(BF16), index, None, drop_pad_mode=2)
    assert (y.float() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_duo_gates_in_chunks(duo) -> None:
    torch_npu.npu_moe_gating_top_k_softmax(torch.zeros(1024, E, dtype=FP16), None, K)
    with pytest.raises(LimitError, match="at most 1024 rows"):
        torch_npu.npu_moe_gating_top_k_softmax(torch.zeros(1025, E, dtype=FP16), None, K)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_top_k_top_p(a2, dtype) -> None:
    logits = rand(3, 50, dtype=dtype)
    k, p = torch.tensor([1, 5, 50], dtype=torch.int32), torch.tensor([1.0, 0.7, 0.3]).to(dtype)
    got = like_meta(torch_npu.npu_top_k_top_p, logits, p, k)
    for row in range(3):
        order = logits[row].float().argsort(descending=True)[: int(k[row])]
        probabilities = logits[row, order].float().softmax(0)
        before = probabilities.cumsum(0) - probabilities
        kept = order[(before < p[row].float()) | (torch.arange(len(order)) == 0)]
        assert set(got[row].isfinite().nonzero().flatten().tolist()) == set(kept.tolist())
        assert torch.equal(got[row, kept], logits[row, kept])
    with pytest.raises((LimitError, RuntimeError), match=r"k must lie in \[1, 50\]"):
        torch_npu.npu_top_k_top_p(logits, p, torch.tensor([0, 1, 51], dtype=torch.int32))
