"""Storage on the chip: linear weights as [in, out], the FRACTAL_NZ format, paged caches and causal masks.

NZ cuts a matrix into strips of 16 columns: [m, n] -> [n/16, m, 16]. For weights the format is a property of the
storage and the shape stays; in caches and ATB's masks the strips are visible in the shape too.
Legend: E experts, K kv heads, D head dim.
"""

from collections.abc import Sequence

import torch
import torch_npu
from torch import Tensor

from executor.device.ops import KVLayer

NZ = 29  # acl's number of FRACTAL_NZ
STRIP = 16  # elements of a half-precision strip
MASK_SIDE = 2048  # of the compressed causal masks that attention takes
_LEAST = torch.finfo(torch.float16).min


def weight(stored: Tensor, nz: bool) -> Tensor:
    """`[..., out, in]` as checkpoints have it -> `[..., in, out]`, so that no step transposes; in NZ where asked.

    A matrix of one row or one column stays plain: NZ would pad it sixteenfold, and the chip takes it as it is.
    """
    w = stored.transpose(-1, -2).contiguous()
    if nz and min(w.shape[-2:]) > 1:
        w = torch_npu.npu_format_cast(w, NZ)
    return w


def caches(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    formatted: bool,
) -> list[KVLayer]:
    """Zeroed paged caches: "ND" `[blocks, block_size, K, D]`, or "NZ" `[blocks, K*D/16, block_size, 16]`.

    `formatted`: NZ in the storage format too, as ATB on the 300I DUO wants it. Zeroed, because attention multiplies
    the unused rest of a block by zero, and what an allocator leaves there may be no number.
    """  # fmt: skip
    if layout == "ND":
        shape = (num_blocks, block_size, heads, dim)
    else:
        shape = (num_blocks, heads * dim // STRIP, block_size, STRIP)

    def one() -> Tensor:
        if not formatted:
            return torch.zeros(shape, dtype=dtype, device=device)
        return torch_npu.empty_with_format(shape, dtype=dtype, device=device, acl_format=NZ).zero_()

    return [KVLayer(one(), one()) for _ in range(num_layers)]


def in_strips(cache: KVLayer) -> bool:
    """Whether a cache is "NZ": no head is as narrow as a strip."""
    return cache.k.shape[-1] == STRIP


def triangle(device: torch.device) -> Tensor:
    """The compressed causal mask of npu_fused_infer_attention_score: int8 `[2048, 2048]`, 1 above the diagonal."""
    return torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.int8).triu_(1).to(device)


def additive_triangle(device: torch.device) -> Tensor:
    """The same for chunks on the 300I DUO: fp16 `[2048, 2048]`, plain, the least fp16 above the diagonal."""
    hidden = torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu_(1)
    return torch.zeros(MASK_SIDE, MASK_SIDE, dtype=torch.float16).masked_fill_(hidden, _LEAST).to(device)


def rows_nz(q_lens: Sequence[int], kv_lens: Sequence[int], device: torch.device) -> Tensor:
    """A row for every token of a step of chunks, NZ: causal inside each request, all hidden behind its last key."""
    hidden = torch.ones(sum(q_lens), max(kv_lens), dtype=torch.bool)
    start = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        later = torch.ones(q_len, kv_len, dtype=torch.bool).triu_(kv_len - q_len + 1)
        hidden[start : start + q_len, :kv_len] = later
        start += q_len
    return _mask_nz(hidden, device)


def _mask_nz(hidden: Tensor, device: torch.device) -> Tensor:
    """`hidden [m, n]` as an additive fp16 mask in strips, both sides padded to whole strips."""
    rows, columns = (-(-size // STRIP) * STRIP for size in hidden.shape)
    mask = torch.zeros(rows, columns, dtype=torch.float16)
    mask[: hidden.shape[0], : hidden.shape[1]].masked_fill_(hidden, _LEAST)
    strips = mask.view(rows, columns // STRIP, STRIP).transpose(0, 1).unsqueeze(0).contiguous()
    return torch_npu.npu_format_cast(strips.to(device), NZ)
