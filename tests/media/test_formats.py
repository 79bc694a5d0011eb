"""What is mistaken for a picture or video is named, with what to do."""

import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from executor.errors import UserError
from executor.media.formats import foreign, sniff
from executor.media.image import decode_image
from executor.media.media import load_media
from executor.media.sampling import Sampling, spread
from executor.media.video import read_video
from tests.media.media_files import make_frames


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def box(brand: bytes, *compatible: bytes) -> bytes:
    return struct.pack(">I4s4sI", 16 + 4 * len(compatible), b"ftyp", brand, 0) + b"".join(compatible) + b"\0" * 64


FOREIGN = {  # name: (bytes, what the message says)
    "heic": (box(b"heic", b"mif1"), "HEIC.*heif-convert"),
    "heif": (box(b"mif1", b"heic"), "HEIC.*heif-convert"),
    "heif sequence": (box(b"hevc", b"heic"), "HEIC"),
    "jxl": (b"\xff\x0a\xfa\x1f\x41" + b"\x90" * 40, "JPEG XL.*djxl"),
    "jxl box": (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40, "JPEG XL"),
    "cr2": (b"II*\0\x10\0\0\0CR\x02\0" + b"\0" * 40, "raw picture"),
    "cr3": (box(b"crx "), "raw picture"),
    "raf": (b"FUJIFILMCCD-RAW 0201", "raw picture"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG.*rsvg-convert"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF.*pdftoppm"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "psd": (b"8BPS\0\x01" + b"\0" * 30, "Photoshop"),
    "cur": (b"\0\0\x02\0\x01\0\x10\x10" + b"\0" * 40, "cursor"),
    "ico": (b"\0\0\x01\0\x01\0\x10\x10" + b"\0" * 40, "icon"),
    "dicom": (b"\0" * 128 + b"DICM" + b"\0" * 40, "DICOM"),
    "mp3": (b"ID3\x04\0\0" + b"\0" * 40, "sound without pictures"),
    "mp3 bare": (b"\xff\xfb\x90\x64" + b"\0" * 40, "sound"),
    "aac": (b"\xff\xf1\x50\x80" + b"\0" * 40, "sound"),
    "flac": (b"fLaC\0\0\0\x22" + b"\0" * 40, "sound"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40, "sound"),
    "m4a": (box(b"M4A ", b"mp42"), "sound"),
    "docx": (zipped("word/document.xml"), "office document"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 40, "Office document"),
    "zip": (zipped("a.png"), "ZIP archive.*unpack"),
    "gzip": (b"\x1f\x8b\x08\0" + b"\0" * 40, "gzip"),
    "html": (b"<!DOCTYPE html>\n<html><head><title>404</title>", "HTML page.*download"),
    "html later": (b"\xef\xbb\xbf  <!-- x --><HTML>", "HTML page"),
    "html utf-16": ("<html><body>".encode("utf-16"), "HTML page"),
    "s3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML text.*download"),
    "json": (b'{"error": "not found"}', "JSON text.*download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "base64": (b"/9j/4AAQSkZJRgABAQAAAQABAAD", "base64"),
    "zeros": (b"\0" * 600, "zero bytes"),
    "text": ("Grüße, 猫".encode() * 40, "a text"),
    "BM text": (b"BMW is a maker of cars", "a text"),
    "m3u8": (b"#EXTM3U\n#EXT-X-VERSION:3\n", "playlist"),
    "dash": (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011">', "playlist"),
    "appledouble": (b"\0\x05\x16\x07\0\x02\0\0" + b"\0" * 40, "macOS companion"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_strange_files_are_named_on_every_way_in(tmp_path, name):
    data, says = FOREIGN[name]
    path = tmp_path / "shot.jpg"  # names lie
    path.write_bytes(data)
    for content in (data, path):
        with pytest.raises(UserError, match=f"^shot: .*it is .*{says}"):
            decode_image(content, source="shot")
        for kind in ("image", "video", None):
            with pytest.raises(UserError, match=f"it is .*{says}"):
                load_media(content, kind)
        with pytest.raises(UserError, match=f"^clip: .*{'' if sniff(data) else says}"):
            read_video(content, Sampling(spread), source="clip")


def test_an_empty_file_is_called_so(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    for content in (b"", path):
        with pytest.raises(UserError, match="is empty"):
            load_media(content, "image")
        with pytest.raises(UserError, match="^shot: is empty"):
            decode_image(content, source="shot")


def test_what_is_read_is_not_strange(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for image_format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"):
        buffer = io.BytesIO()
        picture.save(buffer, image_format)
        head = buffer.getvalue()[:512]
        assert sniff(head)[0] == "image" and foreign(head) is None, image_format
        assert load_media(buffer.getvalue()).kind == "image"
        assert decode_image(buffer.getvalue()).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "magic", [b"\0\0\x01\x09\xf0", b"\0\0\0\x01\x09\x10", b"\0\0\0\x01\x27\x64", b"\0\0\x01\x67\x42"]
)
def test_raw_streams_begin_in_several_ways(magic):
    assert sniff(magic + b"\0" * 20) == ("video", "H.264 stream")


def test_transport_streams_of_cameras_and_discs():
    packet = b"\x47\x40\x11\x10" + b"\xff" * 184
    assert sniff((packet * 3)[:512]) == ("video", "MPEG transport stream")
    assert sniff(((b"\x12\x34\x56\x78" + packet) * 3)[:512]) == ("video", "MPEG transport stream")


def test_a_raw_picture_is_not_taken_for_its_preview():
    """DNG, NEF and ARW are TIFF files whose first part is a thumbnail."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    for tag, kind, value in ((254, 4, 1), (50706, 1, b"\1\4\0\0")):
        tags = ImageFileDirectory_v2()
        tags.tagtype[tag] = kind
        tags[tag] = value
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, "TIFF", tiffinfo=tags)
        with pytest.raises(UserError, match="^shot: a camera's raw picture.*develop it"):
            decode_image(buffer.getvalue(), source="shot")


def test_avif_without_its_plugin_says_so(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "AVIF")
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(UserError, match="^shot: .*AVIF needs Pillow 11.3"):
        decode_image(buffer.getvalue(), source="shot")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_targa_pictures_are_called_so(mode, compression):
    buffer = io.BytesIO()
    picture = Image.fromarray(make_frames(1)[0]).convert(mode)
    picture.save(buffer, "TGA", compression=compression, id_section=b"made here")
    assert foreign(buffer.getvalue()[:512]).startswith("it is a TGA (Targa) picture; save it as PNG or JPEG")
    with pytest.raises(UserError, match="^shot: not a readable picture: it is a TGA"):
        decode_image(buffer.getvalue(), source="shot")
