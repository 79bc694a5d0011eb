"""Stands in for CANN's compressor: the same command line and files, and the emulator's codec (zip_weight).

Standard library only, as it is started once for every weight; a test holds it against emulator/kernels/compressed.py.
Blocks are fractals of 16 outputs by 32 inputs, as the file has them; tiles of 8 by 8 that are all zeros are left out.
"""

import struct
import sys

BLOCK, TILE, MARK = 512, 8, 0x5A


def main(dim_k, dim_n, tight, k_value, n_value, kind, tiling, given, values, index, info):
    if [tight, k_value, n_value, kind, tiling] != ["1", "1", "1", "0", "0"]:
        print("unexpected parameters")
        return
    across, down = int(dim_k), int(dim_n)
    with open(given, "rb") as file:
        data = file.read()
    if len(data) != across * down * BLOCK:
        print(f"Invalid param: expected len={across * down * BLOCK}, but file size={len(data)}")
        return
    parts, entries, offset = [], [], 0
    for first_n in range(0, down, TILE):
        for first_k in range(0, across, TILE):
            tile = b"".join(
                data[(k * down + n) * BLOCK : (k * down + n + 1) * BLOCK] if k < across and n < down else bytes(BLOCK)
                for k in range(first_k, first_k + TILE)
                for n in range(first_n, first_n + TILE)
            )
            stored = tile.count(0) < len(tile)
            entries.append(offset.to_bytes(6, "little") + bytes([stored, MARK]))
            if stored:
                parts.append(tile)
                offset += len(tile)
    packed = b"".join(parts) or bytes(1)
    for path, content in (
        (values, packed),
        (index, b"".join(entries)),
        (info, struct.pack("<3I", TILE, TILE, len(packed))),
    ):
        with open(path, "wb") as file:
            file.write(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
