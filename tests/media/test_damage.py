"""One policy for damaged files, whatever holds them: whole frames are looked at, a warning says what is missing."""

import io
import random
from functools import partial

import av
import numpy as np
import pytest
from PIL import Image

from executor.errors import UserError
from executor.media.extent import missing_bytes
from executor.media.image import decode_image
from executor.media.sampling import Sampling, spread
from executor.media.video import SampledVideo, read_video
from tests.media.media_files import decode_all, make_frames, write_video

EVERY_FRAME = Sampling(spread, fps=10)
CONTAINERS = {  # name: (codec, options of the container)
    "front.mp4": ("libx264", {"movflags": "faststart"}),
    "fragments.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "file.mkv": ("libx264", {}),
    "live.mkv": ("libx264", {"live": "1"}),
    "file.webm": ("libvpx", {}),
    "file.ts": ("libx264", {}),
    "file.avi": ("mpeg4", {}),
    "file.mpg": ("mpeg2video", {}),
    "file.flv": ("flv", {}),
    "raw.h264": ("libx264", {}),
    "file.asf": ("msmpeg4v2", {}),
    "file.ivf": ("libvpx", {}),
}
SIZED = ("front.mp4", "fragments.mp4", "file.mkv", "live.mkv", "file.webm", "file.avi", "file.ts", "file.asf")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, np.ndarray]]:
    """Bytes and frames of one video of 40 frames, a key frame every 10, in every container."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    for name, (codec, container) in CONTAINERS.items():
        options = {"g": "10", "deadline": "realtime"} if codec == "libvpx" else {"g": "10"}
        path = write_video(
            folder / name, make_frames(40, 64, 64), codec=codec, options=options, container_options=container
        )
        made[name] = path.read_bytes(), decode_all(path)
    return made


def nearest(video: SampledVideo, every_frame: np.ndarray) -> list[int | None]:
    """For each frame that is looked at, which of `every_frame` it is; None for one that is none of them."""
    found = []
    for frame in video.frames:
        equal = (every_frame == frame.permute(1, 2, 0).numpy()).all(axis=(1, 2, 3))
        found.append(int(equal.argmax()) if equal.any() else None)
    return found


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_whole_file_is_read_without_a_word(files, name):
    data, every_frame = files[name]
    video = read_video(data, EVERY_FRAME, source="clip")
    assert video.warnings == () and nearest(video, every_frame) == list(range(40))
    assert missing_bytes(data) == 0


def packets(data: bytes) -> list[tuple[int, int]]:
    """(position, size) of each coded frame in the file, in decode order; some files do not
    say, and are taken to be evenly filled."""
    with av.open(io.BytesIO(data)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    if all(position is not None for position, _ in spans) and len(dict(spans)) == len(spans):
        return spans
    return [(len(data) * index // len(spans), len(data) // len(spans)) for index in range(len(spans))]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("packet", [16, 36])
def test_a_file_cut_inside_a_frame_in_the_middle_of_a_group(files, name, packet):
    data, every_frame = files[name]
    position, size = packets(data)[packet]
    cut = data[: position + size // 2]
    video = read_video(cut, EVERY_FRAME, source="clip")
    assert video.warnings and all(warning.startswith("clip: the video is ") for warning in video.warnings)
    shown = nearest(video, every_frame)
    assert None not in shown and shown == sorted(shown)  # nothing partly decoded is shown
    # Frames are stored in another order than they are shown, and not all files are evenly filled.
    assert packet - (14 if name in ("file.asf", "file.mpg") else 6) <= shown[-1] <= packet + 3
    if name in SIZED:
        missing = missing_bytes(cut)
        assert missing > 0 and f"({missing} bytes are missing)" in video.warnings[0]
        assert f"its first {video.total_frames}" in video.warnings[0]


@pytest.mark.parametrize("name", ["front.mp4", "file.mkv", "file.ts", "file.flv"])
def test_damage_in_the_middle_freezes_the_picture_until_the_next_group(files, name):
    data, every_frame = bytearray(files[name][0]), files[name][1]
    position, size = packets(bytes(data))[13]
    for at in range(position + size // 3, position + size // 3 + max(20, size // 3)):
        data[at] ^= 0xFF
    video = read_video(bytes(data), EVERY_FRAME, source="clip")
    (warning,) = video.warnings
    assert warning.startswith("clip: the video is damaged: ") and "whole one beside" in warning
    shown = nearest(video, every_frame)
    assert None not in shown and shown == sorted(shown)
    differing = [index for index, frame in enumerate(shown) if frame != index]
    assert 1 <= len(differing) <= 10 and f": {len(differing)} of the 40 frames" in warning
    assert shown[:10] == list(range(10)) and shown[20:] == list(range(20, 40))  # the other groups are untouched


def overwritten(data: bytes, first: float, last: float, kind: str) -> bytes:
    """`data` with a stretch of it, in shares of its length, set to zero or to random bytes."""
    start, end = int(len(data) * first), int(len(data) * last)
    filling = bytes(end - start) if kind == "zeros" else random.Random(1).randbytes(end - start)
    return data[:start] + filling + data[end:]


# MP4 lists its frames; raw H.264 cannot tell (docs/media.md); what ASF has behind 0.8 here are no frames.
@pytest.mark.parametrize("kind", ["zeros", "random"])
@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("raw.h264", "file.asf")])
@pytest.mark.parametrize(("first", "last"), [(0.5, 1), (0.8, 1), (0.4, 0.6)])
def test_overwritten_stretches_never_pass_without_a_word(files, name, first, last, kind):
    data, every_frame = files[name]
    try:
        video = read_video(overwritten(data, first, last, kind), EVERY_FRAME, source="clip")
    except UserError as error:
        assert str(error).startswith("clip: the video is damaged: ")
        return
    assert video.warnings and all(warning.startswith("clip: the video is ") for warning in video.warnings)
    shown = nearest(video, every_frame)
    assert shown.count(None) <= (name == "file.ivf") and len(set(shown)) < 40


@pytest.mark.parametrize("name", ["file.mkv", "file.avi", "front.mp4"])
def test_padding_behind_a_whole_file_takes_no_frame(files, name):
    data, every_frame = files[name]
    video = read_video(data + bytes(5000), EVERY_FRAME, source="clip")
    assert nearest(video, every_frame) == list(range(40)) and video.warnings == ()


@pytest.mark.parametrize("name", ["file.mkv", "file.webm", "file.avi"])
def test_a_cut_file_without_a_whole_frame_is_called_cut(files, name):
    data = files[name][0]
    position, size = packets(data)[0]
    with pytest.raises(UserError, match=r"^clip: .*cut short, \d+ bytes are missing"):
        read_video(data[: position + size // 2], EVERY_FRAME, source="clip")


def test_what_is_broken_for_the_most_part_is_refused(files):
    data = bytearray(files["front.mp4"][0])
    draw = random.Random(0)
    for at in range(len(data) // 5, len(data), 50):
        data[at] = draw.randrange(256)
    with pytest.raises(
        UserError, match=r"^clip: the video is damaged: \d+ of the 40 frames to be looked at are broken"
    ):
        read_video(bytes(data), EVERY_FRAME, source="clip")


def test_what_cannot_be_found_without_the_end_is_refused(tmp_path):
    data = write_video(tmp_path / "end.mp4", make_frames(40, 64, 64)).read_bytes()  # its index stands at the end
    with pytest.raises(UserError, match=r"^clip: not a readable video: the file is cut short, \d+ bytes are missing"):
        read_video(data[: len(data) // 2], EVERY_FRAME, source="clip")


@pytest.mark.parametrize("name", ["file.ts", "raw.h264"])
def test_a_recording_that_starts_in_the_middle_of_a_group(files, name):
    data, every_frame = files[name]
    video = read_video(data[int(len(data) * 0.15) // 188 * 188 :], EVERY_FRAME, source="clip")
    assert nearest(video, every_frame) == list(range(10, 40))
    assert "starts in the middle: its first" in video.warnings[0]


@pytest.mark.parametrize("name", CONTAINERS)
def test_random_damage_never_raises_anything_else(files, name):
    data, draw = files[name][0], random.Random(name)
    for _ in range(6):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 3, 10))):
            at, length = draw.randrange(200, len(data)), draw.choice((1, 8, 60))
            damaged[at : at + length] = draw.randbytes(len(damaged[at : at + length]))
        try:
            video = read_video(bytes(damaged), EVERY_FRAME, source="clip")
        except UserError as error:
            assert str(error).startswith("clip: ")
        else:
            assert len(video.frames) == len(video.indices)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_cut_animation_follows_the_same_policy(suffix):
    buffer = io.BytesIO()
    frames = make_frames(6)
    lossless = {"lossless": True} if suffix == "webp" else {}
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(buffer, suffix, save_all=True, append_images=pictures[1:], duration=100, **lossless)
    data = buffer.getvalue()
    whole = read_video(data, EVERY_FRAME, source="cut")
    assert whole.warnings == () and whole.total_frames == 6
    for share in (0.95, 0.6):
        video = read_video(data[: int(len(data) * share)], EVERY_FRAME, source="cut")
        assert 2 <= video.total_frames < 6
        assert (video.frames == whole.frames[: video.total_frames]).all()
        (warning,) = video.warnings
        assert warning.startswith("cut: the video is damaged or cut short")
        assert f"its first {video.total_frames}" in warning
    with pytest.raises(UserError, match="^cut: .*(no whole frame|damaged or incomplete)"):
        read_video(data[:100], EVERY_FRAME, source="cut")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_a_picture_is_one_frame_and_refused_when_it_is_not_whole(image_format):
    buffer = io.BytesIO()
    Image.fromarray(make_frames(1, 64, 64)[0]).save(buffer, image_format)
    data = buffer.getvalue()
    assert decode_image(data).shape == (3, 64, 64)
    for content in (data[: len(data) // 2], data[: len(data) - 40]):
        with pytest.raises(UserError, match="^shot: the picture is damaged or incomplete"):
            decode_image(content, source="shot")
        with pytest.raises(UserError, match="^shot: .*damaged or incomplete"):
            read_video(content, EVERY_FRAME, source="shot")


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """(type, where its data begins, length) of every chunk."""
    at, found = 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        found.append((data[at + 4 : at + 8], at + 8, length))
        at += 12 + length
    return found


@pytest.mark.parametrize("where", ["data", "checksum", "last"])
def test_a_png_with_a_wrong_checksum_is_refused(where, tmp_path):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)  # stored: a changed byte is a changed pixel
    data = bytearray(buffer.getvalue())
    _, start, length = next(chunk for chunk in png_chunks(data) if chunk[0] == b"IDAT")
    at = {"data": start + length // 2, "checksum": start + length, "last": start + length - 1}[where]
    data[at] ^= 1
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for content in (bytes(data), path):
        with pytest.raises(UserError, match="^shot: the picture is damaged or incomplete .*IDAT at byte"):
            decode_image(content, source="shot")
        with pytest.raises(UserError, match="^shot: the picture is damaged or incomplete"):
            read_video(content, EVERY_FRAME, source="shot")


def test_an_animated_png_with_a_wrong_checksum_is_answered_up_to_it():
    buffer = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in make_frames(6)]
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:], duration=100)
    data = bytearray(buffer.getvalue())
    whole = read_video(bytes(data), EVERY_FRAME, source="clip")
    _, start, length = [chunk for chunk in png_chunks(data) if chunk[0] == b"fdAT"][3]  # of the fifth frame
    data[start + length] ^= 1
    assert decode_image(bytes(data)).shape == (3, 32, 48)  # its first frame is whole
    video = read_video(bytes(data), EVERY_FRAME, source="clip")
    assert (video.frames == whole.frames[:4]).all()
    (warning,) = video.warnings
    assert "checksum of its part fdAT" in warning and "its first 4 of 6 frames" in warning


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_zero_bytes_from_its_middle_is_refused(progressive):
    buffer = io.BytesIO()
    Image.fromarray(make_frames(1, 256, 256)[0]).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()
    assert decode_image(data + bytes(500)).shape == (3, 256, 256)  # padded behind its end
    zeroed = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    with pytest.raises(UserError, match="^shot: the picture is damaged or incomplete .*zero bytes"):
        decode_image(zeroed, source="shot")
    with pytest.raises(UserError, match="^shot: .*damaged or incomplete"):
        read_video(zeroed, EVERY_FRAME, source="shot")


STILL = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
ANIMATED = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")


@pytest.mark.filterwarnings("ignore")  # Pillow's, of odd tags
@pytest.mark.parametrize(
    ("image_format", "frames"), [*((name, 1) for name in STILL), *((name, 4) for name in ANIMATED)]
)
def test_random_damage_to_pictures_never_raises_anything_else(image_format, frames):
    buffer, draw = io.BytesIO(), random.Random(image_format)
    pictures = [Image.fromarray(frame) for frame in make_frames(frames)]
    pictures[0].save(buffer, image_format, **({"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}))
    data = buffer.getvalue()
    for _ in range(30):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 2, 6))):
            at, length = draw.randrange(draw.choice((len(data), 200))) % len(data), draw.choice((1, 4, 20))
            damaged[at : at + length] = draw.randbytes(len(damaged[at : at + length]))
        for read in (decode_image, partial(read_video, sampling=EVERY_FRAME)):
            try:
                read(bytes(damaged), source="shot")
            except UserError as error:
                assert str(error).startswith("shot: ")


def test_lengths_that_files_state_of_themselves(tmp_path):
    assert missing_bytes(b"") == missing_bytes(b"\x1a\x45\xdf\xa3") - 1 == 0
    assert missing_bytes(b"no container at all" * 9) == 0
    junk = b"\x00" * 64
    for header in (b"\x00\x00\x00\x18ftypisom", b"RIFF\xff\xff\xff\xffAVI ", b"\x1a\x45\xdf\xa3\x00", b"OggS\0\0"):
        assert missing_bytes(header + junk) >= 0  # whatever follows, it ends
    path = tmp_path / "a.avi"
    path.write_bytes(b"RIFF" + (1000).to_bytes(4, "little") + b"AVI " + junk)
    assert missing_bytes(path) == 1008 - 76
    page = b"OggS\0\x02" + b"\0" * 20 + b"\x02\xff\x10"
    assert missing_bytes(page + b"\0" * 271) == 0 and missing_bytes(page + b"\0" * 200) == 71
