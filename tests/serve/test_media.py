"""Pictures and videos of requests: every format, from every place that is allowed, and refusals that say what to do."""

import base64
import functools
import io
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from executor.commands.build import fetcher_of, request_limits
from executor.engine.engine import Engine
from executor.errors import UserError
from executor.recipe.schema import build_recipe
from tests.media.media_files import decode_all, write_video
from tests.media.web import Web, ok, serving
from tests.reference import REPO
from tests.serve.conftest import Running

MEDIA = REPO / "dataset/media"
PICTURE, CLIP = MEDIA / "objects.png", MEDIA / "clip.mp4"
SEEN, MOVED = "What do you see?", "Describe the video."


def url_of(data: bytes, media_type: str = "application/x-anything") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def body_of(*sources: Any, kind: str = "image", question: str = SEEN) -> dict[str, Any]:
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": source}} for source in sources]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0}


def post(server: Running, *sources: Any, kind: str = "image", question: str = SEEN) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json=body_of(*sources, kind=kind, question=question))


def answer(server: Running, *sources: Any, kind: str = "image", question: str = SEEN) -> str:
    reply = post(server, *sources, kind=kind, question=question)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def refusal(reply: httpx.Response, status: int = 400) -> tuple[str, str | None]:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]["message"], reply.json()["error"]["param"]


def saved(image_format: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or Image.open(PICTURE).convert("RGB")).save(buffer, image_format, **options)
    return buffer.getvalue()


def turned() -> bytes:
    """The picture on its side, with the tag that says how it was held."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("PNG", Image.open(PICTURE).convert("RGB").transpose(Image.Transpose.ROTATE_90), exif=exif)


def animated() -> bytes:
    first, second = Image.open(PICTURE).convert("RGB"), Image.open(MEDIA / "word.png").convert("RGB")
    return saved("GIF", first.quantize(), save_all=True, append_images=[second.quantize()], duration=200)


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header says one thing and whose pixels another."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    packed = (struct.pack(">I", len(x)) + n + x + struct.pack(">I", zlib.crc32(n + x)) for n, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def gif(width: int, height: int, num_frames: int) -> bytes:
    """Frames of a single pixel on a canvas that is drawn whole for each."""
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + b"," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    screen = struct.pack("<2H3B", width, height, 0x80, 0, 0)
    return b"GIF89a" + screen + b"\0\0\0\xff\xff\xff" + frame * num_frames + b";"


@functools.cache
def clip_frames() -> np.ndarray:
    return decode_all(CLIP)


def some_frames() -> np.ndarray:
    return clip_frames()[:: len(clip_frames()) // 4]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    data = PICTURE.read_bytes()
    replies = {"/a.png": ok(data, "Content-Type: text/html"),
               "/clip": ok(CLIP.read_bytes()), "/page": ok(b"<html>no"),
               "/large": ok(b"\x89PNG\r\n\x1a\n" + b"x" * 3_000_000), "/broken": ok(b"", status="502 Bad Gateway"),
               **{f"/frame{n}": ok(saved("PNG", Image.fromarray(x))) for n, x in enumerate(some_frames())}}  # fmt: skip
    with serving(replies) as web:
        yield web


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("allowed")
    for file in (PICTURE, CLIP):
        (path / file.name).write_bytes(file.read_bytes())
    (path / "way_out.png").symlink_to(PICTURE)
    for number, frame in enumerate(some_frames()):
        Image.fromarray(frame).save(path / f"frame{number}.png")
    return path


@contextmanager
def limited(engine: Engine, web: Web | None = None, **settings: Any) -> Iterator[None]:
    """Media are read within these server_config's limits; `web`: all hosts below `example`."""
    recipe = build_recipe({"model_config": {"model_path": "-"}, "server_config": settings})
    before, limits = engine.processor.options, request_limits(recipe)
    if web is not None:
        limits = replace(limits, fetcher=web.fetcher("*.example", timeout_s=1.0))
    engine.processor.options = replace(before, limits=limits)
    yield
    engine.processor.options = before


@pytest.fixture
def open_server(server: Running, web: Web, folder: Path) -> Iterator[Running]:
    """Reads files of one folder and fetches from some hosts, all of which are `web`."""
    settings = {"max_pictures": 4, "max_videos": 1, "max_media_bytes": 2_000_000, "max_media_pixels": 1_000_000,
                "max_video_frames": 40, "max_video_s": 30.0, "allowed_local_media_path": str(folder)}  # fmt: skip
    with limited(server.engine, web, **settings):
        yield server


@pytest.fixture(scope="module")
def seen(server: Running) -> str:
    """What the model says of the picture."""
    said = answer(server, url_of(PICTURE.read_bytes(), "image/png"))
    assert " at the " in said
    return said


