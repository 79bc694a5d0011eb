"""Formats and the paged caches: NZ round-trips, every way to write a cache, the fused qkv op against its parts."""

import pytest
import torch
import torch_npu

from emulator.formats import NZ, cache_rows, format_of, from_nz, set_format, to_nz
from emulator.limits import LimitError
from executor.device.cpu.ops import CpuOps
from tests.emulator.helpers import BF16, FP16, FP32, HALF, blocks_of, close, rand, slots_of

CPU = CpuOps()


@pytest.mark.parametrize("shape", [(16, 16), (17, 33), (1, 5), (3, 40, 24)])
@pytest.mark.parametrize("dtype", [FP16, torch.int8])
def test_nz_round_trips(a2, shape, dtype) -> None:
    x = (torch.randn(*shape) * 20).to(dtype)
    packed = to_nz(x)
    width = 32 if dtype == torch.int8 else 16
    assert packed.shape[-1] == width and packed.shape[-2] % 16 == 0
    assert torch.equal(from_nz(packed, *shape[-2:]), x)


def test_nz_places_columns_in_strips(a2) -> None:
    x = torch.arange(32 * 48, dtype=FP32).view(32, 48)
    packed = to_nz(x)
    assert packed.shape == (3, 32, 16)
    assert packed[2, 5, 7] == x[5, 2 * 16 + 7]


def test_format_cast_keeps_contents_and_remembers(a2) -> None:
    weight = rand(48, 64)
    packed = torch_npu.npu_format_cast(weight.t(), NZ)
    assert format_of(packed) == format_of(packed.t()) == format_of(packed[1:]) == NZ
    assert int(torch_npu.get_npu_format(packed)) == NZ and format_of(weight) != NZ
    assert torch.equal(packed, weight.t()) and packed.is_contiguous()
    plain = torch_npu.npu_format_cast(packed, 2)
    assert format_of(plain) == 2 and torch.equal(plain, weight.t())
    assert torch_npu.npu_format_cast(packed, NZ) is packed
    torch_npu.npu_format_cast_(weight, NZ)
    assert format_of(weight) == NZ
    with pytest.raises(LimitError, match="acl_format must be 2"):
        torch_npu.npu_format_cast(weight, 3)


def test_formats_do_not_outlive_their_storage(a2) -> None:
    for _ in range(50):
        assert format_of(torch.empty(64, 64)) == 2
        torch_npu.npu_format_cast(torch.empty(64, 64), NZ)


def test_a_cache_made_with_format(duo) -> None:
    cache = torch_npu.empty_with_format((3, 8, 16, 16), dtype=FP16, device="cpu", acl_format=NZ)
    assert (cache.shape, cache.dtype, format_of(cache)) == ((3, 8, 16, 16), FP16, NZ)


def test_meta_kernels_where_torch_npu_has_none(a2) -> None:
    x = torch.empty(4, 8, device="meta")
    assert torch_npu.npu_format_cast(x, NZ).shape == (4, 8)
    q = torch.empty(16, 2, 64, device="meta", dtype=FP16)
    lens = torch.empty(1, dtype=torch.int32, device="meta")
    assert torch_npu._npu_flash_attention_unpad(q, q, q, lens, 0.1, 2, 2, q) is None


