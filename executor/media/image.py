"""Pictures: decoded to uint8 RGB and resized as torchvision does.

Invariants: pure functions; pixels are uint8; every result equals, bit for bit, that of transformers' default
(torchvision-backed) processors of Qwen2-VL and Qwen3-VL. Sizes are the caller's, out of the checkpoint's
preprocessor_config.json; nothing here knows a model. Patches are cut in executor.media.patches.
Legend: F frames, H/W pixels.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from executor.errors import UserError
from executor.media.checksums import damage
from executor.media.formats import HEAD_BYTES, foreign, sniff
from executor.media.media import DEFAULT_LIMITS, MediaLimits

MAX_ASPECT_RATIO = 200
_STRIP_PIXELS = 2**17
# Formats that Pillow decodes by itself. Others (EPS, ...) would start foreign programs on a stranger's file.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow raises on damaged data, from its many plugins; a RuntimeError is AVIF's.
DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def decode_image(
    content: bytes | Path | Image.Image | np.ndarray,
    *,
    source: str = "picture",
    limits: MediaLimits = DEFAULT_LIMITS,
) -> torch.Tensor:
    """A picture as uint8 [3, H, W]: turned upright by its EXIF tag, transparency on white, 16 bits scaled.

    A pixel's colours lie side by side in memory, as `resize` reads them fastest.
    Of an animated picture the first frame. Arrays are uint8 or uint16, [H, W] or [H, W, 1 | 3 | 4].
    Errors: UserError naming `source` when it is damaged, of an unknown format, or above `limits`.
    """
    if isinstance(content, np.ndarray):
        content = _picture_from_array(content, source)
    picture = open_picture(content, source, limits)
    try:
        if isinstance(content, bytes | Path):
            found = damage(content, first_frame=True)
            if found:
                raise OSError(found[1])
            picture.seek(0)
        pixels = upright(picture)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except DECODE_ERRORS as error:
        raise UserError(f"{source}: the picture is damaged or incomplete ({error})") from error
    finally:
        if isinstance(content, bytes | Path):
            picture.close()
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_picture(content: bytes | Path | Image.Image, source: str, limits: MediaLimits) -> Image.Image:
    """The picture with its header read and its size checked, its pixels not yet decoded."""
    picture = content
    if not isinstance(content, Image.Image):
        Image.init()
        formats = [name for name in _FORMATS if name in Image.OPEN]
        try:
            picture = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)
        except Image.DecompressionBombError as error:
            raise UserError(f"{source}: more than {limits.image_pixels} pixels; make it smaller") from error
        except DECODE_ERRORS as error:
            raise UserError(f"{source}: {_unreadable(content, formats, error)}") from error
        if _is_preview(picture):
            raise UserError(
                f"{source}: a camera's raw picture, which Pillow shows as a small preview; develop it to JPEG or PNG, "
                "e.g. with darktable, RawTherapee or dcraw"
            )
    width, height = picture.size
    if width * height > limits.image_pixels:
        raise UserError(f"{source}: {width}x{height} pixels, at most {limits.image_pixels} in all; make it smaller")
    if min(width, height) == 0:
        raise UserError(f"{source}: a picture of {width}x{height} pixels is empty")
    return picture


def upright(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a picture, turned as its EXIF orientation says; errors as `to_rgb`."""
    picture.load()  # a PNG's EXIF may stand behind its pixels
    if picture.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return to_rgb(picture)  # exif_transpose would copy it, and hold Python's lock for it
    return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in any of Pillow's modes; UserError (without a source) for values of no scale."""
    if picture.mode.startswith("I") or picture.mode == "F":
        gray = _scale_to_8_bits(np.asarray(picture))
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            gray[np.asarray(picture) == transparent] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        return _on_white(picture.convert("RGBA"))
    return _in_strips(picture, lambda strip: strip if strip.mode == "RGB" else strip.convert("RGB"))