PICTURES = {
    "png": lambda: PICTURE.read_bytes(), "webp": lambda: saved("WEBP", lossless=True), "bmp": lambda: saved("BMP"),
    "tiff": lambda: saved("TIFF", compression="tiff_lzw"), "jpeg": lambda: saved("JPEG", quality=95),
    "gif, its first frame": animated, "exif": turned,
}  # fmt: skip
VIDEOS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_whatever_its_type_is_called(server: Running, seen: str, name: str) -> None:
    for media_type in ("image/png", "video/mp4") if name == "jpeg" else ("text/html",):
        assert answer(server, url_of(PICTURES[name](), media_type)) == seen


def test_every_video_whatever_its_type_is_called(server: Running, tmp_path: Path) -> None:
    said = answer(server, url_of(CLIP.read_bytes(), "video/mp4"), kind="video", question=MOVED)
    assert " moves " in said
    frames, files = clip_frames(), []
    for suffix, codec in VIDEOS.items():
        path = write_video(tmp_path / f"clip.{suffix}", frames, rate=4, codec=codec, options={"crf": "10"})
        files.append(url_of(path.read_bytes(), "image/jpeg"))
    pictures = [Image.fromarray(frame) for frame in frames]
    files.append(url_of(saved("GIF", pictures[0], save_all=True, append_images=pictures[1:], duration=250)))
    assert [answer(server, file, kind="video", question=MOVED) for file in files] == [said] * len(files)
    jpegs = [base64.b64encode(saved("JPEG", picture, quality=95)).decode() for picture in pictures[:4]]
    listed = [f"data:image/jpeg;base64,{jpeg}" for jpeg in jpegs]
    said = answer(server, listed, kind="video", question=MOVED)
    assert answer(server, "data:video/jpeg;base64," + ",".join(jpegs), kind="video", question=MOVED) == said


@pytest.fixture(scope="module")
def frames_said(server: Running) -> str:
    """What the model says of some frames of the clip, sent as pictures."""
    frames = [url_of(saved("PNG", Image.fromarray(frame))) for frame in some_frames()]
    return answer(server, frames, kind="video", question=MOVED)


