"""How many bytes of a media file are missing at its end, by the lengths that the file itself states.

Demuxers read what is there and then report the end of the file, cut or not; the outermost boxes, elements and chunks
say how long they should be. Reads headers only. Knows nothing of tracks, frames or pixels.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MAX_HEADERS = 1_000_000  # a live Matroska stream has one for every frame
_UNKNOWN = None


def missing_bytes(content: bytes | Path) -> int:
    """Bytes that the file promises beyond its end; 0 where it is whole, or where its format states no length.

    Known: ISO base media (MP4, MOV, AVIF), Matroska and WebM, RIFF (AVI, WebP), ASF, Ogg pages, MPEG transport
    streams. Not known (a cut between two frames cannot be seen): MPEG program streams, FLV, raw streams.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        head = _read(file, 0, 512)
        walk = _walk_of(head)
        if walk is _UNKNOWN:
            return _missing_of_transport_stream(head, length)
        for number, end in enumerate(walk(file, length)):
            if end > length:
                return end - length
            if number > _MAX_HEADERS:
                break
    return 0


def _walk_of(head: bytes):
    """The function that yields where each outer part of such a file ends."""
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska_ends
    if head[:4] == b"RIFF":
        return _riff_ends
    if head[:4] == b"OggS":
        return _ogg_ends
    if head[:4] == b"\x30\x26\xb2\x75":
        return _asf_ends
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _iso_ends
    return _UNKNOWN


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _iso_ends(file: BinaryIO, length: int) -> Iterator[int]:
    """ISO/IEC 14496-12, 4.2: size and type, a size of 1 is followed by 64 bits, 0 means "to the end"."""
    position = 0
    while position + 8 <= length:
        header = _read(file, position, 16)
        size, kind = struct.unpack_from(">I4s", header)
        if size == 1 and len(header) == 16:
            size = struct.unpack_from(">Q", header, 8)[0]
        if size < 8 or not kind.isascii():
            return
        position += size
        yield position


def _riff_ends(file: BinaryIO, length: int) -> Iterator[int]:
    """Several RIFF chunks follow each other in an AVI above 1 GiB; unfinished recordings state no size."""
    position = 0
    while position + 8 <= length:
        kind, size = struct.unpack("<4sI", _read(file, position, 8))
        if kind != b"RIFF" or size in (0, 0xFFFFFFFF):
            return
        position += 8 + size
        yield position
        position += size % 2


def _asf_ends(file: BinaryIO, length: int) -> Iterator[int]:
    position = 0
    while position + 24 <= length:
        size = struct.unpack("<Q", _read(file, position + 16, 8))[0]
        if size < 24:
            return
        position += size
        yield position


def _ogg_ends(file: BinaryIO, length: int) -> Iterator[int]:
    position = 0
    while position + 27 <= length:
        header = _read(file, position, 27 + 255)
        if header[:4] != b"OggS":
            return
        segments = header[27 : 27 + header[26]]
        position += 27 + header[26] + sum(segments)
        yield position if len(segments) == header[26] else length + 1


def _matroska_ends(file: BinaryIO, length: int) -> Iterator[int]:
    """RFC 8794: an id of 1 to 4 bytes, a size of 1 to 8; all ones is an unknown size, whose children come next."""
    position = 0
    while position < length:
        header = _read(file, position, 12)
        id_length = 9 - header[0].bit_length()
        if id_length > 4:
            return
        if id_length >= len(header):
            yield length + 1
            return
        size_length = 9 - header[id_length].bit_length()
        if size_length > 8:
            return
        if id_length + size_length > len(header):
            yield length + 1
            return
        size = int.from_bytes(header[id_length : id_length + size_length]) & ((1 << 7 * size_length) - 1)
        position += id_length + size_length
        if size != (1 << 7 * size_length) - 1:
            position += size
            yield position


def _missing_of_transport_stream(head: bytes, length: int) -> int:
    for packet_bytes, first in ((188, 0), (192, 4)):
        if len(head) > first + packet_bytes and head[first] == head[first + packet_bytes] == 0x47:
            return -length % packet_bytes
    return 0
