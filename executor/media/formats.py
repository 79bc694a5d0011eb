"""What a file is, by its first bytes: pictures and videos that are read, and what else is mistaken for one.

Decodes nothing. Magic numbers are those of the formats' specifications and of the `file` command's public list.
"""

import re
from typing import Literal

Kind = Literal["image", "video"]

HEAD_BYTES = 512  # enough for every signature below; an MPEG transport stream needs 197

_STARTS: dict[bytes, tuple[Kind, str]] = {
    b"\x89PNG\r\n\x1a\n": ("image", "PNG"),
    b"\xff\xd8\xff": ("image", "JPEG"),
    b"GIF8": ("image", "GIF"),
    b"II*\0": ("image", "TIFF"),
    b"MM\0*": ("image", "TIFF"),
    b"II+\0": ("image", "TIFF"),
    b"MM\0+": ("image", "TIFF"),
    b"\0\0\0\x0cjP  ": ("image", "JPEG 2000"),
    b"\x1a\x45\xdf\xa3": ("video", "Matroska/WebM"),
    b"FLV\x01": ("video", "FLV"),
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": ("video", "ASF/WMV"),
    b"OggS": ("video", "Ogg"),
    b"\0\0\x01\xba": ("video", "MPEG program stream"),
    b"\0\0\x01\xb3": ("video", "MPEG video"),
    b"DKIF": ("video", "IVF"),
    b"nut/multimedia container\0": ("video", "NUT"),
}
_PORTABLE_MAP = re.compile(rb"P[1-6][\s#]")
_H264 = re.compile(rb"\0?\0\0\x01(?:[\x07\x27\x47\x67][\x42\x4d\x58\x64\x6e\x7a\xf4]|\x09[\x10-\xff])")
_H265 = re.compile(rb"\0?\0\0\x01(?:\x40\x01|\x46\x01)")

_CONVERT = "save it as PNG or JPEG"
_MAGICK = f"{_CONVERT}, e.g. with ImageMagick: magick INPUT OUTPUT.png"
_HEIF = "a HEIC/HEIF picture, as phones make them", "save it as JPEG, e.g. heif-convert INPUT.heic OUTPUT.jpg (libheif)"
_RAW = "a camera's raw picture", "develop it to JPEG or PNG, e.g. with darktable, RawTherapee or dcraw"
_SOUND = "sound without pictures", "these models do not hear; give a picture or a video"
_OFFICE = "export its pages as PDF, and those as pictures: pdftoppm -r 150 -png INPUT.pdf page"
_PDF = "a PDF document", "turn its pages into pictures: pdftoppm -r 150 -png INPUT.pdf page"
_DOWNLOAD = "what was saved is a server's answer, not the file; open it in an editor, and download the file again"
_UNPACK = "unpack it and give the files in it"