UNREADABLE = {  # each with words of its refusal
    "a bomb": (lambda: png(60_000, 60_000, zlib.compress(b"\0" * 10**7)), "pixels"),
    "a smaller bomb": (lambda: png(20_000, 6_000, zlib.compress(b"\0" * 10**7)), "20000x6000 pixels, at most"),
    "an animated bomb": (lambda: gif(15_000, 6_000, 6), "at most 500000000 are drawn; send it as a video"),
    "a cut picture": (lambda: PICTURE.read_bytes()[:-300], "damaged or incomplete"),
    "a cut JPEG": (lambda: saved("JPEG")[:-300], "damaged or incomplete"),
    "zero bytes": (lambda: bytes(5000), "nothing but zero bytes"),
    "no bytes": (lambda: b"", "is empty"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG drawing; turn it into a picture"),
    "an HTML page": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "it is an HTML page"),
    "a text": (lambda: b"no picture at all", "it is a text"),
    "a PDF": (lambda: b"%PDF-1.7\n", "it is a PDF document"),
    "noise": (lambda: np.random.default_rng(0).bytes(4000), "base64 data: "),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(server: Running, name: str) -> None:
    data, says = UNREADABLE[name]
    kind = "video" if "animated" in name else "image"
    good, bad = url_of(PICTURE.read_bytes()), url_of(data(), "image/png")
    started = time.monotonic()
    message, param = refusal(post(server, *([bad] if kind == "video" else [good, bad]), kind=kind))
    assert time.monotonic() - started < 3
    where = f"messages[0].content[{int(kind == 'image')}]"
    assert param == where and message.startswith(f"{where}: base64 data: ") and says in message


def test_files_and_addresses_are_refused_by_default(server: Running) -> None:
    for source in (str(PICTURE), f"file://{PICTURE}", "/etc/passwd", "objects.png", "../a"):
        message, param = refusal(post(server, source))
        assert "server_config.allowed_local_media_path is not set" in message and param == "messages[0].content[0]"
    for source, key in (
        ("http://127.0.0.1/a.png", "allowed_private_hosts"),
        ("https://example.org/a.png", "allowed_media_domains"),
        ("http://[::1]/", "allowed_private_hosts"),
        ("http://169.254.169.254/latest", "allowed_media_domains"),
    ):
        message, param = refusal(post(server, source))
        assert f"data_config.{key} is empty" in message and param == "messages[0].content[0]"
    message, _ = refusal(post(server, base64.b64encode(PICTURE.read_bytes()).decode()))
    assert "base64 text is given as data:image/png;base64,TEXT" in message


def test_files_of_the_folder(open_server: Running, folder: Path, seen: str, frames_said: str) -> None:
    for source in ("objects.png", str(folder / "objects.png"), f"file://{folder}/objects.png",
                   f"file://localhost{folder}/./objects.png"):  # fmt: skip
        assert answer(open_server, source) == seen
    said = answer(open_server, url_of(CLIP.read_bytes()), kind="video", question=MOVED)
    assert answer(open_server, f"file://{folder}/clip.mp4", kind="video", question=MOVED) == said
    frames = [f"frame{number}.png" for number in range(len(some_frames()))]
    assert answer(open_server, frames, kind="video", question=MOVED) == frames_said
    for source, kind in (("way_out.png", "image"), (str(PICTURE), "image"), (f"{folder}/../a", "image"),
                         ([*frames, "way_out.png"], "video"), ("/proc/self/environ", "video")):  # fmt: skip
        message, param = refusal(post(open_server, source, kind=kind))
        assert "outside of the folder that server_config.allowed_local_media_path allows" in message
        assert param == "messages[0].content[0]"


def test_addresses_of_the_hosts(open_server: Running, web: Web, seen: str, frames_said: str) -> None:
    assert answer(open_server, "http://pictures.example/a.png") == seen
    said = answer(open_server, url_of(CLIP.read_bytes()), kind="video", question=MOVED)
    assert answer(open_server, "http://a.example/clip", kind="video", question=MOVED) == said
    frames = [f"http://a.example/frame{number}" for number in range(len(some_frames()))]
    assert answer(open_server, frames, kind="video", question=MOVED) == frames_said
    web.asked.clear()
    answer(open_server, "http://a.example/a.png", "http://a.example/a.png")
    assert len(web.asked) == 1  # once for a request
    for url, status, says in (
        ("http://a.example/lost", 422, "answers 404 Not Found"), ("http://a.example/broken", 422, "answers 502"),
        ("http://a.example/page", 400, "it is an HTML page"),
        ("http://a.example/large", 400, "more than 2000000 bytes"),
        ("http://a.example/clip", 400, "asked for as a picture, but it is a video"),
        ("http://example.org/a.png", 400, "not among the hosts"),
        ("http://a.example:81/a.png", 400, "not among the hosts"),
    ):  # fmt: skip
        message, param = refusal(post(open_server, "objects.png", url), status)
        assert says in message and param == "messages[0].content[1]" and message.startswith(f"{param}: {url}: ")


def test_limits_of_a_request(open_server: Running, tmp_path: Path) -> None:
    many = saved("PNG", Image.new("RGB", (2000, 600)))
    long = write_video(tmp_path / "long.mp4", np.zeros((35, 32, 32, 3), np.uint8), rate=1)
    frames = write_video(tmp_path / "frames.mp4", np.zeros((50, 32, 32, 3), np.uint8), rate=50)
    for sources, kind, says, number in (
        (["objects.png"] * 5, "image", "5 pictures in one request, at most 4 are allowed", 4),
        (["clip.mp4"] * 2, "video", "2 videos in one request, at most 1 are allowed (server_config.max_videos)", 1),
        ([url_of(b"\x89PNG\r\n\x1a\n" + bytes(2_100_000))], "image", "at most 2000000 allowed", 0),
        ([url_of(many)], "image", "2000x600 pixels, at most 1000000 in all", 0),
        ([url_of(long.read_bytes())], "video", "35 seconds, at most 30 allowed", 0),
        ([url_of(frames.read_bytes())], "video", "more than 40 frames", 0),
        ([["objects.png"] * 41], "video", "41 frames, at most 40 allowed", 0),
    ):  # fmt: skip
        message, param = refusal(post(open_server, *sources, kind=kind))
        assert says in message and param == f"messages[0].content[{number}]"
        assert ("server_config.max_pictures" in message) == (len(sources) == 5)


def test_nothing_of_a_request_that_is_refused_is_opened(open_server: Running, web: Web) -> None:
    web.asked.clear()
    for bad in ("/etc/passwd", "http://evil.com/a.png", "ftp://a.example/a.png", "nothing.png",
                "data:image/png;base64," + "A" * 3_000_000):  # fmt: skip
        _, param = refusal(post(open_server, "http://a.example/a.png", bad))
        assert param == "messages[0].content[1]"
    refusal(post(open_server, *["http://a.example/a.png"] * 5))
    assert web.asked == []


def test_what_a_recipe_allows() -> None:
    def recipe_of(**data: Any) -> Any:
        return build_recipe({"model_config": {"model_path": "-"}, "data_config": data,
                             "server_config": {"max_pictures": 3, "max_media_bytes": 5}})  # fmt: skip

    assert fetcher_of(recipe_of()) is None
    recipe = recipe_of(
        allowed_media_domains=["*.example.org"], allowed_private_hosts="10.0.0.5:9000", fetch_timeout_s=2.0
    )
    limits = request_limits(recipe)
    assert (limits.paths, limits.pictures, limits.image_bytes, limits.video_bytes) == (False, 3, 5, 5)
    assert limits.fetcher.timeout_s == 2.0
    limits.fetcher.check("https://a.example.org/x")
    limits.fetcher.check("http://10.0.0.5:9000/x")
    for data in ({"allowed_media_domains": ["https://x.org"]}, {"allowed_private_hosts": ["10.1"]}):
        with pytest.raises(UserError, match=f"data_config.{next(iter(data))}"):
            fetcher_of(recipe_of(**data))
