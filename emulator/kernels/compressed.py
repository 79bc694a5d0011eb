"""npu_matmul_compress_dequant: a product by a weight that stays compressed (W8A8SC, 300I DUO).

Documented (page of aclnnMatmulCompressDequant, docstring and meta kernel of the op, msmodelslim's compressor): types,
ranks, `(x1 @ unzip(x2) + bias) * deqScale` in fp16, lossless, tiles of 8 x 8 fractals of 32 inputs by 16 outputs, eight
bytes of index for a tile. Not documented: the codec, and what the eight bytes are; it is closed and lives in CANN. So
only what `zip_weight` below wrote can be computed here, a stand-in of the documented sizes that leaves out tiles of
zeros; a weight compressed for a chip is refused. m rows, k inputs, n outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emulator.kernels.matmul import int_product
from emulator.kernels.quant import scale_of_param
from emulator.limits import refuse, require, require_dtype, require_rank, require_shape
from emulator.registry import kernel

TILE = 8  # fractals of a tile, either way
INPUTS, OUTPUTS = 32, 16  # of a fractal
INDEX_BYTES = 8  # of a tile
_MARK = 0x5A  # the stand-in's own, in an entry's last byte
_OFFSET_BYTES = 6


def num_tiles(k: int, n: int) -> int:
    """Tiles of a weight: each covers 256 inputs and 128 outputs."""
    return -(-k // (TILE * INPUTS)) * -(-n // (TILE * OUTPUTS))


def zip_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [n, k]` int8 -> the stand-in's `(x2 [c], index [8 * tiles])`, both int8; tiles of zeros are left out."""
    n, k = weight.shape
    parts, entries, offset = [], [], 0
    for rows in F.pad(weight, (0, -k % (TILE * INPUTS), 0, -n % (TILE * OUTPUTS))).split(TILE * OUTPUTS):
        for tile in rows.split(TILE * INPUTS, dim=1):
            stored = bool(tile.any())
            entries.append([*offset.to_bytes(_OFFSET_BYTES, "little"), int(stored), _MARK])
            if stored:
                parts.append(
                    tile.unflatten(0, (TILE, OUTPUTS)).unflatten(2, (TILE, INPUTS)).permute(2, 0, 1, 3).flatten()
                )
                offset += tile.numel()
    index = torch.tensor(entries, dtype=torch.uint8).flatten().view(torch.int8)
    return (torch.cat(parts) if parts else weight.new_zeros(1)), index


def unzip_weight(x2: Tensor, index: Tensor, k: int, n: int) -> Tensor:
    """The inverse: `[n, k]`. LimitError for what `zip_weight` did not write."""
    across = -(-k // (TILE * INPUTS))
    size = TILE * INPUTS * TILE * OUTPUTS
    tiles = []
    for entry in index.view(torch.uint8).view(-1, INDEX_BYTES).tolist():
        offset = int.from_bytes(bytes(entry[:_OFFSET_BYTES]), "little")
        written = entry[-1] == _MARK and entry[-2] in (0, 1) and offset + entry[-2] * size <= len(x2)
        require(
            written, "compress_index is not the emulator's stand-in: the chip's own codec is closed, see zip_weight"
        )
        if entry[-2]:
            tile = x2[offset : offset + size].view(TILE, TILE, OUTPUTS, INPUTS).permute(1, 2, 0, 3)
            tiles.append(tile.reshape(TILE * OUTPUTS, TILE * INPUTS))
        else:
            tiles.append(x2.new_zeros(TILE * OUTPUTS, TILE * INPUTS))
    rows = [torch.cat(tiles[start : start + across], dim=1) for start in range(0, len(tiles), across)]
    return torch.cat(rows)[:n, :k]


def _check(
    x1: Tensor, x2: Tensor, compress_index: Tensor, bias: Tensor, scale: Tensor, *, offsetW: Tensor | None = None,
    offsetX: int | None = None,
) -> None:  # fmt: skip
    refuse(offsetW=offsetW, offsetX=offsetX or None)
    require_dtype("x1", x1, (torch.int8,))
    require_rank("x1", x1, 2)
    for name, x in (("x2", x2), ("compress_index", compress_index)):
        require_dtype(name, x, (torch.int8,))
        require_rank(name, x, 1)
    require_dtype("bias", bias, (torch.int32,))
    require_rank("bias", bias, 2)
    # The meta kernel wants uint64, which a checkpoint and npu_trans_quant_param write as int64: the bits are the same.
    require_dtype("scale", scale, (torch.uint64, torch.int64))
    require_rank("scale", scale, 2)
    columns = bias.shape[1]
    require_shape("bias", bias, 1, columns)
    # k and n of the compressed weight are taken from x1 and scale: a single scale would make n 1.
    require_shape("scale", scale, 1, columns)
    require_shape("compress_index", compress_index, INDEX_BYTES * num_tiles(x1.shape[1], columns))


@kernel("npu_matmul_compress_dequant", _check)
def npu_matmul_compress_dequant(
    x1: Tensor, x2: Tensor, compress_index: Tensor, bias: Tensor, scale: Tensor, **_: object
) -> Tensor:
    weight = unzip_weight(x2, compress_index, x1.shape[1], bias.shape[1])
    y = int_product(x1, weight.t()) + bias
    return (y.float() * scale_of_param(scale.view(torch.int64))[0]).half()
