"""Which video track of a file is looked at."""

import itertools

import av
from av.stream import Disposition

# A cover of a song or film, a list of previews: pictures beside the video, which players do not play either.
_NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails


def choose_track(container: av.container.InputContainer) -> int | None:
    """Index (in the container) of the video track to look at; None when there is none but pictures.

    The track marked as default, else the one of the most pixels, as the ffmpeg program does. A track of one picture
    comes last: Matroska files hold covers as such tracks. Moves the container's position where it has several tracks.
    """
    tracks = [track for track in container.streams.video if not track.disposition & _NOT_VIDEO]
    if len(tracks) > 1:
        tracks = [track for track in tracks if track.codec_context is not None] or tracks
    if not tracks:
        return None
    moving = {track.index for track in tracks}
    if len(tracks) > 1:
        moving = _moving_tracks(container, tracks)

    def rank(track: av.VideoStream) -> tuple[bool, bool, int]:
        context = track.codec_context
        pixels = context.width * context.height if context is not None else 0
        return track.index in moving, bool(track.disposition & Disposition.default), pixels

    return max(tracks, key=rank).index


def _moving_tracks(container: av.container.InputContainer, tracks: list[av.VideoStream]) -> set[int]:
    """Indices of the tracks with more than one frame. Reads packets until each has shown two, decoding nothing."""
    counts = dict.fromkeys((track.index for track in tracks), 0)
    try:
        for packet in itertools.takewhile(lambda _: min(counts.values()) < 2, container.demux(*tracks)):
            counts[packet.stream_index] += packet.size > 0
    except av.FFmpegError:  # damage is reported when the chosen track is read
        pass
    return {index for index, count in counts.items() if count > 1}
