"""Videos of every odd kind give the frames a full decode gives, and cost only the groups of pictures they need."""

import io
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from executor.errors import UserError
from executor.media.container import ContainerFrames
from executor.media.image import decode_image
from executor.media.media import MediaLimits, load_media
from executor.media.sampling import Sampling, spread, strided
from executor.media.video import SampledVideo, read_video
from tests.media.media_files import decode_all, make_frames, write_video

TWO_FPS = Sampling(spread)


def assert_frames(video: SampledVideo, every_frame: np.ndarray) -> None:
    expected = torch.from_numpy(every_frame[list(video.indices)]).permute(0, 3, 1, 2)
    assert torch.equal(video.frames, expected)
    assert len(video.timestamps_s) == len(video.indices) == video.frames.shape[0]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"g": "10"}),  # with B-frames, as x264 makes by default
        ("no_b.mp4", "libx264", {"g": "10", "bf": "0"}),
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0"}),
        ("open.mkv", "libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0"}),
        ("hevc.mp4", "libx265", {"x265-params": "keyint=10:min-keyint=10:open-gop=1:log-level=none"}),
        ("closed.mkv", "libx264", {"g": "10"}),
        ("intra.mp4", "libx264", {"g": "1"}),
        ("stream.ts", "libx264", {"g": "10"}),
        ("vp9.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime"}),
        ("vp8.webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("mpeg4.avi", "mpeg4", {"g": "10", "bf": "2"}),
        ("mpeg2.mpg", "mpeg2video", {"g": "10", "bf": "2"}),
    ],
)
@pytest.mark.parametrize("rule", [spread, strided])
def test_frames_equal_a_full_decode(tmp_path: Path, name: str, codec: str, options: dict, rule) -> None:
    # x265 overruns its buffers with pictures smaller than its blocks of 64.
    path = write_video(tmp_path / name, make_frames(75, 96, 128), Fraction(25), codec, options=options)
    every_frame = decode_all(path)
    sparse = read_video(path, Sampling(rule, fps=1, min_frames=2))
    assert sparse.total_frames == 75 and sparse.frame_rate == 25
    assert_frames(sparse, every_frame)
    assert sparse.timestamps_s == tuple(index / 25 for index in sparse.indices)
    dense = read_video(path, Sampling(rule, fps=25))
    assert len(dense.indices) == 75 - (rule is strided)
    assert_frames(dense, every_frame)
    assert dense.decoded_frames <= 75


