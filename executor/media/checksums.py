"""Damage to pictures that their decoder passes over: what a file says of its own bytes is compared with them.

Pillow checks neither the checksums of a PNG's pixels nor whether a JPEG has an end. Decodes nothing. What cannot be
noticed: changed bytes inside the pixels of formats without checksums (JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF).
"""

import struct
import zlib
from pathlib import Path

from executor.media.formats import HEAD_BYTES

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
_BARE_MARKERS = (0x01, *range(0xD0, 0xD9))  # without a length: TEM, RST0 to RST7, SOI
_ZEROS_AT_LEAST = 16


def damage(content: bytes | Path, *, first_frame: bool) -> tuple[int, str] | None:
    """Where in the file the first damage begins (in bytes) and what it is; None for what is whole or cannot be told.

    first_frame: of an animated PNG only its first frame is looked at. Raises OSError for a file that cannot be read.
    """
    head = content[:HEAD_BYTES] if isinstance(content, bytes) else _head(content)
    if not head.startswith((_PNG, _JPEG)):
        return None
    data = content if isinstance(content, bytes) else content.read_bytes()
    return _damage_of_png(data, first_frame) if head.startswith(_PNG) else _damage_of_jpeg(data)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _damage_of_png(data: bytes, first_frame: bool) -> tuple[int, str] | None:
    """PNG, third edition, 5.3: length, type, data, and a CRC-32 of the last two, of every chunk up to IEND."""
    view, at = memoryview(data), len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if first_frame and kind == b"fdAT":
            return None
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return at, f"the checksum of its part {kind.decode('ascii', 'replace')} at byte {at} is wrong"
        if kind == b"IEND":
            return None
        at = end + 4
    return at, f"it ends at byte {len(data)}, before its last part"


def _damage_of_jpeg(data: bytes) -> tuple[int, str] | None:
    """ISO/IEC 10918-1, B.1: segments with lengths up to the first scan, and an EOI behind the last one.

    Some cameras leave the EOI out; zero bytes instead are those of a download or copy that was never finished.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        bare = data[at + 1] in _BARE_MARKERS
        at += 1 if data[at + 1] == 0xFF else 2 if bare else 2 + int.from_bytes(data[at + 2 : at + 4])
    end = len(data.rstrip(b"\0"))
    if len(data) - end >= _ZEROS_AT_LEAST and data.find(_END_OF_IMAGE, at) < 0:
        return end, f"from byte {end} on it is nothing but zero bytes"
    return None
