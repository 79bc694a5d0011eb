"""Decoding every kind of picture, and the arithmetic of sizes, resize and patches."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from executor.errors import UserError
from executor.media import image
from executor.media.image import decode_image, resize, smart_resize
from executor.media.media import MediaLimits
from executor.media.patches import cut_frames, normalize_patchify, repeat_last


def encode(picture: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file made of these chunks, for what Pillow does not write."""
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        file += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return file


def noise(mode: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0]) if bands == 1 else (size[1], size[0], bands)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats(image_format: str) -> None:
    picture = noise("RGB")
    pixels = decode_image(encode(picture, image_format, **({"lossless": True} if image_format == "WEBP" else {})))
    assert torch.equal(pixels, torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert pixels.permute(1, 2, 0).is_contiguous() and pixels.dtype == torch.uint8


def test_cmyk_and_gray_jpeg() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert (decode_image(encode(cyan, "JPEG"))[:, 8, 8].float() - torch.tensor([0.0, 255, 255])).abs().max() <= 2
    gray = decode_image(encode(Image.new("L", (16, 16), 77), "JPEG"))
    assert gray[:, 3, 3].tolist() == [77, 77, 77]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_lies_on_white(mode: str) -> None:
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (2, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        picture.putpixel((1, 0), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
        data, expected = encode(picture, "PNG"), [255, 127]
    else:
        picture = Image.new(mode, (2, 1))
        if mode == "P":
            picture.putpalette([0, 0, 0, 40, 40, 40])
        picture.putpixel((1, 0), {"P": 1, "L": 40, "RGB": (40, 40, 40)}[mode])
        data, expected = encode(picture, "PNG", transparency={"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode]), [255, 40]
    assert decode_image(data)[:, 0].tolist() == [expected] * 3


def test_large_transparent_pictures_are_composed_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 4), dtype=np.uint8))
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    whole = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    for strip_pixels in (1, 500, 2**19):
        monkeypatch.setattr(image, "_STRIP_PIXELS", strip_pixels)
        assert (decode_image(rgba).permute(1, 2, 0).numpy() == whole).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 257 * 100, 65535]], dtype=np.uint16)
    expected = [0, 0, 100, 255]  # 128 / 257 is just below a half
    for content in (
        encode(Image.fromarray(values), "PNG"),
        encode(Image.fromarray(values), "TIFF"),
        Image.fromarray(values.astype(np.int32)),
        values,
    ):
        assert decode_image(content)[:, 0].tolist() == [expected] * 3
    wide = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    assert decode_image(wide)[0, 0].tolist() == [0, 128, 255]
    unit, levels = np.array([[0.0, 0.5, 1.0]], dtype=np.float32), np.array([[0.0, 7.0, 255.0]], dtype=np.float32)
    assert decode_image(Image.fromarray(unit))[0, 0].tolist() == [0, 128, 255]
    assert decode_image(Image.fromarray(levels))[0, 0].tolist() == [0, 7, 255]
    with pytest.raises(UserError, match="^depth: floating point pixels between -1.0 and 0.0"):
        decode_image(Image.fromarray(unit - 1), source="depth")


