"""Files that requests may name: those below the folder, whatever the path looks like, and what was opened."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from executor.errors import UserError
from executor.media.image import decode_image
from executor.media.local import Folder
from executor.media.media import MediaLimits, admit, load_media
from executor.media.sampling import Sampling, spread
from executor.media.video import read_video
from tests.media.media_files import make_frames, write_video


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The folder that is allowed, beside one that is not."""
    for name in ("shared", "shared/deep", "shared2", "secret"):
        (tmp_path / name).mkdir()
    for name, color in (("shared/a.png", 10), ("shared/deep/b c.png", 20), ("shared/50%25.png", 30),
                        ("shared/%2e%2e", 40), ("shared2/s.png", 50), ("secret/s.png", 60)):  # fmt: skip
        Image.new("RGB", (8, 8), (color,) * 3).save(tmp_path / name, "PNG")
    (tmp_path / "shared/inner").symlink_to("deep/b c.png")
    (tmp_path / "shared/outer").symlink_to("../secret/s.png")
    (tmp_path / "shared/out").symlink_to("../secret")
    (tmp_path / "shared/lost").symlink_to("../secret/nothing")
    (tmp_path / "shared/loop").symlink_to("loop")
    (tmp_path / "entry").symlink_to("shared")
    os.mkfifo(tmp_path / "shared/pipe")
    return tmp_path / "shared"


def limits_of(folder: Path, **more: int) -> MediaLimits:
    return MediaLimits(folder=Folder.at(str(folder)), **more)


READ = {
    "{}/a.png": 10, "a.png": 10, "./deep/../a.png": 10, "file://{}/a.png": 10, "FILE://LOCALHOST{}/a.png": 10,
    "file:{}/a.png": 10, "{}/deep/b c.png": 20, "file://{}/deep/b%20c.png": 20, "file://{}/50%25.png": 30,
    "file://{}/50%2525.png": 30, "inner": 20, "{}/../entry/a.png": 10, "{}/../shared/a.png": 10, "%2e%2e": 40,
    "//{}/a.png": 10,
}  # fmt: skip
OUTSIDE = [
    "/etc/passwd", "../secret/s.png", "{}/../secret/s.png", "file:///etc/passwd", "file://{}/../secret/s.png",
    "file://{}/%2e%2e/secret/s.png", "file://{}/..%2fsecret/s.png", "outer", "out/s.png", "{}/out/s.png", "lost",
    "{}2/s.png", "..", "{}", "file://{}", ".", "", "/proc/self/environ", "/dev/zero", "/dev/stdin", "../shared2/s.png",
    "../secret/is/not/there", "/proc/self/root/etc/passwd", "deep/../../secret/s.png",
]  # fmt: skip
ODD = [
    ("nothing.png", "no such file in the folder"), ("a.png\0.txt", "not a path"), ("file://{}/a.png%00", "not a path"),
    ("\udc80/a.png", "no such file"), ("x" * 5000, "no such file"),
    ("deep", "is a folder; name a file in it"), ("pipe", "no regular file"), ("loop", "no such file"),
    ("file://host/share/a.png", "names an absolute path of this machine"), ("file:a.png", "names an absolute path"),
    ("%252e%252e/secret/s.png", "no such file"), ("a.png?x", "no such file"), ("~/a.png", "no such file"),
    ("s3://bucket/a.png", "s3:// addresses are not read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "color"), READ.items())
def test_below_the_folder(shared: Path, name: str, color: int) -> None:
    limits = limits_of(shared.parent / "entry")  # itself a link
    name = name.format(shared)
    admit(name, limits)
    media = load_media(name, "image", limits)
    assert decode_image(media.content, source=media.source)[0, 0, 0] == color and media.source == name


@pytest.mark.parametrize("template", [".", "./", "file://{}", "{}/"])
def test_the_folder_itself(shared: Path, template: str) -> None:
    with pytest.raises(UserError, match="is the folder itself that .* allows; name a file in it"):
        load_media(template.format(shared), None, limits_of(shared))


@pytest.mark.parametrize("template", OUTSIDE)
def test_outside_of_the_folder(shared: Path, template: str) -> None:
    name = template.format(shared)
    for ask in (lambda: admit(name, limits_of(shared)), lambda: load_media(name, None, limits_of(shared)),
                lambda: load_media([name], "video", limits_of(shared)), lambda: admit([name], limits_of(shared)),
                lambda: load_media(Path(name), None, limits_of(shared))):  # fmt: skip
        with pytest.raises(
            UserError, match="outside of the folder that server_config.allowed_local_media_path"
        ) as caught:
            ask()
        assert "{}" in template or str(shared) not in str(caught.value)


@pytest.mark.parametrize(("name", "says"), ODD)
def test_odd_names(shared: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_media(name.format(shared), "image", limits_of(shared))


def test_what_is_exchanged_between_the_judgement_and_the_opening(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = Folder.find
    (shared / "deep/s.png").write_bytes((shared / "a.png").read_bytes())

    def exchange_the_file(self: Folder, name: str) -> str:
        real = find(self, name)
        (shared / "a.png").unlink()
        (shared / "a.png").symlink_to("../secret/s.png")
        return real

    def exchange_its_folder(self: Folder, name: str) -> str:
        real = find(self, name)
        shutil.move(shared / "deep", shared / "deep2")
        (shared / "deep").symlink_to("../secret")
        return real

    for exchange, name in ((exchange_the_file, "a.png"), (exchange_its_folder, "deep/s.png")):
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "find", exchange)
            with pytest.raises(UserError, match="outside of the folder|cannot be read"):
                load_media(name, "image", limits_of(shared))


def test_a_video_is_the_file_that_was_opened(shared: Path) -> None:
    frames = make_frames(8)
    write_video(shared / "clip.mp4", frames)
    other = write_video(shared.parent / "secret/other.mp4", 255 - frames)
    sampling = Sampling(rule=spread, fps=10, num_frames=None, min_frames=2, max_frames=8, temporal_patch_size=2)
    expected = read_video(shared / "clip.mp4", sampling).frames
    media = load_media("clip.mp4", "video", limits_of(shared))
    shutil.move(other, shared / "clip.mp4")
    assert np.array_equal(read_video(media.content, sampling, source=media.source).frames, expected)
    (held,) = [media.held]
    del media
    held.close()


def test_frames_hold_no_files_open(shared: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    media = load_media(["a.png"] * 50, "video", limits_of(shared))
    assert len(os.listdir("/proc/self/fd")) == before and len(media.content) == 50
    for source in (["a.png"] * 5, "data:video/jpeg;base64," + ",".join(["AA=="] * 5)):
        for ask in (admit, lambda source, limits: load_media(source, "video", limits)):
            with pytest.raises(UserError, match="5 frames, at most 4 allowed"):
                ask(source, limits_of(shared, video_frames=4))


def test_sizes_are_judged_before_anything_is_read(shared: Path) -> None:
    with open(shared / "huge.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(2**40)
    with pytest.raises(UserError, match="1099511627776 bytes, at most 1000 allowed"):
        load_media("huge.png", "image", limits_of(shared, image_bytes=1000))


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match="^server_config.allowed_local_media_path: /not/there: no such folder"):
        Folder.at("/not/there")
