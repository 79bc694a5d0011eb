"""Frames out of a video file: their time stamps by demuxing, their pixels by seeking and decoding (PyAV).

Invariants: time stamps are read, never computed from a rate, unless the file has none; a packet is decoded at most
once per `read` (but for the few that an open group shares with the next), from a key frame to the last frame wanted.
Of a damaged file the whole frames are given and `warnings` says what is not there: a frame that is broken, or that was
decoded after a broken one of its group, is never shown. Does not know which frames are wanted or why, nor models.

Words: a packet is one coded frame; packets come in decode order, frames are shown in display order (they differ where
there are B-frames); a group of pictures is a key frame and what follows it up to the next one.
"""

import bisect
import io
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from executor.errors import UserError
from executor.media.extent import missing_bytes
from executor.media.formats import HEAD_BYTES, foreign
from executor.media.media import Deadline, MediaLimits
from executor.media.structure import damaged_at
from executor.media.timeline import Timeline
from executor.media.track import choose_track

# Demuxers that read one file and nothing else: a playlist (HLS, concat) would open what its lines name.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,h264,hevc,ivf,obu,nut,gif,mjpeg"
)
# Half of the cores: running answers need the others. Each thread holds a frame, and FFmpeg advises against many.
_DECODER_THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))

# Codecs with frames that no other refers to, which FFmpeg's decoder passes over when asked, and without packets that
# show nothing: there the frame before the wanted one would be needed too.
_SKIPPING_CODECS = ("h264", "hevc", "mpeg2video", "mpeg4")

_HEADERS_BYTES = 2048  # of a container, in a frame and behind it, at most

# Index into the timeline, the frame to show (None: no whole one yet), and whether it is the one that should be there.
_Shown = tuple[int, av.VideoFrame | None, bool]