def test_frames_that_nobody_refers_to_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture in four is wanted; of the three B-frames between two others only the middle one is referred to."""
    x264 = "keyint=40:min-keyint=40:scenecut=0:bframes=3:b-adapt=0:b-pyramid=normal"
    path = write_video(tmp_path / "a.mp4", make_frames(81, 96, 128), Fraction(8), options={"x264-params": x264})
    every_frame = decode_all(path)
    given = []
    decoded = ContainerFrames._decoded

    def counted(self, *arguments):
        for frame in decoded(self, *arguments):
            given.append(frame.pts)
            yield frame

    monkeypatch.setattr(ContainerFrames, "_decoded", counted)
    video = read_video(path, Sampling(strided, fps=2))
    assert_frames(video, every_frame)
    assert len(video.indices) <= len(given) <= 0.65 * video.decoded_frames


def test_bytes_and_path_are_read_alike(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", make_frames(40), options={"g": "8"})
    from_path, from_bytes = (read_video(content, TWO_FPS) for content in (path, path.read_bytes()))
    assert torch.equal(from_path.frames, from_bytes.frames)
    assert from_path.timestamps_s == from_bytes.timestamps_s


def test_an_hour_costs_one_group_of_pictures_a_sample(tmp_path: Path) -> None:
    # One frame per second, a key frame every 20: 180 groups. The clip is made once and its packets repeated.
    clip = write_video(tmp_path / "clip.mp4", make_frames(20), 1, options={"g": "20", "keyint_min": "20"})
    hour = tmp_path / "hour.mp4"
    with av.open(str(clip)) as source, av.open(str(hour), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in source.demux(video=0) if p.size]
        second = int(1 / source.streams.video[0].time_base)
        for repeat in range(180):
            for data, pts, dts, is_keyframe in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + repeat * 20 * second, dts + repeat * 20 * second
                packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, second), is_keyframe, stream
                target.mux(packet)
    video = read_video(hour, Sampling(spread, max_frames=64))
    assert video.total_frames == 3600 and video.duration_s == 3600
    assert video.frames.shape[0] == 64 and video.timestamps_s[-1] == 3599
    assert video.decoded_groups <= 64 and video.seeks <= 2 * 64
    assert video.decoded_frames <= 64 * 20
    once = decode_all(clip)
    assert_frames(video, np.concatenate([once] * 180))


def test_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    # Ten frames in the first second, then one that stays for nine: evenly spaced moments see it most of the time.
    times_ms = [*range(0, 1000, 100), 1000, 9900]
    path = write_video(tmp_path / "v.mp4", make_frames(12), times_ms=times_ms, options={"g": "4"})
    video = read_video(path, Sampling(spread, fps=1))
    assert video.frames.shape[0] == 10
    shown_at = np.array(times_ms)[list(video.indices)] / 1000
    for moment, shown, index in zip(video.timestamps_s, shown_at, video.indices, strict=True):
        assert shown <= moment
        assert index == 11 or times_ms[index + 1] / 1000 > moment
    assert video.indices.count(10) >= 7
    assert_frames(video, decode_all(path))


def test_rounded_time_stamps_still_count_as_constant(tmp_path: Path) -> None:
    # Matroska keeps whole milliseconds: 30000/1001 per second is 0, 33, 67, 100 ms ...
    path = write_video(tmp_path / "n.mkv", make_frames(90), Fraction(30000, 1001), options={"g": "30"})
    video = read_video(path, TWO_FPS)
    assert video.frame_rate == 30000 / 1001
    assert list(video.indices) == TWO_FPS.indices(90, 30000 / 1001)


def test_without_time_stamps_frames_are_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.h264", make_frames(30), options={"g": "10"}, container_format="h264")
    video = read_video(path, Sampling(spread, fps=5))
    assert (video.seeks, video.frame_rate, video.total_frames) == (0, 10, 30)
    assert_frames(video, decode_all(path))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("rule", [spread, strided])
def test_few_and_odd_frames(tmp_path: Path, num_frames: int, rule) -> None:
    path = write_video(tmp_path / "few.mp4", make_frames(num_frames))
    video = read_video(path, Sampling(rule))
    assert_frames(video, decode_all(path))
    even = num_frames - num_frames % 2 if num_frames > 1 else 1
    assert video.frames.shape[0] == min(4, num_frames if rule is spread else even)


def several_tracks(path: Path, tracks: list[tuple[int, int, int, bool]], cover: bool = False) -> list[np.ndarray]:
    """A file of several video tracks, each (frames, height, width, default), of none with sound; returns the frames."""
    made = []
    with av.open(str(path), "w") as container:
        streams = []
        for _, height, width, is_default in tracks:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.disposition = Disposition.default if is_default else Disposition(0)
            streams.append(stream)
        if not tracks:
            container.add_stream("aac", rate=16000)
        if cover:
            buffer = io.BytesIO()
            Image.new("RGB", (300, 300), "red").save(buffer, "JPEG")
            pictures = container.add_stream("mjpeg", rate=1)
            pictures.height = pictures.width = 300
            pictures.pix_fmt, pictures.disposition = "yuvj420p", Disposition.attached_pic
            container.start_encoding()
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = pictures, 0, 0, True
            packet.time_base = pictures.time_base
            container.mux(packet)
        if not tracks:
            sound = container.streams.audio[0]
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            container.mux([*sound.encode(silence), *sound.encode(None)])
        for seed, (stream, (count, height, width, _)) in enumerate(zip(streams, tracks, strict=True)):
            for pixels in make_frames(count, height, width, seed):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    for index in range(len(tracks)):
        with av.open(str(path)) as container:
            stream = [stream for stream in container.streams.video if stream.width != 300][index]
            made.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]))
    return made


def cover_first(data: bytes) -> bytes:
    """An MP4 with its cover (in `udta`) moved before its tracks in the index, as some shops sell films."""
    start = data.index(b"moov") - 4
    end = start + int.from_bytes(data[start : start + 4])
    boxes, at = [], start + 8
    while at < end:
        size = int.from_bytes(data[at : at + 4])
        boxes.append(data[at : at + size])
        at += size
    boxes.sort(key=lambda box: {b"mvhd": 0, b"udta": 1}.get(box[4:8], 2))
    return data[: start + 8] + b"".join(boxes) + data[end:]


@pytest.mark.parametrize("is_first", [False, True])
def test_a_cover_is_not_the_video(tmp_path: Path, is_first: bool) -> None:
    path = tmp_path / "song.mp4"
    (frames,) = several_tracks(path, [(8, 32, 48, True)], cover=True)
    data = cover_first(path.read_bytes()) if is_first else path.read_bytes()
    with av.open(io.BytesIO(data)) as container:
        covers = [bool(stream.disposition & Disposition.attached_pic) for stream in container.streams.video]
    assert covers == [is_first, not is_first]
    assert_frames(read_video(data, TWO_FPS), frames)


def test_sound_with_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    several_tracks(path, [], cover=True)
    with pytest.raises(UserError, match="^song: holds no video stream, only a picture beside the sound"):
        read_video(path, TWO_FPS, source="song")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_several_tracks_the_default_one_then_the_largest(tmp_path: Path, suffix: str) -> None:
    for name, tracks, wanted in (
        ("default", [(6, 64, 96, False), (6, 32, 48, True)], 1),
        ("largest", [(6, 32, 48, True), (6, 64, 96, True)], 1),
        ("still", [(1, 64, 96, True), (6, 32, 48, False)], 1),  # a cover as Matroska's tracks hold it
        ("alike", [(6, 32, 48, False), (6, 32, 48, False)], 0),
    ):
        frames = several_tracks(tmp_path / f"{name}.{suffix}", tracks)
        video = read_video(tmp_path / f"{name}.{suffix}", TWO_FPS)
        assert_frames(video, frames[wanted])
        assert video.warnings == ()


def test_sound_is_passed_over(tmp_path: Path) -> None:
    path = write_video(tmp_path / "sound.mp4", make_frames(20), audio=True)
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert_frames(read_video(path, TWO_FPS), decode_all(path))


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "phone.mp4", make_frames(6, height=32, width=48), rotation=-90)
    video = read_video(path, TWO_FPS)
    assert (video.height, video.width) == (48, 32)
    upright = np.rot90(decode_all(path), -1, axes=(1, 2)).copy()  # a quarter clockwise
    assert_frames(video, upright)


def test_frames_are_resized_as_they_come(tmp_path: Path) -> None:
    path = write_video(tmp_path / "r.mp4", make_frames(20))
    asked = []

    def size_of(num_frames: int, height: int, width: int) -> tuple[int, int]:
        asked.append((num_frames, height, width))
        return 28, 56

    video = read_video(path, TWO_FPS, size_of=size_of)
    assert video.frames.shape == (4, 3, 28, 56) and set(asked) == {(4, 32, 48)}


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_pictures_are_videos(tmp_path: Path, suffix: str) -> None:
    colours = [(index * 30, 0, 255 - index * 30) for index in range(8)]
    pictures = [Image.new("RGB", (20, 10), colour) for colour in colours]
    delays_ms = [100, 100, 100, 100, 100, 100, 2000, 400]
    path = tmp_path / f"a.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays_ms, **lossless)
    video = read_video(path, TWO_FPS)
    assert video.total_frames == 8 and video.duration_s == pytest.approx(3.0)
    assert video.indices == (0, 3, 6, 6, 6, 7) and video.frames.shape == (6, 3, 10, 20)
    shown = [tuple(frame[:, 0, 0].tolist()) for frame in video.frames]
    assert shown == [colours[index] for index in video.indices]
    assert read_video(path.read_bytes(), TWO_FPS).timestamps_s == video.timestamps_s


def test_transparent_animation_lies_on_white() -> None:
    buffer = io.BytesIO()
    pictures = [Image.new("RGBA", (8, 8), (10 * index, 0, 0, 0)) for index in range(2)]
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    video = read_video(buffer.getvalue(), TWO_FPS)
    assert bool((video.frames == 255).all())


def test_a_still_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (9, 8, 7)).save(tmp_path / "still.png")
    media = load_media(tmp_path / "still.png", "video")
    video = read_video(media.content, TWO_FPS, source=media.source)
    assert video.frames.shape == (1, 3, 10, 20) and video.timestamps_s == (0.0,)


def test_arrays_and_lists_of_frames(tmp_path: Path) -> None:
    frames = make_frames(10)
    paths = []
    for index, frame in enumerate(frames):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(frame).save(paths[-1])
    for content in (frames, [Image.fromarray(frame) for frame in frames], load_media(tmp_path, "video").content, paths):
        taken_whole = read_video(content, Sampling(strided))
        assert taken_whole.indices == tuple(range(10)) and taken_whole.timestamps_s[:3] == (0.0, 0.5, 1.0)
        assert_frames(taken_whole, frames)
        sampled = read_video(content, TWO_FPS, frame_rate=5)
        assert list(sampled.indices) == TWO_FPS.indices(10, 5)
        assert_frames(sampled, frames)


def test_bad_videos_name_the_source(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", make_frames(40, 64, 64))
    (tmp_path / "playlist.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n")
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    bad = {
        "empty": (b"", "empty"),
        "text": (b"no video at all\n" * 50, "not a readable video"),
        "playlist": (tmp_path / "playlist.m3u8", "not a readable video: it is a playlist"),
        "sound": (sound, "no video stream"),
        "lost": (tmp_path / "lost.mp4", "cannot be read"),
    }
    for name, (content, reason) in bad.items():
        with pytest.raises(UserError, match=f"^{name}: .*{reason}"):
            read_video(content, TWO_FPS, source=name)


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.mkv"
    data = write_video(path, make_frames(10)).read_bytes()
    assert data.count(b"Lavf") > 0
    assert read_video(data.replace(b"Lavf", b"L\xe9vf"), TWO_FPS).total_frames == 10  # Latin-1, not UTF-8


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (MediaLimits(video_duration_s=1.0), "4 seconds, at most 1 allowed"),
        (MediaLimits(video_frames=10), "more than 10 frames"),
        (MediaLimits(image_pixels=1000), "48x32 pixels, at most 1000"),
        (MediaLimits(decode_s=0.0), "takes more than 0 seconds to decode"),
        (MediaLimits(video_bytes=100), "bytes, at most 100"),
    ],
)
def test_limits(tmp_path: Path, limits: MediaLimits, reason: str) -> None:
    path = write_video(tmp_path / "big.mp4", make_frames(40))
    with pytest.raises(UserError, match=f"^clip: .*{reason}"):
        read_video(path, TWO_FPS, source="clip", limits=limits)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_limits_of_animations(image_format: str) -> None:
    """A few bytes for each frame of a large picture, which is drawn whole."""
    frames = [Image.new("L", (300, 200), 40 * number) for number in range(6)]
    buffer = io.BytesIO()
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], duration=100)
    for limits, reason in (
        (MediaLimits(animation_pixels=359_999), "an animation of 360000 pixels in all its frames, at most 359999"),
        (MediaLimits(decode_s=0.0), "takes more than 0 seconds to decode"),
    ):
        with pytest.raises(UserError, match=f"^clip: {reason}"):
            read_video(buffer.getvalue(), TWO_FPS, source="clip", limits=limits)
    assert read_video(buffer.getvalue(), TWO_FPS, limits=MediaLimits(animation_pixels=360_000)).total_frames == 6


def test_frames_of_several_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="^list: frame 1 is 8x9 pixels, the first one 9x9"):
        read_video([Image.new("RGB", (9, 9)), Image.new("RGB", (8, 9))], TWO_FPS, source="list")


def test_more_frames_than_there_are(tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", make_frames(4))
    with pytest.raises(UserError, match="^short: 6 frames asked for by num_frames, the video has 4"):
        read_video(path, Sampling(strided, num_frames=6), source="short")
    assert read_video(path, Sampling(spread, num_frames=6)).frames.shape[0] == 6  # as transformers: some twice


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    """Prompts are prepared in several threads: nothing is shared between two readers."""
    paths = [write_video(tmp_path / f"{n}.mp4", make_frames(30, 64, 96, n), options={"g": "10"}) for n in range(3)]
    alone = [read_video(path, TWO_FPS, size_of=lambda *_: (56, 84)) for path in paths]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda path: read_video(path, TWO_FPS, size_of=lambda *_: (56, 84)), paths * 6))
    for number, video in enumerate(together):
        assert torch.equal(video.frames, alone[number % 3].frames)
        assert video.warnings == () and video.timestamps_s == alone[number % 3].timestamps_s


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_asked_for_as_a_video_is_upright(suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(make_frames(1)[0]).save(buffer, suffix, exif=exif)
    video = read_video(buffer.getvalue(), Sampling(spread, fps=10))
    assert torch.equal(video.frames[0], decode_image(buffer.getvalue()))


@pytest.mark.parametrize("suffix", ["PNG", "WEBP"])
def test_every_frame_of_an_animation_is_upright(suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames, buffer = make_frames(3), io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    lossless = {"lossless": True} if suffix == "WEBP" else {}
    pictures[0].save(buffer, suffix, save_all=True, append_images=pictures[1:], duration=100, exif=exif, **lossless)
    video = read_video(buffer.getvalue(), Sampling(spread, fps=10))
    assert np.array_equal(video.frames.permute(0, 2, 3, 1).numpy(), np.rot90(frames, -1, axes=(1, 2)))