def _in_strips(picture: Image.Image, rgb_of: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Pillow composes, and hands pixels over, without letting other threads run: 80 ms and 50 ms for 12 megapixels."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    strip_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, strip_rows):
        strip = picture.crop((0, top, width, min(height, top + strip_rows)))
        pixels[top : top + strip_rows] = np.asarray(rgb_of(strip))
    return pixels


def _on_white(rgba: Image.Image) -> np.ndarray:
    def composed(strip: Image.Image) -> Image.Image:
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, strip).convert("RGB")

    return _in_strips(rgba, composed)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor` (patch * merge), with about the same ratio, the area within bounds.

    Both families, pictures (transformers: qwen2_vl smart_resize; its rounding is Python's, halves to even).
    Errors: UserError when one side is more than 200 times the other.
    """
    check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    return fit_area(height, width, new_height * new_width, (new_height, new_width), factor, min_pixels, max_pixels)


def check_aspect_ratio(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise UserError(
            f"{width}x{height} pixels: one side is {ratio:.1f} times the other, at most {MAX_ASPECT_RATIO} is allowed; "
            "crop it or cut it into parts"
        )


def fit_area(
    height: int,
    width: int,
    volume: int,
    rounded: tuple[int, int],
    factor: int,
    min_volume: int,
    max_volume: int,
    num_frames: int = 1,
) -> tuple[int, int]:
    """`rounded` when its `volume` (pixels of all frames) is within bounds, else both sides scaled by one number."""
    if volume > max_volume:
        shrink = math.sqrt((num_frames * height * width) / max_volume)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if volume < min_volume:
        grow = math.sqrt(min_volume / (num_frames * height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rounded


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 [F, 3, H, W] to contiguous uint8 [F, 3, height, width], bicubic with antialiasing: torchvision's `resize`.

    On the CPU, where frames are decoded: torch resizes uint8 there with integer weights, rounding and clamping between
    the horizontal and the vertical pass. Other devices compute in float without that, up to several levels away.
    """
    assert frames.dtype == torch.uint8 and frames.device.type == "cpu"
    if frames.shape[-2:] == (height, width):
        return frames.contiguous()
    if frames.shape[0] == 1 and frames.stride(1) == 1:
        # A frame as it was decoded. torch takes it for channels-last, and resizes without reordering it first, only
        # where the stride of the single frame says so too.
        frames = frames.as_strided(frames.shape, (frames.numel(), *frames.stride()[1:]))
    resized = F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized.contiguous()


def _unreadable(content: bytes | Path, formats: list[str], error: Exception) -> str:
    """Why a picture's header could not be read: what the file is instead, or that it is damaged."""
    if isinstance(content, bytes):
        head = content[:HEAD_BYTES]
    else:
        try:
            with content.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as fault:
            return f"cannot be read ({fault.strerror})"
    if not head:
        return "is empty (0 bytes)"
    sniffed = sniff(head)
    if sniffed == ("image", "AVIF") and "AVIF" not in formats:
        return "not a readable picture: AVIF needs Pillow 11.3 or later; pip install -U pillow, or save it as PNG"
    strange = foreign(head)
    if strange:
        return f"not a readable picture: {strange}"
    if sniffed and sniffed[0] == "image":
        return f"the picture is damaged or incomplete: its beginning is that of {sniffed[1]}, but it does not open"
    return f"not a readable picture ({type(error).__name__}); known are {', '.join(formats)}"


def _is_preview(picture: Image.Image) -> bool:
    """Whether this is a TIFF-like raw picture (DNG, NEF, ARW ...): its first part is a thumbnail, or it has a version
    of DNG. Tags: TIFF 6.0 NewSubfileType, bit 0 "reduced resolution"; DNG 1.4 DNGVersion."""
    tags = getattr(picture, "tag_v2", None) if picture.format == "TIFF" else None
    if tags is None:
        return False
    kind = tags.get(254, 0)
    return 50706 in tags or isinstance(kind, int) and bool(kind & 1)


def _picture_from_array(array: np.ndarray, source: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    gray, colour = array.ndim == 2, array.ndim == 3 and array.shape[2] in (3, 4)
    if not (colour and array.dtype == np.uint8) and not (gray and array.dtype in (np.uint8, np.uint16)):
        raise UserError(
            f"{source}: got an array {array.dtype} {list(array.shape)}, want uint8 [H, W], [H, W, 3] or [H, W, 4], "
            "or uint16 [H, W]"
        )
    if array.size == 0:
        raise UserError(f"{source}: an array of shape {list(array.shape)} holds no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """One band of wide integers or floats to uint8, by the full range of its type, not clipped at 255."""
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):  # also refuses NaN
            raise UserError(f"floating point pixels between {low} and {high}; want 0..1 or 0..255")
        return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    # Pillow opens 16-bit files as mode I (32 bits) too: what fits into 16 bits is taken for 16 bits.
    top = 65535 if values.max() <= 65535 else 2**31 - 1
    wide = np.clip(values.astype(np.int64), 0, top)
    return ((wide * 255 + top // 2) // top).astype(np.uint8)