@pytest.mark.parametrize("mode", ["Norm", None, "PA_NZ"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[1], [16, 1, 33], [32, 32]])
def test_scatter_pa_kv_cache(a2, mode, index, lengths) -> None:
    heads, dim, size = 2, 32, 16
    table, blocks = blocks_of(lengths, size)
    slots = slots_of(table, lengths, size).to(index)
    k, v = rand(sum(lengths), heads, dim), rand(sum(lengths), heads, dim, seed=1)
    shape = (blocks, heads * dim // 16, size, 16) if mode == "PA_NZ" else (blocks, size, heads, dim)
    caches = torch.zeros(shape, dtype=BF16), torch.zeros(shape, dtype=BF16)
    torch_npu.npu_scatter_pa_kv_cache(k, v, *caches, slots, cache_mode=mode)
    for rows, cache in zip((k, v), caches, strict=True):
        plain = cache_rows(cache, heads) if mode == "PA_NZ" else cache
        assert torch.equal(plain.flatten(0, 1)[slots.long()], rows)
        assert plain.count_nonzero() == rows.count_nonzero()


def test_scatter_limits(a2) -> None:
    k = rand(2, 2, 32)
    cache = torch.zeros(3, 16, 2, 32, dtype=BF16)

    def write(slots, key=k, mode="Norm"):
        torch_npu.npu_scatter_pa_kv_cache(key, key, cache, cache.clone(), torch.tensor(slots), cache_mode=mode)

    with pytest.raises(LimitError, match=r"slots must lie in \[0, 48\)"):
        write([0, 48])
    with pytest.raises(LimitError, match="must not repeat"):
        write([5, 5])
    with pytest.raises(LimitError, match=r"\[0, 48\)"):
        write([-1, 5])
    with pytest.raises(LimitError, match="key must be contiguous"):
        write([1, 2], key=rand(2, 32, 2).transpose(1, 2))
    with pytest.raises(LimitError, match="must have shape.*NZ"):
        write([1, 2], mode="PA_NZ")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tokens", [1, 5])
def test_qkv_rms_norm_rope_cache(a2, dtype, tokens) -> None:
    dim, nq, nk, size = 128, 4, 2, 16
    qkv = rand(tokens, (nq + 2 * nk) * dim, dtype=dtype)
    gammas = rand(dim, dtype=dtype, seed=1), rand(dim, dtype=dtype, seed=2)
    angles = rand(tokens, dim // 2, dtype=FP32, seed=3)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    index = torch.tensor([37, -1, 0, 15, 16][:tokens])
    q_out = torch.zeros(tokens, nq * dim, dtype=dtype)
    caches = [torch.zeros(4, nk * dim // 16, size, 16, dtype=dtype) for _ in range(2)]
    sizes = [1, tokens, nq + 2 * nk, dim], [nq, nk, nk]
    torch_npu.npu_qkv_rms_norm_rope_cache(qkv, *gammas, cos, sin, index, q_out, *caches, *sizes, epsilon=1e-6)
    q, k, v = qkv.view(tokens, -1, dim).split([nq, nk, nk], 1)
    q, k = (
        CPU.rope(CPU.rms_norm(x.float(), g.float(), 1e-6), cos.float(), sin.float())
        for x, g in zip((q, k), gammas, strict=True)
    )
    close(q_out, q.flatten(1), 2)
    for cache, rows in zip(caches, (k, v), strict=True):
        plain = cache_rows(cache, nk).flatten(0, 1)
        for token, slot in enumerate(index.tolist()):
            if slot >= 0:
                close(plain[slot], rows[token].to(dtype), 2)
        assert (plain.flatten(1).count_nonzero(1) > 0).sum() == (index >= 0).sum()
    q_copy = torch.zeros_like(q_out)
    written = torch_npu.npu_qkv_rms_norm_rope_cache_functional(
        qkv, *gammas, cos, sin, index, q_copy, *[torch.zeros_like(c) for c in caches], *sizes
    )
    assert not q_copy.any() and torch.equal(written[3], q_out) and torch.equal(written[4], caches[0])


def test_qkv_into_an_int8_cache(a2) -> None:
    qkv, gamma = rand(3, 4 * 128), torch.ones(128, dtype=BF16)
    turn = torch.ones(3, 128, dtype=BF16), torch.zeros(3, 128, dtype=BF16)
    scale = torch.full((1, 128), 0.05)
    caches = [torch.zeros(2, 4, 32, 32, dtype=torch.int8) for _ in range(2)]
    q_out = torch.empty(3, 256, dtype=BF16)
    torch_npu.npu_qkv_rms_norm_rope_cache(
        qkv,
        gamma,
        gamma,
        *turn,
        torch.tensor([0, 33, 7]),
        q_out,
        *caches,
        [1, 3, 4, 128],
        [2, 1, 1],
        k_scale=scale,
        v_scale=scale,
    )
    v = cache_rows(caches[1], 1).flatten(0, 1)[[0, 33, 7], 0]
    assert torch.equal(v, (qkv[:, 384:].float() / 0.05).round().clamp(-128, 127).to(torch.int8))


def test_qkv_limits(a2) -> None:
    def call(dim=128, tokens=2, index=(0, 1), size=16, dtype=BF16):
        qkv, gamma = rand(tokens, 4 * dim, dtype=dtype), torch.ones(dim, dtype=dtype)
        turn = torch.ones(tokens, dim, dtype=dtype)
        caches = [torch.zeros(2, dim // 16, size, 16, dtype=dtype) for _ in range(2)]
        torch_npu.npu_qkv_rms_norm_rope_cache(
            qkv,
            gamma,
            gamma,
            turn,
            turn,
            torch.tensor(index),
            qkv[:, : 2 * dim].clone(),
            *caches,
            [1, tokens, 4, dim],
            [2, 1, 1],
        )

    call()
    for wrong, message in (
        ({"dim": 64}, "head dim.*must be 128"),
        ({"index": (3, 3)}, "must not repeat"),
        ({"index": (0, 32)}, r"\[-1, 32\)"),
        ({"size": 24}, "multiple of 16"),
        ({"dtype": FP32}, "qkv must be float16 or bfloat16"),
    ):
        with pytest.raises(LimitError, match=message):
            call(**wrong)


@pytest.mark.parametrize("soc", ["a2", "duo"])
def test_reshape_and_cache(request, soc) -> None:
    request.getfixturevalue(soc)
    k, v = rand(5, 2, 32, dtype=FP16), rand(5, 2, 32, dtype=FP16, seed=1)
    slots = torch.tensor([0, 15, 16, 40, 3], dtype=torch.int32)
    shape = (3, 4, 16, 16) if soc == "duo" else (3, 16, 2, 32)
    caches = [
        torch_npu.empty_with_format(shape, dtype=FP16, device="cpu", acl_format=NZ if soc == "duo" else 2)
        for _ in range(2)
    ]
    torch_npu._npu_reshape_and_cache(key=k, value=v, key_cache=caches[0], value_cache=caches[1], slot_indices=slots)
    for rows, cache in zip((k, v), caches, strict=True):
        plain = cache_rows(cache, 2) if soc == "duo" else cache
        assert torch.equal(plain.flatten(0, 1)[slots.long()], rows)


def test_reshape_and_cache_on_duo_wants_nz(duo) -> None:
    k, slots = rand(1, 2, 32, dtype=FP16), torch.zeros(1, dtype=torch.int32)
    plain = torch.zeros(3, 4, 16, 16, dtype=FP16)
    with pytest.raises(LimitError, match="must be in FRACTAL_NZ"):
        torch_npu._npu_reshape_and_cache(k, k, plain, plain.clone(), slots)


@pytest.mark.parametrize("soc", ["a2", "duo"])
def test_reshape_and_cache_takes_an_int8_key_beside_a_half_value(request, soc) -> None:
    """Each cache has its own rows' type; a cache of the other type is refused."""
    request.getfixturevalue(soc)
    k, v = torch.randint(-128, 128, (3, 2, 32), dtype=torch.int8), rand(3, 2, 32, dtype=FP16)
    slots = torch.tensor([0, 33, 5], dtype=torch.int32)
    plain = {rows.dtype: torch.zeros(2, 32, 2, 32, dtype=rows.dtype) for rows in (k, v)}
    if soc == "duo":
        plain = {kind: set_format(to_nz(cache.flatten(2)), NZ) for kind, cache in plain.items()}
    key_cache, value_cache = plain[torch.int8], plain[FP16]
    torch_npu._npu_reshape_and_cache(k, v, key_cache, value_cache, slots)
    for rows, cache in ((k, key_cache), (v, value_cache)):
        cache = cache_rows(cache, 2) if soc == "duo" else cache
        assert torch.equal(cache.flatten(0, 1)[slots.long()], rows)
    with pytest.raises(LimitError, match="value_cache must have the dtype of value, float16; got int8"):
        torch_npu._npu_reshape_and_cache(k, v, key_cache, key_cache, slots)
    with pytest.raises(LimitError, match="key_cache must have the dtype of key, int8; got float16"):
        torch_npu._npu_reshape_and_cache(k, v, value_cache, value_cache, slots)
