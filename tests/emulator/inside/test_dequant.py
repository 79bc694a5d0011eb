"""300I DUO's products that quantize by themselves, compressed weights, int4 weights: against plain arithmetic."""

import pytest
import torch
import torch_npu

from emulator.formats import NZ
from emulator.kernels.compressed import num_tiles, unzip_weight, zip_weight
from emulator.kernels.int4 import unpack_int4
from emulator.limits import LimitError
from tests.emulator.helpers import BF16, FP16, FP32, close, like_meta, rand

M, K, OUT = 5, 64, 48


def int8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def int4(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def quantized(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """By row, or by the scale given: `(xq, scale [.., 1])`."""
    scale = x.abs().amax(-1, keepdim=True) / 127 if scale is None else scale.view(-1, 1)
    return (x / scale).round().clamp(-128, 127).double(), scale.double()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("given", ["by row", "one", "nothing"])
def test_quant_matmul_dequant(duo, given, smooth) -> None:
    x, w, scale = rand(M, K, dtype=FP16), int8(OUT, K), torch.rand(OUT) * 1e-2
    factor = torch.rand(K).half() + 0.5 if smooth else None
    rows = {"by row": torch.rand(M) * 0.02 + 0.01, "one": torch.tensor([0.03]), "nothing": None}[given]
    call = {"x_scale": rows, "smooth_scale": factor, "quant_mode": "pertensor" if given == "one" else "pertoken"}
    got = like_meta(torch_npu.npu_quant_matmul_dequant, x, w, scale, **call)
    xq, xs = quantized(x.float() * (factor.float() if smooth else 1), rows)
    close(got, (xq @ w.double().t() * scale * xs).half(), 2)


def test_quant_matmul_dequant_with_one_scale_for_both(duo) -> None:
    """An int64 weight_scale holds the bits of float32 and the scale of x already."""
    x, w, scale = rand(M, K, dtype=FP16), int8(OUT, K), torch.rand(OUT) * 1e-2
    one = torch.tensor([0.03], dtype=FP16)
    packed = (scale * one.float()).view(torch.int32).long()
    got = torch_npu.npu_quant_matmul_dequant(x, w, packed, x_scale=one, quant_mode="pertensor")
    plain = torch_npu.npu_quant_matmul_dequant(x, w, scale, x_scale=one.float(), quant_mode="pertensor")
    close(got, plain.float(), 2)


def test_quant_grouped_matmul_dequant(duo) -> None:
    x, w, scale = rand(7, K, dtype=FP16), int8(3, OUT, K), torch.rand(3, OUT) * 1e-2
    got = like_meta(torch_npu.npu_quant_grouped_matmul_dequant, x, w, scale, torch.tensor([2, 2, 6]))
    for rows, group in ((slice(0, 2), 0), (slice(2, 6), 2)):
        wanted = torch_npu.npu_quant_matmul_dequant(x[rows], w[group], scale[group])
        assert torch.equal(got[rows], wanted)
    assert got[6].isnan().all(), "rows of no group are undefined"
    with pytest.raises(LimitError, match="cumulative"):
        torch_npu.npu_quant_grouped_matmul_dequant(x, w, scale, torch.tensor([2, 0, 4]))


@pytest.mark.parametrize("wrong, message", [
    ({"x": rand(M, K, dtype=FP32)}, "x must be float16"),
    ({"w": int8(OUT, 40)}, "k the columns of x"),
    ({"w": int8(40, K), "scale": torch.rand(40)}, "multiples of 16"),
    ({"scale": torch.rand(OUT).half()}, "weight_scale must be float32 or int64"),
    ({"scale": torch.rand(1)}, r"weight_scale must have shape \[48\]"),
    ({"bias": torch.zeros(OUT, dtype=torch.int32)}, "bias must be None"),
    ({"x_offset": torch.zeros(1)}, "x_offset must be None"),
    ({"quant_mode": "perchannel"}, "quant_mode must be"),
    ({"quant_mode": "pertensor"}, "without x_scale only quant_mode 'pertoken'"),
    ({"x_scale": torch.rand(M), "quant_mode": "pertensor"}, r"x_scale must have shape \[1\]"),
    ({"x_scale": torch.rand(1)}, r"x_scale must have shape \[5\]"),
    ({"x_scale": torch.rand(1).half(), "quant_mode": "pertensor"}, "x_scale must be float32"),
    ({"scale": torch.ones(OUT, dtype=torch.int64)}, "needs a float16 x_scale"),
    ({"smooth_scale": torch.rand(K)}, "smooth_scale must be float16"),
])  # fmt: skip
def test_limits_of_quant_matmul_dequant(duo, wrong, message) -> None:
    call = {"x": rand(M, K, dtype=FP16), "w": int8(OUT, K), "scale": torch.rand(OUT)} | wrong
    operands = [call.pop(name) for name in ("x", "w", "scale")]
    with pytest.raises(LimitError, match=f"npu_quant_matmul_dequant on Atlas 300I DUO.*{message}"):
        torch_npu.npu_quant_matmul_dequant(*operands, **call)


@pytest.mark.parametrize("soc", ["a2", "a3"])
def test_what_only_duo_has(request, soc) -> None:
    request.getfixturevalue(soc)
    x, w = rand(M, K, dtype=FP16), int8(OUT, K)
    for call in (
        lambda: torch_npu.npu_quant_matmul_dequant(x, w, torch.rand(OUT)),
        lambda: torch_npu.npu_quant_grouped_matmul_dequant(x, w[None], torch.rand(1, OUT), torch.tensor([M])),
        lambda: compressed(w, int8(M, K)),
    ):
        with pytest.raises(LimitError, match="not available on this chip"):
            call()


def compressed(w, x, **changed):
    x2, index = zip_weight(w)
    call = {"compress_index": index, "bias": torch.zeros(1, len(w), dtype=torch.int32)}
    call |= {"scale": torch.ones(1, len(w)).view(torch.int32).long().view(torch.uint64)} | changed
    return torch_npu.npu_matmul_compress_dequant(
        x, changed.pop("x2", x2), **{k: v for k, v in call.items() if k != "x2"}
    )


@pytest.mark.parametrize("n, k", [(128, 256), (300, 700), (16, 32)])
def test_matmul_compress_dequant(duo, n, k) -> None:
    """As documented around the codec: lossless, tiles of 256 by 128, eight bytes of index each, fp16 out."""
    w, x = int8(n, k), int8(M, k, seed=1)
    w[: n // 2, : k // 2] = 0
    x2, index = zip_weight(w)
    assert index.shape == (8 * num_tiles(k, n),) and torch.equal(unzip_weight(x2, index, k, n), w)
    bias = torch.randint(-500, 500, (1, n), dtype=torch.int32)
    scale = torch.rand(1, n) * 1e-4
    wanted = (x.double() @ w.double().t() + bias) * scale
    packed = scale.view(torch.int32).long()
    got = like_meta(torch_npu.npu_matmul_compress_dequant, x, x2, index, bias, packed.view(torch.uint64))
    close(got, wanted.half(), 2)
    assert torch.equal(torch_npu.npu_matmul_compress_dequant(x, x2, index, bias, packed), got)


def test_zeros_are_left_out_of_a_compressed_weight() -> None:
    w = int8(256, 512)
    w[128:, :256] = 0
    assert len(zip_weight(w)[0]) == 3 * 128 * 256
    assert torch.equal(unzip_weight(*zip_weight(torch.zeros_like(w)), 512, 256), torch.zeros_like(w))


@pytest.mark.parametrize("wrong, message", [
    ({"compress_index": torch.zeros(16, dtype=torch.int8)}, r"compress_index must have shape \[8\]"),
    ({"compress_index": torch.zeros(8, dtype=torch.int8)}, "the chip's own codec is closed"),
    ({"bias": torch.zeros(1, 48)}, "bias must be int32"),
    ({"bias": torch.zeros(48, dtype=torch.int32)}, "bias must have 2 dimensions"),
    ({"scale": torch.ones(1, 48)}, "scale must be uint64 or int64"),
    ({"scale": torch.ones(1, 1, dtype=torch.int64)}, r"scale must have shape \[1, 48\]"),
    ({"x2": torch.zeros(48, 64, dtype=torch.int8)}, "x2 must have 1 dimension"),
    ({"offsetX": 3}, "offsetX must be None"),
    ({"offsetW": torch.zeros(1, dtype=torch.int8)}, "offsetW must be None"),
])  # fmt: skip
def test_limits_of_matmul_compress_dequant(duo, wrong, message) -> None:
    with pytest.raises(LimitError, match=f"npu_matmul_compress_dequant on Atlas 300I DUO.*{message}"):
        compressed(int8(48, 64), int8(M, 64), **wrong)


def test_int4_weights_are_packed_along_the_last_dimension(a2) -> None:
    w = int4(6, 16)
    packed = like_meta(torch_npu.npu_convert_weight_to_int4pack, w)
    assert packed.shape == (6, 2) and torch.equal(unpack_int4(packed), w.to(torch.int8))
    assert torch.equal(packed, torch_npu.npu_quantize(w.float(), torch.ones(1), None, torch.quint4x2, -1, False))
    assert int(packed[0, 0]) & 0xFF == (int(w[0, 0]) & 0xF) | (int(w[0, 1]) & 0xF) << 4
    for wrong, message in (
        (w * 2, r"values must lie in \[-8, 7\]"),
        (int4(6, 12), "multiple of 8"),
        (w.t(), "contiguous"),
        (w.long(), "weight must be int32"),
    ):
        with pytest.raises(LimitError, match=message):
            torch_npu.npu_convert_weight_to_int4pack(wrong)


@pytest.mark.parametrize("transposed", [False, True])
def test_quant_matmul_of_int4(a2, transposed) -> None:
    x, w, scale = int4(M, K), int4(K, OUT, seed=1), torch.rand(OUT) * 1e-2
    packed = torch_npu.npu_convert_weight_to_int4pack(w.t().contiguous()).t() if transposed else pack(w)
    bias = torch.randint(-50, 50, (OUT,), dtype=torch.int32)
    exact = torch_npu.npu_trans_quant_param(scale)
    got = torch_npu.npu_quant_matmul(pack(x), packed, exact, bias=bias, output_dtype=FP16)
    kept = (exact & 0xFFFFFFFF).to(torch.int32).view(FP32)
    close(got, ((x.double() @ w.double() + bias) * kept).half())
    for wrong, message in (
        ({"output_dtype": BF16}, "output_dtype must be float16"),
        ({}, "output_dtype must be float16"),
    ):
        with pytest.raises((LimitError, RuntimeError), match=message):
            torch_npu.npu_quant_matmul(pack(x), packed, exact, **wrong)


def pack(x: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_convert_weight_to_int4pack(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scales", ["one", "columns", "groups"])
def test_weight_quant_batchmatmul_of_int4(a2, scales, transposed) -> None:
    k = 80  # the last group of 32 rows is a short one
    x, w = rand(M, k), int4(k, OUT)
    rows = {"one": (1, 1), "columns": (1, OUT), "groups": (3, OUT)}[scales]
    scale, offset = (torch.rand(*rows) * 0.1).to(BF16), int4(*rows, seed=2).to(BF16)
    packed = pack(w.t().contiguous()).t() if transposed else pack(w)
    got = torch_npu.npu_weight_quant_batchmatmul(
        x, packed, scale, offset, antiquant_group_size=32 if scales == "groups" else 0
    )
    spread = [t.float().repeat_interleave(32, 0)[:k] if scales == "groups" else t.float() for t in (scale, offset)]
    close(got, (x.float() @ ((w.float() + spread[1]) * spread[0]).to(BF16).float()).to(BF16), 4)


def test_weight_quant_batchmatmul_by_groups_of_int8(a2) -> None:
    x, w, scale = rand(M, 96), int8(96, OUT), (torch.rand(3, OUT) * 1e-2).to(BF16)
    got = torch_npu.npu_weight_quant_batchmatmul(x, w, scale, antiquant_group_size=32)
    wide = (w.float() * scale.float().repeat_interleave(32, 0)).to(BF16)
    close(got, (x.float() @ wide.float()).to(BF16), 4)
    for size in (16, 33, 96):
        with pytest.raises(LimitError, match="antiquant_group_size must be a multiple of 32 below 96"):
            torch_npu.npu_weight_quant_batchmatmul(x, w, scale, antiquant_group_size=size)


def test_duo_has_no_int4(duo) -> None:
    x, packed = rand(M, K, dtype=FP16), int4(K, 4)
    with pytest.raises(LimitError, match="weight must be int8"):
        torch_npu.npu_weight_quant_batchmatmul(x, packed, torch.ones(32, dtype=FP16))
    with pytest.raises(LimitError, match="antiquant_group_size must be 0"):
        scale = torch.ones(2, OUT, dtype=FP16)
        torch_npu.npu_weight_quant_batchmatmul(x, int8(K, OUT), scale, antiquant_group_size=32)
    with pytest.raises(LimitError, match="x1 must be int8"):
        torch_npu.npu_quant_matmul(int4(M, 8), packed, torch.ones(32), output_dtype=FP16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
def test_grouped_matmul_of_int4(a2, per_group, transposed) -> None:
    x, w, counts = rand(5, K), int4(2, K, OUT), torch.tensor([2, 5])
    packed = pack(w.transpose(1, 2).contiguous()).transpose(1, 2) if transposed else pack(w)
    shape = (2, 4, OUT) if per_group else (2, OUT)
    scale, offset = (torch.rand(*shape) * 0.1).to(BF16), int4(*shape, seed=2).to(BF16)
    (got,) = torch_npu.npu_grouped_matmul(
        [x], [packed], antiquant_scale=[scale], antiquant_offset=[offset], group_list=counts, split_item=2, group_type=0
    )
    for rows, i in ((slice(0, 2), 0), (slice(2, 5), 1)):
        s, o = (t[i].float().repeat_interleave(K // 4, 0) if per_group else t[i].float() for t in (scale, offset))
        close(got[rows], (x[rows].float() @ ((w[i].float() + o) * s).to(BF16).float()).to(BF16), 4)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_grouped_matmul_swiglu_quant_in_its_first_form(a2, dtype) -> None:
    x, w = int8(5, 32), torch_npu.npu_format_cast(int8(2, 32, 64, seed=1), NZ)
    scale, tokens, totals = (torch.rand(2, 64) * 1e-3).to(dtype), torch.rand(5) + 0.5, torch.tensor([2, 4])
    y, out_scale, _ = like_meta(torch_npu.npu_grouped_matmul_swiglu_quant, x, w, totals, scale, tokens)
    for rows, i in ((slice(0, 2), 0), (slice(2, 4), 1)):
        gate, up = (x[rows].double() @ w[i].double() * scale[i].double() * tokens[rows, None]).chunk(2, -1)
        wanted = torch.nn.functional.silu(gate) * up
        assert (y[rows] * out_scale[rows, None] - wanted).abs().max() <= out_scale[rows].max() * 0.51
    assert out_scale[4].isnan(), "rows beyond the last total are dirty"
    with pytest.raises(LimitError, match="weight must be in FRACTAL_NZ.*got ND"):
        torch_npu.npu_grouped_matmul_swiglu_quant(x, w.clone(), totals, scale, tokens)
    with pytest.raises(LimitError, match="bias must be None"):
        torch_npu.npu_grouped_matmul_swiglu_quant(x, w, totals, scale, tokens, bias=torch.zeros(2, 64))


def int8_by_int4(per_group: bool):
    """x, packed weights, scales as bits, scales by tokens, what makes up for the halves, and the product in fp64."""
    k, n, counts = 512, 64, torch.tensor([2, 0, 3])
    x, w, tokens = int8(5, k), int4(3, k, n, seed=1), torch.rand(5) + 0.5
    scale = torch.rand(3, 2 if per_group else 1, n) * 1e-3
    wide = w.double() * scale.double().repeat_interleave(k // scale.shape[1], 1)
    exact = torch.cat([x[:2].double() @ wide[0], x[2:].double() @ wide[2]]) * tokens[:, None]
    bits = scale.view(torch.int32).long() & 0xFFFFFFFF
    return x, pack(w), bits, tokens, (8 * wide.sum(1)).float(), counts, exact


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("out", [BF16, FP16])
def test_grouped_matmul_of_int8_rows_by_int4(a2, out, per_group) -> None:
    x, w, scale, tokens, sums, counts, exact = int8_by_int4(per_group)
    call = {"group_list": counts, "split_item": 2, "group_type": 0, "group_list_type": 1, "output_dtype": out}
    call |= {"scale": [scale], "per_token_scale": [tokens], "bias": [sums]}
    (got,) = like_meta(torch_npu.npu_grouped_matmul, [x], [w], **call)
    close(got, exact.to(out), 4)
    (without,) = torch_npu.npu_grouped_matmul([x], [w], **call | {"bias": [torch.zeros_like(sums)]})
    assert (without - exact).norm() > 0.1 * exact.norm(), "the sums are no matter of taste"
    for wrong, message in (
        ({"bias": None}, "must be one tensor each"),
        ({"bias": [sums.half()]}, "bias must be float32"),
        ({"scale": [scale.float()]}, "scale must be int64"),
        ({"scale": [scale[:, 0]]}, "scale must have shape"),
        ({"group_list": counts.cumsum(0), "group_list_type": 0}, r"must be 1 \(counts\)"),
        ({"output_dtype": None}, "output_dtype must be"),
    ):
        with pytest.raises(LimitError, match=message):
            torch_npu.npu_grouped_matmul([x], [w], **call | wrong)
    with pytest.raises(LimitError, match="a multiple of 256"):
        torch_npu.npu_grouped_matmul([x[:, :128].contiguous()], [w[:, :128].contiguous()], **call)


def test_grouped_matmul_swiglu_quant_of_int4(a2) -> None:
    x, w, scale, tokens, sums, counts, exact = int8_by_int4(False)
    w = torch_npu.npu_format_cast(w.view(torch.int8), NZ).view(torch.int32)
    call = {"weight_assist_matrix": [sums], "group_list_type": 1}
    operands = [x, [w], [scale[:, 0]], tokens, counts]
    y, out_scale = like_meta(torch_npu.npu_grouped_matmul_swiglu_quant_v2, *operands, **call)
    gate, up = exact.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    assert (y * out_scale[:, None] - wanted).abs().max() <= out_scale.max() * 0.51
    for wrong, message in (
        ({"weight_assist_matrix": None}, "weight_assist_matrix must be given"),
        ({"weight_assist_matrix": [sums[:, :8]]}, "weight_assist_matrix must have shape"),
    ):
        with pytest.raises(LimitError, match=message):
            torch_npu.npu_grouped_matmul_swiglu_quant_v2(*operands, **call | wrong)
    with pytest.raises(LimitError, match="x must not be empty"):
        torch_npu.npu_grouped_matmul_swiglu_quant_v2(x[:0], *operands[1:3], tokens[:0], counts * 0, **call)
    with pytest.raises(LimitError, match="weight_scale must be int64"):
        torch_npu.npu_grouped_matmul_swiglu_quant_v2(x, [w], [scale[:, 0].float()], tokens, counts, **call)