def test_sixteen_bit_transparency() -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    body = zlib.compress(b"\0" + struct.pack(">HH", 500, 25700))
    # Pillow writes no tRNS chunk for 16-bit gray.
    data = png((b"IHDR", header), (b"tRNS", struct.pack(">H", 500)), (b"IDAT", body), (b"IEND", b""))
    assert decode_image(data)[:, 0].tolist() == [[255, 100]] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: a.T[:, ::-1],
        7: lambda a: a.T[::-1, ::-1],
        8: lambda a: a.T[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode_image(encode(picture, "PNG", exif=exif))[0].tolist() == turned(np.array(picture)).tolist()


def test_arrays() -> None:
    rgb = np.array(noise("RGB"))
    assert torch.equal(decode_image(rgb), torch.from_numpy(rgb).permute(2, 0, 1))
    assert torch.equal(decode_image(rgb[:, :, :1]), decode_image(rgb[:, :, 0]))
    assert decode_image(np.zeros((2, 3, 4), np.uint8)).unique().tolist() == [255]  # transparent
    for bad in (rgb.astype(np.float32), rgb[:, :, :2], rgb[:0], np.zeros((2, 2, 2, 3), np.uint8)):
        with pytest.raises(UserError, match="^mine: .*array"):
            decode_image(bad, source="mine")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_and_corrupt_pictures(tmp_path: Path, image_format: str) -> None:
    data = encode(noise("RGB"), image_format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    for content in (data[: len(data) // 2], path):
        with pytest.raises(UserError, match="^shot: .*(damaged|not a readable picture)"):
            decode_image(content, source="shot")
    with pytest.raises(UserError, match="^shot: not a readable picture"):
        decode_image(b"text, not a picture", source="shot")


def test_foreign_programs_are_not_started() -> None:
    with pytest.raises(UserError, match="^page: not a readable picture"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", source="page")


def test_decompression_bombs() -> None:
    bomb = encode(Image.new("1", (3000, 3000)), "PNG")
    assert len(bomb) < 10_000
    with pytest.raises(UserError, match="^bomb: 3000x3000 pixels, at most 1000000 in all"):
        decode_image(bomb, source="bomb", limits=MediaLimits(image_pixels=1_000_000))
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)
    huge = png((b"IHDR", header), (b"IDAT", b""))
    with pytest.raises(UserError, match="^bomb: more than 89000000 pixels"):
        decode_image(huge, source="bomb")


def test_tiny_and_long_pictures() -> None:
    for width, height in ((1, 1), (5000, 30), (30, 5000), (200, 1)):
        new_height, new_width = smart_resize(height, width, 28, 3136, 12845056)
        frames = resize(decode_image(Image.new("RGB", (width, height), (1, 2, 3)))[None], new_height, new_width)
        patches = normalize_patchify(frames, [0, 0, 0], [1, 1, 1], 14, 2, 2)
        assert patches.shape == (new_height * new_width // 14**2, 3 * 2 * 14 * 14)
        assert patches.unique().tolist() == pytest.approx([1 / 255, 2 / 255, 3 / 255])
    with pytest.raises(UserError, match="201x1 pixels: one side is 201.0 times the other, at most 200"):
        smart_resize(1, 201, 28, 3136, 12845056)


def test_resize_does_not_depend_on_the_batch_or_the_memory_layout() -> None:
    frames = torch.randint(0, 256, (3, 3, 97, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for height, width in ((56, 84), (196, 280), (97, 56)):
        together = resize(frames, height, width)
        assert torch.equal(torch.cat([resize(frame[None], height, width) for frame in frames]), together)
        assert torch.equal(resize(frames.to(memory_format=torch.channels_last), height, width), together)
    assert resize(frames, 97, 130) is frames


def test_the_last_frame_is_repeated() -> None:
    frames = torch.arange(5)[:, None]
    assert repeat_last(frames, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 4]
    assert repeat_last(frames[:1], 4)[:, 0].tolist() == [0, 0, 0, 0]
    assert repeat_last(frames, 5) is frames


def test_patches_are_in_merge_order() -> None:
    # Each pixel's value is the number of its patch in reading order; windows of 2 by 2 patches come together.
    numbers = torch.arange(4 * 6, dtype=torch.uint8).reshape(4, 6)
    frames = numbers.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(2, 3, 8, 12)
    patches = normalize_patchify(frames, [0, 0, 0], [1, 1, 1], 2, 2, 2) * 255
    assert patches.shape == (24, 24) and patches.std(dim=1).max() == 0
    assert patches[:8, 0].round().tolist() == [0, 1, 6, 7, 2, 3, 8, 9]


def test_permutes_have_at_most_eight_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.Tensor.permute
    monkeypatch.setattr(torch.Tensor, "permute", lambda self, *dims: (seen.append(len(dims)), real(self, *dims))[1])
    cut_frames(torch.zeros(4, 3, 56, 56, dtype=torch.uint8), 14, 2, 2)
    assert seen and max(seen) <= 8