class ContainerFrames:
    """A video file, opened and demuxed once. Counts what it decodes. Errors: UserError naming the source."""

    def __init__(self, content: bytes | Path, source: str, limits: MediaLimits):
        self._content, self._source = content, source
        self.decoded_frames = 0  # packets given to the decoder
        self.decoded_groups = 0  # groups of pictures they belong to
        self.seeks = 0
        self.warnings: list[str] = []
        self._can_seek = True
        self._deadline = Deadline(source, limits)
        self._container = None
        self._track: int | None = None
        self._open()
        try:
            context = self._stream.codec_context
            if context.width * context.height > limits.image_pixels:
                raise UserError(
                    f"{source}: frames of {context.width}x{context.height} pixels, at most {limits.image_pixels} in all"
                )
            self._demux_all(limits)
            self.timeline = self._make_timeline()
            self._tell_what_is_cut()
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
        """(index, uint8 [H, W, 3]), upright, for ascending distinct indices into `timeline`, in that order.

        In place of a broken frame comes the last whole one before it (the first one after it where there is none),
        with a warning; UserError when less than half of the frames asked for are whole.
        """
        broken: list[int] = []
        waiting: list[int] = []  # for a first whole frame
        shown: av.VideoFrame | None = None
        frames = self._read_by_seeking(indices) if self._timed else self._read_in_sequence(indices)
        try:
            for index, frame, is_whole in frames:
                if not is_whole:
                    broken.append(index)
                waiting.append(index)
                shown = frame or shown
                if shown is not None:
                    pixels = self._pixels(shown)
                    yield from ((early, pixels) for early in waiting)
                    waiting.clear()
        except av.FFmpegError as error:
            raise UserError(f"{self._source}: the video is damaged ({error.strerror}); get the file again") from error
        if 2 * len(broken) > len(indices):
            raise UserError(
                f"{self._source}: the video is damaged: {len(broken)} of the {len(indices)} frames to be looked at are "
                f"broken, the first at {self._seconds(broken[0])}; get the file again"
            )
        if broken:
            self.warnings.append(
                f"{self._source}: the video is damaged: {len(broken)} of the {len(indices)} frames looked at are "
                f"broken, the first at {self._seconds(broken[0])}; a whole one beside each is shown in its place"
            )
        elif self._damaged_at is not None and not self.warnings:
            self.warnings.append(
                f"{self._source}: the video is damaged: byte {self._damaged_at} of the file is no part of its format, "
                f"frames behind it may be missing; the answer is from the {self.timeline.num_frames} frames that were "
                f"found, {self.timeline.duration_s:.1f} seconds"
            )

    def _open(self) -> None:
        self.close()
        in_memory = isinstance(self._content, bytes)
        file = io.BytesIO(self._content) if in_memory else os.path.abspath(self._content)
        try:
            self._container = av.open(file, options={"format_whitelist": _DEMUXERS}, metadata_errors="replace")
        except av.FFmpegError as error:
            raise UserError(f"{self._source}: {self._unreadable(error)}") from error
        if self._track is None:
            self._track = choose_track(self._container)
            if self._track is None:
                beside = "" if not self._container.streams.video else ", only a picture beside the sound (cover art)"
                self.close()
                raise UserError(f"{self._source}: holds no video stream{beside}; give a picture or a video")
            if len(self._container.streams.video) > 1:  # choosing may have read on: from the start once more
                self._open()
                return
        self._stream = self._container.streams[self._track]
        if self._stream.codec_context is None:
            self.close()
            raise UserError(f"{self._source}: its video codec is not known to this FFmpeg")
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = _DECODER_THREADS
        self._packets = self._container.demux(self._stream)
        self._position = 0  # decode order of the next packet of `_packets`

    def _unreadable(self, error: av.FFmpegError) -> str:
        """Why the file does not open as a video."""
        if isinstance(self._content, bytes):
            head = self._content[:HEAD_BYTES]
        else:
            with self._content.open("rb") as file:
                head = file.read(HEAD_BYTES)
        strange = foreign(head)
        if strange:
            return f"not a readable video: {strange}"
        missing = missing_bytes(self._content)
        if missing:
            return (
                f"not a readable video: the file is cut short, {missing} bytes are missing, and without them no frame "
                "can be found; get the file again"
            )
        return (
            f"not a readable video ({error.strerror}); it may be cut short, or be none of MP4, MOV, MKV, WebM, AVI, "
            "MPEG, FLV, ASF, Ogg"
        )

    def _demux_all(self, limits: MediaLimits) -> None:
        """Reads every packet's time stamps and flags, decoding nothing."""
        self._pts: list[int | None] = []  # by decode order, as the next three are
        self._dts: list[int | None] = []
        self._sizes: list[int] = []
        self._is_shown: list[bool] = []  # not cut away by an edit list, or cut off
        self._keys: list[int] = []  # decode orders of the key frames
        self._broken: list[int] = []  # decode orders of packets that are known to be damaged, ascending
        self._damaged_at = damaged_at(self._content)
        was_behind, reach = False, -1  # the damage; where the last packet ends in the file, at most
        self._last_duration = 0
        self._demux_fault: str | None = None
        try:
            for packet in self._packets:
                self._deadline.check()
                if packet.size == 0:  # the end marker
                    continue
                is_behind = self._damaged_at is not None and self._damaged_at < (packet.pos or 0)
                if is_behind and not was_behind and reach >= self._damaged_at:
                    self._broken.append(len(self._pts) - 1)  # the damage may begin in the frame before
                reach = (packet.pos or 0) + packet.size * 9 // 8 + _HEADERS_BYTES
                # The first frame behind lost ones refers to them, unless it begins a group.
                if packet.is_corrupt or is_behind and not was_behind and not packet.is_keyframe:
                    self._broken.append(len(self._pts))
                was_behind = is_behind
                if packet.is_keyframe:
                    self._keys.append(len(self._pts))
                self._pts.append(packet.pts)
                self._dts.append(packet.dts)
                self._sizes.append(packet.size)
                self._is_shown.append(not packet.is_discard)
                self._last_duration = packet.duration or self._last_duration
                if len(self._pts) > limits.video_frames:
                    raise UserError(f"{self._source}: more than {limits.video_frames} frames; cut it into parts")
        except av.FFmpegError as error:  # what comes behind it is not to be had
            self._demux_fault = error.strerror
        if self._damaged_at is not None and not was_behind and reach >= self._damaged_at:
            self._broken.append(len(self._pts) - 1)
        self._broken = sorted(set(self._broken))
        self._position = len(self._pts)
        self._drop_ends()
        if not any(self._is_shown):
            missing = missing_bytes(self._content)
            cut = f"the file is cut short, {missing} bytes are missing, and " if missing else "the video is empty: "
            raise UserError(f"{self._source}: {cut}no whole frame {'is ' if missing else ''}in it")

    def _drop_ends(self) -> None:
        """Takes cut frames at the end, and what comes before the first key frame, off what is shown."""
        seen: set[int | None] = {None}
        for order in range(len(self._pts)):
            if self._pts[order] in seen and order in self._broken:
                self._is_shown[order] = False  # damaged down to its time stamp
            seen.add(self._pts[order])
        self._num_cut_off = self._num_before_key = 0
        while self._broken and self._broken[-1] == len(self._pts) - 1 - self._num_cut_off:
            self._is_shown[self._broken.pop()] = False
            self._num_cut_off += 1
        first = self._keys[0] if self._keys else 0
        for order in range(len(self._pts)):
            if order < first:
                self._num_before_key += self._is_shown[order]
            elif None in (self._pts[order], self._pts[first]) or self._pts[order] >= self._pts[first]:
                continue
            self._is_shown[order] = False  # behind the first key frame: refers to a group that is not there

    def _tell_what_is_cut(self) -> None:
        missing = missing_bytes(self._content)
        if missing or self._demux_fault or self._num_cut_off:
            # An MP4's index lists every frame, another container's only some.
            promised = len(self._stream.index_entries) if "mp4" in self._container.format.name else 0
            of_all = f" of {promised}" if promised > self.timeline.num_frames else ""
            how = f"{missing} bytes are missing" if missing else self._demux_fault or "its last frame is not whole"
            if not missing and self._damaged_at is not None:
                how = f"byte {self._damaged_at} of the file is no part of its format"
            self.warnings.append(
                f"{self._source}: the video is cut short ({how}); the answer is from its first "
                f"{self.timeline.num_frames}{of_all} frames, {self.timeline.duration_s:.1f} seconds"
            )
        if self._num_before_key:
            self.warnings.append(
                f"{self._source}: the video starts in the middle: its first {self._num_before_key} frames need others "
                "that are not in the file and are left out"
            )

    def _make_timeline(self) -> Timeline:
        shown = [pts for pts, is_shown in zip(self._pts, self._is_shown, strict=True) if is_shown]
        self._timed = None not in shown and len(set(shown)) == len(shown)
        if not self._timed:
            # A raw stream: no time stamps, but perhaps a rate. The guess heeds the codec's header, the average may not.
            rate = self._stream.guessed_rate or self._stream.average_rate
            if not rate:
                raise UserError(f"{self._source}: has neither time stamps nor a frame rate; remux it, e.g. to MP4")
            return Timeline(np.arange(len(shown)) / float(rate), 1 / float(rate), float(rate))
        orders = sorted(range(len(self._pts)), key=self._is_shown.__getitem__)  # of equal stamps a shown one's wins
        self._order = {self._pts[order]: order for order in orders if self._pts[order] is not None}
        self._shown_pts = sorted(shown)
        # When a frame is on the screen, whatever was decoded before it has been there once this time has come.
        self._horizon = list(itertools.accumulate((pts if pts is not None else 0 for pts in self._pts), max))
        time_base: Fraction = self._stream.time_base
        # Whole ticks are subtracted and scaled in double: exact to well below a microsecond over days.
        ticks = np.array(self._shown_pts, dtype=np.int64) - self._shown_pts[0]
        rate = self._stream.average_rate
        return Timeline(ticks * float(time_base), self._last_duration * float(time_base), float(rate) if rate else None)

    def _read_by_seeking(self, indices: list[int]) -> Iterator[_Shown]:
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
        while at >= 0 and (self._pts[self._keys[at]] is None or self._pts[self._keys[at]] > pts):
            at -= 1
        return self._keys[at] if at >= 0 else 0

    def _decode_run(self, key: int, last: int, indices: list[int]) -> Iterator[_Shown]:
        wanted = iter(indices)
        index = next(wanted, None)
        previous: av.VideoFrame | None = None
        orders = {self._order[self._shown_pts[each]] for each in indices}
        for frame in self._judged(key, last, orders):
            # Packets that show nothing (hidden reference frames) exist: the frame before stays on the screen.
            while index is not None and self._shown_pts[index] < frame.pts:
                yield self._stand_in(index, previous)
                index = next(wanted, None)
            if index is not None and self._shown_pts[index] == frame.pts:
                yield index, frame, True
                index = next(wanted, None)
            previous = frame
        while index is not None:
            yield self._stand_in(index, previous)
            index = next(wanted, None)

    def _judged(self, key: int, last: int, orders: set[int]) -> Iterator[av.VideoFrame]:
        """The whole frames of the packets `key` to `last`, in display order; of those not in `orders` maybe not all.

        A frame is judged once everything decoded before it has been seen: FFmpeg marks a broken frame, not those that
        refer to it, and a frame shown earlier may refer to one shown later.
        """
        held: list[av.VideoFrame] = []
        for frame in self._decoded(key, last, orders):
            if frame.pts not in self._order:  # not to be placed; if it was wanted, it is reported as missing
                continue
            # Before the run's key frame: of an open group whose other half was not decoded.
            if frame.is_corrupt and (self._pts[key] is None or frame.pts >= self._pts[key]):
                self._mark_broken(self._order[frame.pts])
            held.append(frame)
            while held and self._horizon[self._order[held[0].pts]] <= frame.pts:
                if self._is_whole(first := held.pop(0)):
                    yield first
        yield from filter(self._is_whole, held)

    def _mark_broken(self, order: int) -> None:
        at = bisect.bisect_left(self._broken, order)
        if self._broken[at : at + 1] != [order]:
            self._broken.insert(at, order)

    def _is_whole(self, frame: av.VideoFrame) -> bool:
        return not frame.is_corrupt and not self._hangs_on_broken(frame.pts)

    def _hangs_on_broken(self, pts: int) -> bool:
        """Whether a packet from the frame's key frame up to its own is broken."""
        key, order = self._key_of(pts), self._order[pts]
        return bisect.bisect_left(self._broken, key) < bisect.bisect_right(self._broken, order)

    def _decoded(self, key: int, last: int, orders: set[int]) -> Iterator[av.VideoFrame]:
        """Frames of the packets `key` to `last`, in display order, broken ones among them.

        A frame that is not among `orders` and that no other refers to is passed over by the decoder.
        """
        self._go_to(key)
        context, skips = self._stream.codec_context, self._stream.codec_context.name in _SKIPPING_CODECS
        self.decoded_groups += max(1, bisect.bisect_right(self._keys, last) - bisect.bisect_left(self._keys, key))
        # Drained, the decoder hands out what it holds back for reordering: no packet of the next group is needed.
        for packet in itertools.chain(itertools.islice(self._packets, last + 1 - self._position), [None]):
            self._deadline.check()
            if packet is not None:
                if skips:
                    context.skip_frame = "DEFAULT" if self._position in orders else "NONREF"
                self._position += 1
                self.decoded_frames += 1
            try:
                yield from self._stream.decode(packet)
            except av.FFmpegError:
                # Decoder threads report late: the broken packet is this one or one of those in flight.
                self._mark_broken(max(key, min(self._position, last + 1) - _DECODER_THREADS))
        context.flush_buffers()

    def _stand_in(self, index: int, frame: av.VideoFrame | None) -> _Shown:
        """The frame that is on the screen while none comes; not whole where one should have come."""
        is_whole = frame is not None and frame.pts >= self._shown_pts[max(0, index - 1)]
        return index, frame, is_whole and not self._hangs_on_broken(self._shown_pts[index])

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
        while self._position < key and next(self._packets, None) is not None:
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

    def _read_in_sequence(self, indices: list[int]) -> Iterator[_Shown]:
        """Without time stamps there is nothing to seek by: decodes from the start and counts."""
        self._open()
        wanted = iter(indices)
        index = next(wanted, None)
        previous: av.VideoFrame | None = None
        is_whole = True  # the group so far
        for shown, frame in enumerate(self._decoded_from_here()):
            self._deadline.check()
            self.decoded_frames += 1
            self.decoded_groups += frame.key_frame
            is_whole = (is_whole or frame.key_frame) and not frame.is_corrupt
            previous = frame if is_whole else previous
            if shown == index:
                yield index, previous, is_whole
                index = next(wanted, None)
            if index is None:
                return
        while index is not None:
            yield index, previous, False
            index = next(wanted, None)

    def _decoded_from_here(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self._packets:
                try:
                    yield from self._stream.decode(packet)
                except av.FFmpegError:  # no frame: it is missing from the count at the end
                    continue
        except av.FFmpegError:  # the file ends here; frames that are wanted behind it count as broken
            return

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        pixels = frame.to_ndarray(format="rgb24")
        quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, of phones held upright
        return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels

    def _seconds(self, index: int) -> str:
        return f"{self.timeline.times_s[index]:.3f} s"