# First bytes (at an offset) of what is no picture or video that is read: what it is, and what to do.
_FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file", "run `git lfs pull` in its repository"),
    (0, b"\xff\x0a", "a JPEG XL picture", f"{_CONVERT}, e.g. djxl INPUT.jxl OUTPUT.png"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", f"{_CONVERT}, e.g. djxl INPUT.jxl OUTPUT.png"),
    (4, b"ftypcrx ", *_RAW),
    (8, b"CR\x02", *_RAW),
    (0, b"FUJIFILMCCD-RAW", *_RAW),
    (0, b"IIRO", *_RAW),
    (0, b"IIRS", *_RAW),
    (0, b"MMOR", *_RAW),
    (0, b"IIU\0", *_RAW),
    (0, b"FOVb", *_RAW),
    (0, b"II\x1a\0\0\0HEAPCCDR", *_RAW),
    (0, b"\0MRM", *_RAW),
    (0, b"%PDF", *_PDF),
    (0, b"%!PS", "a PostScript document", "turn it into a picture: gs -sDEVICE=png16m -o OUTPUT.png INPUT"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document", "turn it into a picture: gs -sDEVICE=png16m -o OUTPUT.png INPUT"),
    (0, b"8BPS", "a Photoshop document", _MAGICK),
    (0, b"gimp xcf", "a GIMP document", _MAGICK),
    (0, b"icns", "a macOS icon", _MAGICK),
    (0, b"DDS ", "a DirectDraw surface", _MAGICK),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR picture", _MAGICK),
    (0, b"#?RADIANCE", "a Radiance picture", _MAGICK),
    (0, b"qoif", "a QOI picture", _MAGICK),
    (0, b"BPG\xfb", "a BPG picture", f"{_CONVERT}, e.g. bpgdec -o OUTPUT.png INPUT.bpg"),
    (0, b"SIMPLE  =", "a FITS file", f"{_CONVERT}, e.g. with astropy"),
    (128, b"DICM", "a DICOM file", f"{_CONVERT}, e.g. dcmj2pnm INPUT.dcm OUTPUT.png (dcmtk)"),
    (0, b"AT&TFORM", "a DjVu document", "turn its pages into pictures: ddjvu -format=tiff INPUT OUTPUT.tif"),
    (0, b"P7\n", "a PAM picture", _MAGICK),
    (0, b"\x93NUMPY", "a NumPy array", f"{_CONVERT}, or hand the array over in Python"),
    (0, b"\0\x05\x16\x07", "the macOS companion of a file, not the file", "give the file without the leading ._"),
    (0, b"ID3", *_SOUND),
    (0, b"fLaC", *_SOUND),
    (0, b"#!AMR", *_SOUND),
    (0, b"MThd", *_SOUND),
    (8, b"AIFF", *_SOUND),
    (8, b"AIFC", *_SOUND),
    (4, b"ftypM4A", *_SOUND),
    (4, b"ftypM4B", *_SOUND),
    (0, b".RMF", "a RealMedia video", "convert it: ffmpeg -i INPUT OUTPUT.mp4"),
    (0, b"\x06\x0e\x2b\x34\x02\x05\x01\x01", "an MXF video", "convert it: ffmpeg -i INPUT OUTPUT.mp4"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", _OFFICE),
    (0, b"{\\rtf", "an RTF document", _OFFICE),
    (0, b"#EXTM3U", "a playlist, not a video", "join its parts: ffmpeg -i INPUT.m3u8 -c copy OUTPUT.mp4"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"/9j/", "base64 text", "decode it (base64 -d), or give it as data:image/jpeg;base64,..."),
    (0, b"iVBORw0KGgo", "base64 text", "decode it (base64 -d), or give it as data:image/png;base64,..."),
    (0, b"data:", "the text of a data: URL", "give its content instead of the file's name"),
)
# MPEG audio, layers 2 and 3, and AAC. Not 0xFE, which begins UTF-16 text.
_MPEG_SOUND = re.compile(rb"\xff(?:[\xe2\xe3\xf2\xf3\xfa-\xfd][\x10-\xef]|[\xf0\xf1\xf8\xf9])")

_ICONS = {b"\0\0\x01\0": "a Windows icon", b"\0\0\x02\0": "a Windows cursor"}  # followed by their number, 16 bits


def sniff(head: bytes) -> tuple[Kind, str] | None:
    """Kind and format name by the first bytes of a file (512 are enough), or None when they tell nothing.

    Named here is also what Pillow cannot decode but everybody calls a picture (HEIF): see `foreign`.
    """
    if head[8:11] == b"CR\x02":
        return None
    for magic, found in _STARTS.items():
        if head.startswith(magic):
            return found
    if head[:2] == b"BM" and head[6:10] in (b"\0\0\0\0", b""):  # two reserved fields; text may begin with BM, too
        return "image", "BMP"
    if _PORTABLE_MAP.match(head):
        return "image", "PPM"
    if head[:4] == b"RIFF":
        return {b"WEBP": ("image", "WebP"), b"AVI ": ("video", "AVI")}.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _sniff_iso(head)
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "video", "MP4/MOV"
    if _H264.match(head):
        return "video", "H.264 stream"
    if _H265.match(head):
        return "video", "H.265 stream"
    for packet_bytes, first in ((188, 0), (192, 4)):
        if len(head) > first + packet_bytes and head[first] == head[first + packet_bytes] == 0x47:
            return "video", "MPEG transport stream"
    return None


def _sniff_iso(head: bytes) -> tuple[Kind, str] | None:
    """ISO base media files are told apart by their brands: the major one, then the compatible ones."""
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(head[3] + 256 * head[2], len(head)), 4))]
    if brands[0] in (b"crx ", b"M4A ", b"M4B "):
        return None
    if brands[0] in (b"avif", b"avis") or brands[0] in (b"mif1", b"msf1") and b"avif" in brands:
        return "image", "AVIF"
    if brands[0] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"):
        return "image", "HEIF"
    return "video", "MP4/MOV"


