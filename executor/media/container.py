"""Frames out of a video file: their time stamps by demuxing, their pixels by seeking and decoding (PyAV).

Invariants: time stamps are read, never computed from a rate, unless the file has none; a packet is decoded at most
once per `read` (but for the few that an open group shares with the next), from a key frame to the last frame wanted.
Does not know which frames are wanted or why, nor models.

Words: a packet is one coded frame; packets come in decode order, frames are shown in display order (they differ where
there are B-frames); a group of pictures is a key frame and what follows it up to the next one.
"""

import bisect
import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from executor.errors import UserError
from executor.media.media import MediaLimits
from executor.media.timeline import Timeline

# Demuxers that read one file and nothing else: a playlist (HLS, concat) would open what its lines name.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,h264,hevc,ivf,obu,nut,gif,mjpeg"
)


class ContainerFrames:
    """A video file, opened and demuxed once. Counts what it decodes. Errors: UserError naming the source."""

    def __init__(self, content: bytes | Path, source: str, limits: MediaLimits):
        self._content, self._source = content, source
        self.decoded_frames = 0  # packets given to the decoder
        self.decoded_groups = 0  # groups of pictures they belong to
        self.seeks = 0
        self._can_seek = True
        self._container = None
        self._open()
        try:
            context = self._stream.codec_context
            if context.width * context.height > limits.image_pixels:
                raise UserError(
                    f"{source}: frames of {context.width}x{context.height} pixels, at most {limits.image_pixels} in all"
                )
            self._demux_all(limits)
            self.timeline = self._make_timeline()
            if self.timeline.duration_s > limits.video_duration_s:
                raise UserError(
                    f"{source}: {self.timeline.duration_s:.0f} seconds, at most {limits.video_duration_s:.0f} allowed; "
                    "cut it into parts"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, uint8 [H, W, 3]), upright, for ascending distinct indices into `timeline`, in that order."""
        try:
            yield from self._read_by_seeking(indices) if self._timed else self._read_in_sequence(indices)
        except av.FFmpegError as error:
            raise UserError(f"{self._source}: the video is damaged ({error.strerror})") from error

    def _open(self) -> None:
        self.close()
        file = io.BytesIO(self._content) if isinstance(self._content, bytes) else str(self._content.resolve())
        try:
            self._container = av.open(file, options={"format_whitelist": _DEMUXERS}, metadata_errors="replace")
        except av.FFmpegError as error:
            raise UserError(
                f"{self._source}: not a readable video ({error.strerror}); it may be cut short, or be none of MP4, "
                "MOV, MKV, WebM, AVI, MPEG, FLV, ASF, Ogg"
            ) from error
        if not self._container.streams.video:
            self.close()
            raise UserError(f"{self._source}: holds no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self.close()
            raise UserError(f"{self._source}: its video codec is not known to this FFmpeg")
        self._stream.thread_type = "AUTO"
        # As many as this thread computes with: one where others have the other cores (executor.engine.prepare).
        self._stream.codec_context.thread_count = torch.get_num_threads()
        self._packets = self._container.demux(self._stream)
        self._position = 0  # decode order of the next packet of `_packets`

    def _demux_all(self, limits: MediaLimits) -> None:
        """Reads every packet's time stamps and flags, decoding nothing."""
        self._pts: list[int | None] = []  # by decode order, as the next three are
        self._dts: list[int | None] = []
        self._sizes: list[int] = []
        self._is_shown: list[bool] = []  # not cut away by an edit list
        self._keys: list[int] = []  # decode orders of the key frames
        last_duration = 0
        try:
            for packet in self._packets:
                if packet.size == 0:  # the end marker
                    continue
                if packet.is_corrupt:
                    raise UserError(f"{self._source}: the video is damaged or cut short at packet {len(self._pts)}")
                if packet.is_keyframe:
                    self._keys.append(len(self._pts))
                self._pts.append(packet.pts)
                self._dts.append(packet.dts)
                self._sizes.append(packet.size)
                self._is_shown.append(not packet.is_discard)
                last_duration = packet.duration or last_duration
                if len(self._pts) > limits.video_frames:
                    raise UserError(f"{self._source}: more than {limits.video_frames} frames; cut it into parts")
        except av.FFmpegError as error:
            raise UserError(
                f"{self._source}: the video is damaged after packet {len(self._pts)} ({error.strerror})"
            ) from error
        if not any(self._is_shown):
            raise UserError(f"{self._source}: the video is empty: no frame in it")
        # An MP4's index lists every frame, another container's only some.
        promised = len(self._stream.index_entries) if "mp4" in self._container.format.name else 0
        if promised > len(self._pts):
            raise UserError(f"{self._source}: the video is cut short: {len(self._pts)} of {promised} frames are there")
        self._last_duration = last_duration
        self._position = len(self._pts)

    def _make_timeline(self) -> Timeline:
        shown = [pts for pts, is_shown in zip(self._pts, self._is_shown, strict=True) if is_shown]
        self._timed = None not in self._pts and len(set(self._pts)) == len(self._pts)
        if not self._timed:
            # A raw stream: no time stamps, but perhaps a rate. The guess heeds the codec's header, the average may not.
            rate = self._stream.guessed_rate or self._stream.average_rate
            if not rate:
                raise UserError(f"{self._source}: has neither time stamps nor a frame rate; remux it, e.g. to MP4")
            return Timeline(np.arange(len(shown)) / float(rate), 1 / float(rate), float(rate))
        self._order = {pts: order for order, pts in enumerate(self._pts)}
        self._shown_pts = sorted(shown)
        time_base: Fraction = self._stream.time_base
        # Whole ticks are subtracted and scaled in double: exact to well below a microsecond over days.
        ticks = np.array(self._shown_pts, dtype=np.int64) - self._shown_pts[0]
        rate = self._stream.average_rate
        return Timeline(ticks * float(time_base), self._last_duration * float(time_base), float(rate) if rate else None)

    def _read_by_seeking(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Cuts the indices into runs, each decoded in one go from a key frame on."""
        run: list[int] = []
        first = last = 0  # decode orders of the run's key frame and of the last packet it needs
        for index in indices:
            pts = self._shown_pts[index]
            key, order = self._key_of(pts), self._order[pts]
            if run and key > last + 1:
                yield from self._decode_run(first, last, run)
                run = []
            if not run:
                first = last = key
            run.append(index)
            last = max(last, order)
        if run:
            yield from self._decode_run(first, last, run)

    def _key_of(self, pts: int) -> int:
        """Decode order of the key frame from which the frame at `pts` can be decoded.

        The last one before it in the file that is not shown after it: pictures that follow a key frame in the file
        but precede it on the screen (an open group) refer to the group before.
        """
        at = bisect.bisect_right(self._keys, self._order[pts]) - 1
        while at >= 0 and self._pts[self._keys[at]] > pts:
            at -= 1
        return self._keys[at] if at >= 0 else 0

    def _decode_run(self, key: int, last: int, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        wanted = iter(indices)
        index = next(wanted, None)
        previous: av.VideoFrame | None = None
        for frame in self._decoded(key, last):
            if frame.pts is None:  # not to be placed; if it was wanted, it is reported as missing
                continue
            # Packets that show nothing (hidden reference frames) exist: the frame before stays on the screen.
            while index is not None and self._shown_pts[index] < frame.pts:
                yield index, self._stand_in(index, previous)
                index = next(wanted, None)
            if index is not None and self._shown_pts[index] == frame.pts:
                yield index, self._pixels(frame)
                index = next(wanted, None)
            previous = frame
        while index is not None:
            yield index, self._stand_in(index, previous)
            index = next(wanted, None)

    def _decoded(self, key: int, last: int) -> Iterator[av.VideoFrame]:
        """Frames of the packets `key` to `last`, in display order."""
        self._go_to(key)
        self.decoded_groups += max(1, bisect.bisect_right(self._keys, last) - bisect.bisect_left(self._keys, key))
        while self._position <= last:
            packet = next(self._packets)
            self._position += 1
            self.decoded_frames += 1
            yield from self._stream.decode(packet)
        # Drained, the decoder hands out what it holds back for reordering: no packet of the next group is needed.
        yield from self._stream.decode(None)
        self._stream.codec_context.flush_buffers()

    def _stand_in(self, index: int, frame: av.VideoFrame | None) -> np.ndarray:
        if frame is None or frame.pts < self._shown_pts[max(0, index - 1)]:
            raise UserError(
                f"{self._source}: the video is damaged: no frame at {self._seconds(self._shown_pts[index])}"
            )
        return self._pixels(frame)

    def _go_to(self, key: int) -> None:
        """Makes `key` the next packet. Containers seek by pts or by dts and some land late: the landing is checked."""
        if self._position == key:
            return
        if self._can_seek:
            before = self._keys[max(0, bisect.bisect_left(self._keys, key) - 1)] if self._keys else 0
            for target in (self._pts[key], self._dts[key], self._pts[before], self._dts[before]):
                if target is not None and self._seek(target, key):
                    return
            # Program streams stamp other packets after a seek than before it. From the start they do not.
            self._can_seek = False
            self._position = len(self._pts)
        if self._position > key:
            self._open()
            self.seeks += 1
        while self._position < key:
            next(self._packets)
            self._position += 1

    def _seek(self, target: int, key: int) -> bool:
        """Seeks to `target` and passes over packets up to `key`; whether that one is then next."""
        self.seeks += 1
        try:
            self._container.seek(target, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            packet = next(packets)
            for _ in range(self._order.get(packet.pts, len(self._pts)), key):
                packet = next(packets)
        except (av.FFmpegError, StopIteration):
            return False
        if (packet.pts, packet.size) != (self._pts[key], self._sizes[key]):
            return False
        self._packets, self._position = itertools.chain([packet], packets), key
        return True

    def _read_in_sequence(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Without time stamps there is nothing to seek by: decodes from the start and counts."""
        self._open()
        wanted = iter(indices)
        index = next(wanted, None)
        for shown, frame in enumerate(self._container.decode(self._stream)):
            self.decoded_frames += 1
            self.decoded_groups += frame.key_frame
            if shown == index:
                yield index, self._pixels(frame)
                index = next(wanted, None)
            if index is None:
                return
        raise UserError(f"{self._source}: the video is damaged: frame {index} cannot be decoded")

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise UserError(f"{self._source}: the video is damaged: the frame at {self._seconds(frame.pts)} is broken")
        pixels = frame.to_ndarray(format="rgb24")
        quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, of phones held upright
        return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels

    def _seconds(self, pts: int | None) -> str:
        if pts is None or not self._timed:
            return "an unknown time"
        return f"{float((pts - self._shown_pts[0]) * self._stream.time_base):.3f} s"
