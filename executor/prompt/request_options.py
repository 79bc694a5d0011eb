"""What a whole request says about its pictures and videos, in the forms that clients of vLLM and transformers send.

`mm_processor_kwargs` is flat, or has the parts `images_kwargs` and `videos_kwargs`; `media_io_kwargs` stands beside its
keys here. Each picture and video is prepared as if its own part said so; what the part itself says comes first.
`size` means an area, as these models' processors read it: of a picture; of a video what the family's class bounds.
Opens nothing, knows no family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from executor.errors import UserError, nearest
from executor.prompt.messages import describe, describe_value, media_overrides

WHERE = "mm_processor_kwargs"
IO_KEY = "media_io_kwargs"
PARTS = {"images_kwargs": "image", "videos_kwargs": "video"}
OPTIONS = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("min_pixels", "max_pixels", "fps", "num_frames", "min_frames", "max_frames"),
}
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels", "min_pixels": "min_pixels",
         "max_pixels": "max_pixels"}  # fmt: skip
# What transformers' processors can be told, and what is done here.
DONE = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
}
UNLIMITED = -1  # vLLM's: all frames of the file, for the processor to choose from


@dataclass(frozen=True)
class RequestOptions:
    """Of all pictures, and of all videos: names as in messages.OPTION_RULES.

    `video_size`: least and most pixels of what the family's video class bounds, None where nothing is said.
    """

    image: Mapping[str, float] = field(default_factory=dict)
    video: Mapping[str, float] = field(default_factory=dict)
    video_size: tuple[int | None, int | None] = (None, None)
    cap_pixels_per_frame: bool | None = None


def read_request_options(given: Mapping[str, Any] | None) -> RequestOptions:
    """Raises UserError for an unknown key, and for a value that cannot be done."""
    if not given:
        return RequestOptions()
    flat = _mapping(given, WHERE)
    io = _mapping(flat.pop(IO_KEY, None) or {}, IO_KEY)
    parts = {kind: _mapping(flat.pop(key, None) or {}, f"{WHERE}.{key}") for key, kind in PARTS.items()}
    said = {}
    for kind, more in parts.items():
        of_kind = _Said(kind, flat, WHERE, others=OPTIONS["video" if kind == "image" else "image"])
        of_kind.take(more, f"{WHERE}.{kind}s_kwargs")
        said[kind] = of_kind
    io_video = _io_options(io)
    video = said["video"]
    if io_video and (video.options.keys() & {"fps", "num_frames"}):
        raise UserError(
            f"{IO_KEY}.video and {WHERE} both say which frames are looked at; give fps or num_frames in one of them"
        )
    if video.samples is False and "num_frames" not in {*video.options, *io_video}:
        raise UserError(
            f"{WHERE}.do_sample_frames is false, and nothing says how many frames are looked at; leave it out, or give "
            "num_frames"
        )
    if {"fps", "num_frames"} <= video.options.keys():
        raise UserError(f"{WHERE}: fps and num_frames exclude each other; give one of them")
    image_size = {name: value for name, value in zip(OPTIONS["image"], said["image"].size, strict=True) if value}
    return RequestOptions(
        image=image_size | said["image"].options,
        video=video.options | io_video,
        video_size=video.size,
        cap_pixels_per_frame=video.caps,
    )


class _Said:
    """What is said of one kind of media: flat keys first, then those of its own part, which win."""

    def __init__(self, kind: str, flat: Mapping[str, Any], where: str, *, others: Sequence[str]) -> None:
        self.kind = kind
        self.options: dict[str, float] = {}
        self.size: tuple[int | None, int | None] = (None, None)
        self.samples: bool | None = None
        self.caps: bool | None = None
        self._known = (*OPTIONS[kind], "size", *DONE, "use_fast")
        self._of_videos = ("do_sample_frames", "cap_pixels_per_frame")
        self.take(flat, where, (*others, *self._of_videos))

    def take(self, given: Mapping[str, Any], where: str, passed_over: Sequence[str] = ()) -> None:
        """`passed_over`: keys that mean other kinds."""
        known = (*self._known, *(self._of_videos if self.kind == "video" else ()))
        # Beside min_pixels and max_pixels a size counts for nothing, as in transformers.
        for key, value in sorted(given.items(), key=lambda item: item[0] != "size"):
            if value is None or (key not in known and key in passed_over):
                continue
            if key not in known:
                every = sorted({*known, *passed_over, *(() if where != WHERE else (*PARTS, IO_KEY))})
                raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), every)}; allowed: {', '.join(every)}")
            self._set(key, value, where)

    def _set(self, key: str, value: Any, where: str) -> None:
        if key == "size":
            least, most = _edges(value, f"{where}.size")
            self.size = (self.size[0] if least is None else least, self.size[1] if most is None else most)
            for name in [name for name, edge in (("min_pixels", least), ("max_pixels", most)) if edge is not None]:
                self.options.pop(name, None)
        elif key in OPTIONS[self.kind]:
            if key == "fps" and isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]  # transformers takes one for each video
            self.options |= media_overrides({key: value}, where)
        elif not isinstance(value, bool):
            raise UserError(f"{where}.{key} must be true or false, got {describe(value)}")
        elif key == "do_sample_frames":
            self.samples = value
        elif key == "cap_pixels_per_frame":
            self.caps = value
        elif DONE.get(key, value) != value:
            raise UserError(f"{where}.{key} is {value}; only {DONE[key]} is supported: leave it out")


def _edges(size: Any, where: str) -> tuple[int | None, int | None]:
    """Least and most pixels."""
    edges: dict[str, float] = {}
    for key, value in _mapping(size, where).items():
        if key not in EDGES:
            raise UserError(
                f"{where}: unknown key {key!r}; allowed: shortest_edge and longest_edge, the least and most pixels of "
                "an area"
            )
        if value is not None:
            media_overrides({EDGES[key]: value}, where)
            edges[EDGES[key]] = int(value)
    least, most = edges.get("min_pixels"), edges.get("max_pixels")
    if least is not None and most is not None and least > most:
        raise UserError(f"{where}: shortest_edge {least} is above longest_edge {most}; swap them")
    return least, most


def _io_options(io: Mapping[str, Any]) -> dict[str, float]:
    """How vLLM reads videos before its processor: so many frames, or so many a second and that many at most."""
    for kind, options in io.items():
        allowed = {"video": ("num_frames", "fps"), "image": ("image_mode",)}.get(kind)
        if allowed is None and options:
            raise UserError(f"{IO_KEY}: unknown key {kind!r}; allowed: video, image")
        for key, value in _mapping(options or {}, f"{IO_KEY}.{kind}").items():
            if key not in allowed or (key == "image_mode" and value not in (None, "RGB")):
                raise UserError(
                    f"{IO_KEY}.{kind}.{key} is {describe_value(value)}, which is not supported; allowed: "
                    f"{', '.join(allowed)}"
                )
    said = {key: value for key, value in (io.get("video") or {}).items() if value not in (None, UNLIMITED)}
    found = media_overrides(said, f"{IO_KEY}.video")
    if "fps" in found and "num_frames" in found:
        found["max_frames"] = found.pop("num_frames")
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must be an object, got {describe(value)}")
    return dict(value)
