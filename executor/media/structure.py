"""Where a video file stops to be what its container's format prescribes: bytes overwritten, zeroed or left out.

Demuxers look for the next part that they know and go on from there without a word. Here the headers of all parts are
followed, from one to the next. Reads headers only; knows nothing of frames or pixels. Known: Matroska and WebM, AVI,
MPEG transport and program streams, IVF. Others: see `damaged_at`.
"""

import io
import re
import struct
from pathlib import Path
from typing import BinaryIO

_MAX_PARTS = 2_000_000
_CHUNK_PACKETS = 2**15
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
# RFC 9559: what may stand in a Segment, and in a Cluster; both go on with the next Segment's header.
_MATROSKA_IDS = frozenset(
    (
        *(0x1A45DFA3, _SEGMENT, _CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770),
        *(0x1254C367, 0xEC, 0xBF, 0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF),
    )
)
_AVI_CHUNK = re.compile(rb"[0-9A-Fa-f]{2}[A-Za-z]{2}|ix\d\d|JUNK|LIST|RIFF|idx1|indx|INFO|[a-zA-Z]{4}")
_ZEROS_AT_LEAST = 1024


def damaged_at(content: bytes | Path) -> int | None:
    """The first byte that is no part of the file's format; None for a whole file, and for formats not known here.

    Of FLV and raw streams only zero bytes at the end are noticed. A file that is merely cut short may give its end.
    """
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        head = _read(file, 0, 512)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _damage_of_matroska(file, length)
        if head[:4] == b"RIFF":
            return _damage_of_avi(file, length)
        if head[:4] == b"DKIF":
            return _damage_of_ivf(file, length)
        if head[:4] == b"\0\0\x01\xba":
            return _damage_of_program_stream(file, length)
        for packet_bytes, first in ((188, 0), (192, 4)):
            if len(head) > first + packet_bytes and head[first] == head[first + packet_bytes] == 0x47:
                return _damage_of_transport_stream(file, packet_bytes, first)
        if head[:3] in (b"FLV", b"\0\0\0", b"\0\0\x01") and head[4:8] != b"ftyp":
            return _zeros_at_end(file, length)
    return None


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _damage_of_matroska(file: BinaryIO, length: int) -> int | None:
    """Segments and clusters are entered, so that their sizes, known or not, do not matter; bytes behind a segment of
    known size are not the video's."""
    position, segment_end = 0, length
    for _ in range(_MAX_PARTS):
        header = _read(file, position, 12)
        if len(header) < 2:
            return None
        id_length = 9 - header[0].bit_length()
        if int.from_bytes(header[:id_length]) not in _MATROSKA_IDS:
            return position
        if id_length >= len(header):
            return None
        size_length = 9 - header[id_length].bit_length()
        if size_length > 8:
            return position
        size = int.from_bytes(header[id_length : id_length + size_length]) & ((1 << 7 * size_length) - 1)
        position += id_length + size_length
        if int.from_bytes(header[:id_length]) not in (_SEGMENT, _CLUSTER):
            position += size
        elif int.from_bytes(header[:id_length]) == _SEGMENT and size != (1 << 7 * size_length) - 1:
            segment_end = position + size
        if position >= min(length, segment_end):
            return None
    return None


def _damage_of_avi(file: BinaryIO, length: int) -> int | None:
    """Lists are entered: the chunks of all frames follow each other."""
    position, riff_end = 0, 0
    for _ in range(_MAX_PARTS):
        header = _read(file, position, 8)
        if len(header) < 8:
            return None
        kind, size = struct.unpack("<4sI", header)
        if kind == b"RIFF":
            riff_end = position + 8 + size + size % 2
        elif position == riff_end:  # what follows is not the video's
            return None
        if not _AVI_CHUNK.fullmatch(kind):
            return position
        position += 12 if kind in (b"RIFF", b"LIST") else 8 + size + size % 2
        if position >= length:
            return None
    return None


def _damage_of_ivf(file: BinaryIO, length: int) -> int | None:
    """Of each frame the size, 32 bits, and the time, 64 bits, which never goes back."""
    position, before = int.from_bytes(_read(file, 6, 2), "little"), -1
    promised = int.from_bytes(_read(file, 24, 4), "little")
    for number in range(_MAX_PARTS):
        header = _read(file, position, 12)
        if len(header) < 12:
            return position if header or number < promised else None
        size, time = struct.unpack("<IQ", header)
        if time <= before or position + 12 + size > length:
            return position
        position, before = position + 12 + size, time
    return None


def _damage_of_program_stream(file: BinaryIO, length: int) -> int | None:
    """ISO/IEC 13818-1, 2.5.3 (and 11172-1): pack headers, and packets that state their length."""
    position = 0
    for _ in range(_MAX_PARTS):
        header = _read(file, position, 14)
        if len(header) < 14:
            return None
        if header[:3] != b"\0\0\x01" or header[3] < 0xB9:
            return position
        if header[3] == 0xB9:
            position += 4
        elif header[3] == 0xBA:
            position += 14 + (header[13] & 7) if header[4] >> 6 == 1 else 12
        else:
            position += 6 + int.from_bytes(header[4:6])
        if position >= length:
            return None
    return None


def _damage_of_transport_stream(file: BinaryIO, packet_bytes: int, first: int) -> int | None:
    """Every packet begins with the same byte."""
    file.seek(0)
    position = 0
    while data := file.read(packet_bytes * _CHUNK_PACKETS):
        marks = data[first::packet_bytes]
        if marks.count(0x47) < len(marks):
            return position + packet_bytes * next(at for at, mark in enumerate(marks) if mark != 0x47)
        position += len(data)
    return None


def _zeros_at_end(file: BinaryIO, length: int) -> int | None:
    tail = _read(file, max(0, length - _ZEROS_AT_LEAST), _ZEROS_AT_LEAST)
    return length - len(tail) if len(tail) == _ZEROS_AT_LEAST and not any(tail) else None