def foreign(head: bytes) -> str | None:
    """ "it is X; do Y" for files that are neither a picture nor a video that is read; None when the bytes tell nothing.

    head: the first 512 bytes. Asked after `sniff`, or for a file that would not open as what `sniff` says.
    """
    if (sniff(head) or ("", ""))[1] == "HEIF":
        return _advise(*_HEIF)
    for offset, magic, what, advice in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            return _advise(what, advice)
    if head[:4] in _ICONS and head[4:6] != b"\0\0":
        return _advise(_ICONS[head[:4]], _MAGICK)
    if _is_targa(head):
        return _advise("a TGA (Targa) picture", _MAGICK)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" or _MPEG_SOUND.match(head):
        return _advise(*_SOUND)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        office = re.search(rb"\[Content_Types\]|word/|xl/|ppt/|mimetypeapplication/vnd.oasis", head)
        return _advise("an office document", _OFFICE) if office else _advise("a ZIP archive", _UNPACK)
    if head and not head.strip(b"\0"):
        return _advise("nothing but zero bytes", "a download or copy of it was never finished; get the file again")
    return _foreign_text(head)


def _is_targa(head: bytes) -> bool:
    """Truevision TGA 2.0 has no signature: the header's fields must fit each other (colour map, type, size, depth)."""
    if len(head) < 18 or head[1] > 1 or head[2] not in (1, 2, 3, 9, 10, 11):
        return False
    map_fits = any(head[5:7]) and head[7] in (15, 16, 24, 32) if head[1] else not any(head[3:8])
    needs_map = head[2] in (1, 9)
    is_sized = head[12:14] != b"\0\0" and head[14:16] != b"\0\0"
    depths = (8, 16) if head[2] in (1, 3, 9, 11) else (15, 16, 24, 32)
    return map_fits and is_sized and (head[1] or not needs_map) and head[16] in depths and head[17] < 64


def _foreign_text(head: bytes) -> str | None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = head[: len(head) // 2 * 2].decode("utf-16", "ignore")
    elif b"\0" in head:
        return None
    else:
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if error.start < len(head) - 4 or len(head) < HEAD_BYTES:  # not merely cut inside its last character
                return None
            text = head[: error.start].decode("utf-8-sig")
    start = text.lstrip().lower()
    if "<svg" in start and start.startswith("<"):
        return _advise("an SVG drawing", "turn it into a picture: rsvg-convert -o OUTPUT.png INPUT.svg")
    if "<html" in start or start.startswith("<!doctype html"):
        return _advise("an HTML page", _DOWNLOAD)
    if "<mpd" in start:
        return _advise("a playlist, not a video", "join its parts: ffmpeg -i INPUT.mpd -c copy OUTPUT.mp4")
    if start.startswith("<"):
        return _advise("an XML text", _DOWNLOAD)
    if start.startswith(("{", "[")):
        return _advise("a JSON text", _DOWNLOAD)
    return _advise("a text", "give a picture or a video") if start else None


def _advise(what: str, advice: str) -> str:
    return f"it is {what}; {advice}"
