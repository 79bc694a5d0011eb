"""Sources of every form are told apart by their bytes, and refused with a message that names them."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from executor.errors import UserError
from executor.media.image import decode_image
from executor.media.media import Media, MediaLimits, admit, expand_folder, load_media, sniff
from tests.media.media_files import make_frames, write_video

RED = Image.new("RGB", (6, 4), (255, 0, 0))


def encoded(image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    RED.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_pictures_are_known_by_their_bytes(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "no_suffix"
    path.write_bytes(encoded(image_format))
    media = load_media(str(path))
    assert (media.kind, media.content, media.source) == ("image", path, str(path))
    pixels = decode_image(media.content, source=media.source)
    assert pixels.shape == (3, 4, 6) and pixels[0].min() >= 250 and pixels[1:].max() <= 5


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.webm", "libvpx-vp9"),
     ("a.avi", "mpeg4"), ("a.mpg", "mpeg2video"), ("a.flv", "flv"), ("a.h264", "libx264")],
)  # fmt: skip
def test_videos_are_known_by_their_bytes(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, make_frames(3), rate=25, codec=codec)
    assert sniff(path.read_bytes()[:512])[0] == "video"
    assert load_media(path).kind == load_media(path.read_bytes()).kind == "video"
    with pytest.raises(UserError, match=f"{name}: asked for as a picture, but it is a video"):
        load_media(path, "image")


def test_data_urls() -> None:
    data = encoded("PNG")
    text = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{text}", f"DATA:;BASE64,{text[:20]}\n {text[20:]}"):
        media = load_media(url)
        assert (media.kind, media.content, media.source) == ("image", data, "base64 data")
    for url, reason in (
        (f"data:image/png,{text}", "must read data:<type>;base64,<data>"),
        ("data:image/png;base64", "must read data:<type>;base64,<data>"),
        ("data:image/png;base64,$$$$", "not valid base64"),
        ("data:image/png;base64,", "base64 data: is empty"),
    ):
        with pytest.raises(UserError, match=reason):
            load_media(url)
    with pytest.raises(UserError, match="at most 10 allowed"):
        load_media(f"data:image/png;base64,{text}", limits=MediaLimits(image_bytes=10, video_bytes=10))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        *((url, "addresses are not read here, because data_config.allowed_media_domains is empty; add the host to it")
          for url in ("http://host/a.png", "HTTPS://host/a.png?key=1", "http:/host/a.png")),
        ("http://127.0.0.1:80/a.png", "because data_config.allowed_private_hosts is empty; add the host to it"),
        *((url, "ftp:// addresses are not read; give the media as") for url in ("ftp://host/a.mp4",)),
        ("gopher://127.0.0.1:70/_x", "gopher:// addresses are not read"),
    ],
)  # fmt: skip
def test_addresses_are_not_read_unless_allowed(url: str, says: str) -> None:
    for ask in (load_media, admit):
        with pytest.raises(UserError, match=f"^{re.escape(url.partition('?')[0])}: .*{says}"):
            ask(url)


def test_a_link_to_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match="lost.png: is a link to nowhere.png, which is not there"):
        load_media(tmp_path / "lost.png")


def test_file_urls_are_paths(tmp_path: Path) -> None:
    path = tmp_path / "a b%20.png"
    path.write_bytes(encoded("PNG"))
    for url in (
        f"file://{path}",
        f"file://localhost{path}",
        "FILE://" + str(path).replace("%", "%25").replace(" ", "%20"),
    ):
        assert load_media(url).content == path
    with pytest.raises(UserError, match="because server_config.allowed_local_media_path is not set"):
        load_media(f"file://{path}", limits=MediaLimits(paths=False))
    with pytest.raises(UserError, match="^/lost/a.png: no such file; nor is there a folder /lost$"):
        load_media("file:///lost/a.png")


def test_frames_as_one_url(tmp_path: Path) -> None:
    frames = [base64.b64encode(encoded("JPEG")).decode()] * 3
    video = load_media("data:video/jpeg;base64," + ",".join(frames))
    assert (video.kind, [frame.kind for frame in video.content]) == ("video", ["image"] * 3)
    with pytest.raises(UserError, match="not valid base64"):
        load_media(f"data:video/jpeg;base64,{frames[0]},@@")


def test_a_missing_file_names_its_nearest(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(encoded("PNG"))
    with pytest.raises(UserError, match=r"holidai.png: no such file \(did you mean 'holiday.png'\?\)"):
        load_media(tmp_path / "holidai.png")
    with pytest.raises(UserError, match="no such file; nor is there a folder"):
        load_media(tmp_path / "lost" / "a.png")
    with pytest.raises(UserError, match="is a folder"):
        load_media(tmp_path)
    for strange in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError):
            load_media(strange)


def test_objects() -> None:
    assert load_media(RED).kind == "image"
    assert load_media(np.zeros((4, 6, 3), np.uint8)).kind == "image"
    assert load_media(np.zeros((2, 4, 6, 3), np.uint8)).kind == "video"
    frames = load_media([RED, RED])
    assert frames.kind == "video" and [frame.kind for frame in frames.content] == ["image", "image"]
    assert load_media(frames) is frames
    for source, kind, reason in (
        (frames, "image", "a list of 2 frames: asked for as image"),
        (np.zeros((4, 6), np.uint8), "video", "asked for as video"),
        (np.zeros(4, np.uint8), None, r"got shape \(4,\)"),
        ([], None, "at least one frame"),
        ([RED], "image", "several frames are a video"),
        (7, None, "got int"),
        (b"no magic here", None, "not a readable picture or video: it is a text"),
        (b"\x80no magic here", None, "neither a picture nor a video by its first bytes"),
        (b"", None, "is empty"),
    ):
        with pytest.raises(UserError, match=reason):
            load_media(source, kind)


def test_animated_pictures_are_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    RED.save(path, save_all=True, append_images=[Image.new("RGB", (6, 4), (0, 0, 255))], duration=100)
    assert [load_media(path, kind).kind for kind in (None, "image", "video")] == ["image", "image", "video"]
    assert decode_image(path)[:, 0, 0].tolist() == [255, 0, 0]


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    with pytest.raises(UserError, match="a.png: .* bytes, at most 20 allowed for a picture"):
        load_media(path, limits=MediaLimits(image_bytes=20))
    with pytest.raises(UserError, match="because server_config.allowed_local_media_path is not set"):
        load_media(str(path), limits=MediaLimits(paths=False))


def test_folders(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "1.JPG", ".hidden.png"):
        (tmp_path / name).write_bytes(encoded("PNG"))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "inner").mkdir()
    clip = write_video(tmp_path / "3.mp4", make_frames(3))
    assert [path.name for path in expand_folder(tmp_path)] == ["1.JPG", "2.png", "10.png"]
    assert expand_folder(tmp_path, "video") == [clip]
    assert [path.name for path in expand_folder(str(tmp_path), None)] == ["1.JPG", "2.png", "3.mp4", "10.png"]
    video = load_media(tmp_path, "video")
    assert isinstance(video, Media) and [Path(frame.source).name for frame in video.content][-1] == "10.png"
    with pytest.raises(UserError, match="no picture or video among the 0 files"):
        expand_folder(tmp_path / "inner", None)
    with pytest.raises(UserError, match="no such folder"):
        expand_folder(tmp_path / "lost")
