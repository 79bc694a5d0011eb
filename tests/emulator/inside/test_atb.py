"""ATB's attention ops on 300I DUO (NZ) and on A2 (plain) against attention's formula."""

import pytest
import torch
import torch_npu

from emulator.formats import NZ, set_format, to_nz
from emulator.limits import LimitError
from emulator.record import Recorder
from tests.emulator.helpers import BF16, FP16, blocks_of, close, naive, rand, slots_of

SCALE = 0.11
SOCS = pytest.mark.parametrize("soc", ["a2", "duo"])
HEADS = pytest.mark.parametrize("heads", [(4, 4), (8, 2)])


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def packed(lengths, heads, soc, dim=64):
    """q, k, v of all requests; on 300I DUO padded to 16 rows."""
    total = sum(lengths)
    rows = -(-total // 16) * 16 if soc == "duo" else total
    return [rand(rows, n, dim, dtype=FP16, seed=s) for s, n in enumerate((heads[0], heads[1], heads[1]))]


def wanted(q, k, v, lengths, causal):
    total = sum(lengths)
    parts = zip(*(x[:total].split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([naive(*part, SCALE, causal) for part in parts])


def causal_mask(rows, columns, soc, value=float("-inf")):
    mask = torch.zeros(rows, columns, dtype=FP16).masked_fill(torch.ones(rows, columns).triu(1).bool(), value)
    return set_format(to_nz(mask).unsqueeze(0), NZ) if soc == "duo" else mask


@SOCS
@HEADS
@pytest.mark.parametrize("lengths", [[1], [16], [5, 1, 20]])
def test_flash_attention(request, soc, heads, lengths) -> None:
    request.getfixturevalue(soc)
    q, k, v = packed(lengths, heads, soc)
    longest = -(-max(lengths) // 16) * 16 if soc == "duo" else max(lengths)
    mask = causal_mask(longest, longest, soc)
    out = torch.zeros_like(q)
    torch_npu._npu_flash_attention(
        query=q, key=k, value=v, mask=mask, seq_len=int32(lengths), scale_value=SCALE, num_heads=heads[0],
        num_kv_heads=heads[1], out=out,
    )  # fmt: skip
    close(out[: sum(lengths)], wanted(q, k, v, lengths, True))


@SOCS
@HEADS
@pytest.mark.parametrize("lengths", [[3], [64, 1, 7]])
def test_flash_attention_unpad(request, soc, heads, lengths) -> None:
    request.getfixturevalue(soc)
    q, k, v = packed(lengths, heads, soc)
    out = torch.zeros(q.shape[0], heads[0] * 64, dtype=FP16)
    torch_npu._npu_flash_attention_unpad(
        query=q,
        key=k,
        value=v,
        seq_len=int32(lengths),
        scale_value=SCALE,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        out=out,
    )
    close(out.view(q.shape)[: sum(lengths)], wanted(q, k, v, lengths, False))


def test_flash_attention_with_the_long_mask(duo) -> None:
    lengths, heads = [5, 30], (4, 2)
    q, k, v = packed(lengths, heads, "duo")
    out, mask = torch.zeros_like(q), causal_mask(2048, 2048, "duo", -10000.0)
    call = {"query": q, "key": k, "value": v, "seq_len": int32(lengths), "scale_value": SCALE}
    call |= {"num_heads": 4, "num_kv_heads": 2, "out": out}
    torch_npu._npu_flash_attention_v3(mask=mask, **call)
    close(out[:35], wanted(q, k, v, lengths, True))
    with pytest.raises(LimitError, match="above the diagonal, and nothing else"):
        torch_npu._npu_flash_attention_v3(mask=set_format(torch.zeros_like(mask), NZ), **call)
    with pytest.raises(LimitError, match="must be in FRACTAL_NZ"):
        torch_npu._npu_flash_attention_v3(mask=mask.clone(), **call)


def caches_of(soc, k, v, table, blocks, lengths, size):
    slots = slots_of(table, lengths, size)
    made = []
    for rows in (k, v):
        plain = torch.full((blocks, size, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
        plain.view(-1, *rows.shape[1:])[slots] = rows
        made.append(set_format(to_nz(plain.flatten(2)), NZ) if soc == "duo" else plain)
    return made


@SOCS
@HEADS
@pytest.mark.parametrize("lengths", [[1], [16, 17, 128, 3]])
def test_paged_attention(request, soc, heads, lengths) -> None:
    request.getfixturevalue(soc)
    size, batch = 16, len(lengths)
    q = rand(batch, heads[0], 64, dtype=FP16)
    k, v = (rand(sum(lengths), heads[1], 64, dtype=FP16, seed=s) for s in (1, 2))
    table, blocks = blocks_of(lengths, size)
    caches = caches_of(soc, k, v, table, blocks, lengths, size)
    out = torch.zeros_like(q)
    torch_npu._npu_paged_attention(
        query=q, key_cache=caches[0], value_cache=caches[1], num_kv_heads=heads[1], num_heads=heads[0],
        scale_value=SCALE,
        block_table=table, context_lens=int32(lengths), out=out,
    )  # fmt: skip
    parts = zip(q.split(1), k.split(lengths), v.split(lengths), strict=True)
    close(out, torch.cat([naive(*part, SCALE, True) for part in parts]))


@SOCS
@pytest.mark.parametrize("q_lens,kv_lens", [([1, 5, 16], [40, 5, 33]), ([20], [20])])
def test_splitfuse(request, soc, q_lens, kv_lens) -> None:
    request.getfixturevalue(soc)
    heads, size = (4, 2), 16
    q = rand(sum(q_lens), heads[0], 64, dtype=FP16)
    k, v = (rand(sum(kv_lens), heads[1], 64, dtype=FP16, seed=s) for s in (1, 2))
    table, blocks = blocks_of(kv_lens, size)
    caches = caches_of(soc, k, v, table, blocks, kv_lens, size)
    parts = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
    expected = torch.cat([naive(*part, SCALE, True) for part in parts])
    rows = torch.cat([torch.arange(kv - ql, kv) for ql, kv in zip(q_lens, kv_lens, strict=True)])
    mask = (torch.arange(-(-max(kv_lens) // 16) * 16) > rows.unsqueeze(1)).to(FP16) * -10000
    call = {
        "query": q,
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_table": table,
        "context_lens": int32(kv_lens),
    }
    call |= {"seq_len": int32(q_lens), "num_kv_heads": 2, "num_heads": 4, "scale_value": SCALE}
    out = torch.zeros_like(q)
    torch_npu._npu_paged_attention_splitfuse(
        mask=set_format(to_nz(mask).unsqueeze(0), NZ) if soc == "duo" else mask, out=out, **call
    )
    close(out, expected)
    if soc == "duo":
        out.zero_()
        torch_npu._npu_paged_attention_splitfuse_v2(mask=causal_mask(2048, 2048, "a2", -60000.0), out=out, **call)
        close(out, expected)


def test_chunks_of_duo_want_the_plain_mask_and_key_lengths_on_the_device(duo) -> None:
    q, cache = rand(4, 2, 64, dtype=FP16), set_format(rand(2, 8, 16, 16, dtype=FP16), NZ)
    call = {"query": q, "key_cache": cache, "value_cache": cache, "block_table": int32([[0]]), "seq_len": int32([4])}
    call |= {"context_lens": int32([9]), "num_kv_heads": 2, "num_heads": 2, "scale_value": SCALE}
    call |= {"mask": causal_mask(2048, 2048, "a2"), "out": torch.zeros_like(q)}
    torch_npu._npu_paged_attention_splitfuse_v2(**call)
    for name, wrong, message in (
        ("mask", causal_mask(2048, 2048, "duo"), r"mask must have shape \[2048, 2048\]"),
        ("mask", set_format(call["mask"].clone(), NZ), "mask must be plain"),
        ("mask", torch.zeros(2048, 2048, dtype=FP16), "above the diagonal"),
        ("context_lens", torch.tensor([9]), "context_lens must be int32"),
    ):
        with pytest.raises(LimitError, match=f"_npu_paged_attention_splitfuse_v2 on Atlas 300I DUO.*{message}"):
            torch_npu._npu_paged_attention_splitfuse_v2(**call | {name: wrong})
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    with Recorder(check="collect") as seen:
        torch_npu._npu_paged_attention_splitfuse_v2(**meta | {"seq_len": call["seq_len"]})
        assert seen.violations == []
        torch_npu._npu_paged_attention_splitfuse_v2(**meta | {"context_lens": call["context_lens"]})
    assert len(seen.violations) == 1 and "context_lens must be on the device" in seen.violations[0]


def test_limits_on_duo(duo) -> None:
    q, lens = rand(16, 2, 64, dtype=FP16), int32([10])

    def unpad(query=q, lengths=lens, heads=2):
        torch_npu._npu_flash_attention_unpad(query, query, query, lengths, SCALE, heads, heads, torch.zeros_like(query))

    unpad()
    for wrong, message in (
        ({"query": rand(16, 2, 64, dtype=BF16)}, "query must be float16; got bfloat16"),
        ({"query": rand(10, 2, 64, dtype=FP16)}, "query must have 16 rows for 10 tokens"),
        ({"query": rand(16, 2, 72, dtype=FP16)}, "head dim must be a multiple of 16"),
        ({"lengths": torch.tensor([10])}, "seq_len must be int32"),
        ({"heads": 4}, "num_heads must be the heads of query"),
    ):
        with pytest.raises(LimitError, match=message):
            unpad(**wrong)
    mask = causal_mask(32, 32, "duo")
    with pytest.raises(LimitError, match="mask must cover 10 queries and 10 keys.*no more"):
        torch_npu._npu_flash_attention(q, q, q, mask, lens, SCALE, 2, 2, torch.zeros_like(q))
    with pytest.raises(LimitError, match=r"mask must have 4 dimensions"):
        torch_npu._npu_flash_attention(q, q, q, causal_mask(16, 16, "a2"), lens, SCALE, 2, 2, torch.zeros_like(q))
    cache = set_format(torch.zeros(2, 8, 256, 16, dtype=FP16), NZ)
    with pytest.raises(LimitError, match="at most 128 \\* 128|at most 128; got 256"):
        torch_npu._npu_paged_attention(
            q[:1], cache, cache, 2, 2, SCALE, torch.zeros(1, 1, dtype=torch.int32), int32([3]), torch.zeros_like(q[:1])
        )
