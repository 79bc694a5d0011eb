"""From rendered pieces and opened media to a `Prompt`: placeholders expanded, tokens, spans, M-RoPE positions, digests.

The mechanics that all families share. What a family decides comes as an argument: the pieces that stand for a video,
the local positions of a span. Importing this module, and building a prompt of text alone, loads no vision code.
Legend: T prompt tokens, P patches, t/h/w a grid in merged tokens (time, height, width).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from executor.checkpoint.settings import PixelSettings
from executor.errors import UserError
from executor.prompt.chat import MediaPart, Piece
from executor.schedule.request import MediaItem, Span

DIGEST_BYTES = 16


@dataclass(frozen=True)
class MediaOptions:
    """What a recipe says about pictures and videos; None: what the checkpoint says."""

    min_pixels: int | None = None  # of a picture after the resize
    max_pixels: int | None = None
    video_max_pixels: int | None = None  # of all frames of a video together
    frame_max_pixels: int | None = None  # of one frame of a video
    fps: float | None = None  # frames sampled per second of video
    num_frames: int | None = None  # or so many from the whole video
    min_frames: int | None = None
    max_frames: int | None = None
    cap_pixels_per_frame: bool = False  # as the reference implementation does; transformers will make it the default
    video_timestamps: Literal["per_frame", "outer_pair"] = "per_frame"  # Qwen3-VL only
    limits: Any = None  # executor.media.media's limits; None: its defaults

    def with_overrides(self, part: MediaPart) -> "MediaOptions":
        """The options for one part of a message, which may carry its own."""
        given = dict(part.overrides)
        if part.kind == "video":
            if "fps" in given and "num_frames" in given:
                raise UserError(f"{part.where}: fps and num_frames exclude each other; give one of them")
            names = {"max_pixels": "frame_max_pixels", "total_pixels": "video_max_pixels"}
            given = {names.get(name, name): value for name, value in given.items()}
        return replace(self, **{name: value if name == "fps" else int(value) for name, value in given.items()})


@dataclass(frozen=True)
class Fill:
    """A run of placeholder tokens for embeddings `offset...` of media `media_index`."""

    media_index: int
    num_tokens: int
    token_id: int
    offset: int = 0


@dataclass(frozen=True)
class VisionTokens:
    """Special token ids around media, from config.json."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def read(cls, config: Mapping[str, Any], tokenizer: Any) -> "VisionTokens":
        """Raises UserError when config.json lacks one or the tokenizer does not know it as a special token."""
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = []
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            ids.append(config.get(name))
            if ids[-1] not in special:
                raise UserError(
                    f"config.json says {name}={ids[-1]}, which is no special token of this checkpoint's tokenizer; "
                    "config and tokenizer must come from the same checkpoint"
                )
        return cls(*ids)


def expand_media(
    pieces: Sequence[Piece],
    media: Sequence[MediaItem],
    tokens: VisionTokens,
    video_pieces: Callable[[int, MediaItem], list[Piece | Fill]],
    *,
    replace_video_pair: bool,
) -> list[Piece | Fill]:
    """Replace each placeholder by its run, in order of appearance.

    A picture is one `Fill`; a video is `video_pieces(index, item)`, which with `replace_video_pair` also takes the
    place of the start and end tokens around the placeholder. Placeholders must have been checked (`check_media`).
    """
    expanded: list[Piece | Fill] = []
    index = 0
    skip_end = False
    for position, piece in enumerate(pieces):
        if skip_end:
            skip_end = False
        elif piece == tokens.image:
            expanded.append(Fill(index, media[index].num_tokens, tokens.image))
            index += 1
        elif piece == tokens.video:
            after = pieces[position + 1] if position + 1 < len(pieces) else None
            if replace_video_pair and expanded and expanded[-1] == tokens.start and after == tokens.end:
                expanded.pop()
                skip_end = True
            expanded.extend(video_pieces(index, media[index]))
            index += 1
        else:
            expanded.append(piece)
    assert index == len(media)
    return expanded


def check_media(pieces: Iterable[Piece], parts: Sequence[MediaPart], tokens: VisionTokens) -> None:
    """Raise UserError unless the rendered text has a placeholder for every picture and video, in the same order."""
    kinds = {tokens.image: "image", tokens.video: "video"}
    placeholders = [kinds[piece] for piece in pieces if piece in kinds]
    given = [part.kind for part in parts]
    if placeholders == given:
        return
    if len(placeholders) == len(given):
        raise UserError(
            f"the prompt asks for {', '.join(placeholders)} in this order, but {', '.join(given)} are given"
        )
    advice = (
        "the chat template leaves some out (Qwen3-VL's takes none in system and assistant messages): "
        "put them into user messages"
        if len(placeholders) < len(given)
        else "give one picture or video for each placeholder"
    )
    raise UserError(
        f"{len(given)} pictures and videos are given, but the prompt has {len(placeholders)} placeholders; {advice}"
    )


def encode_pieces(tokenizer: Any, pieces: Sequence[Piece | Fill]) -> tuple[list[int], tuple[Span, ...]]:
    """Token ids and spans of expanded pieces.

    Neighbouring texts are joined before they are tokenized. The result equals tokenizing the whole text at once,
    because a tokenizer, too, first takes its special tokens out; but here a special token in a text is text.
    """
    runs: list[Piece | Fill] = []
    for piece in pieces:
        if isinstance(piece, str) and runs and isinstance(runs[-1], str):
            runs[-1] += piece
        else:
            runs.append(piece)
    texts = list(dict.fromkeys(run for run in runs if isinstance(run, str)))
    ids_of: dict[str, list[int]] = {}
    if texts:
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids_of = dict(zip(texts, encoded["input_ids"], strict=True))
    token_ids: list[int] = []
    spans = []
    for run in runs:
        if isinstance(run, str):
            token_ids += ids_of[run]
        elif isinstance(run, Fill):
            spans.append(Span(len(token_ids), run.num_tokens, run.media_index, run.offset))
            token_ids += [run.token_id] * run.num_tokens
        else:
            token_ids.append(run)
    return token_ids, tuple(spans)


def pieces_text(pieces: Sequence[Piece], tokenizer: Any) -> str:
    """The rendered text, media as single placeholders."""
    return "".join(piece if isinstance(piece, str) else tokenizer.convert_ids_to_tokens(piece) for piece in pieces)


def place_spans(
    num_tokens: int, spans: Sequence[Span], grids: Sequence[tuple[np.ndarray, int, int]]
) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, T] int64 and `position_delta` of a prompt of `num_tokens` with `spans`.

    grids[i] = (temporal positions [t], h, w) of span i, local to its start. Text advances all three rows alike; a
    span's height and width rows count from the position it starts at; whatever follows resumes at the span's
    greatest position + 1, in whichever row that is.
    """
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int64), (3, num_tokens)).copy()
    shift = 0  # of text: position - index
    done = 0
    for span, (times, h, w) in zip(spans, grids, strict=True):
        assert span.num_tokens == len(times) * h * w and span.start >= done
        positions[:, done : span.start] += shift
        base = span.start + shift
        done = span.start + span.num_tokens
        block = positions[:, span.start : done].reshape(3, len(times), h, w)
        block[0] = base + times[:, None, None]
        block[1] = base + np.arange(h)[:, None]
        block[2] = base + np.arange(w)
        positions[:, span.start : done] = block.reshape(3, -1)
        shift = base + max(int(times[-1]), h - 1, w - 1) + 1 - done
    positions[:, done:] += shift
    return positions, shift


def media_digest(
    kind: str, pixels: Any, grid_thw: tuple[int, int, int], settings: PixelSettings, seconds_per_grid: float = 0.0
) -> bytes:
    """Digest of all that the embeddings depend on: resized pixels (uint8 tensor), grid, kind, patches, mean and std.

    And of a video's `seconds_per_grid`, though embeddings do not know it: positions may follow from it, and the
    prefix cache takes equal tokens and digests for equal keys and values.
    """
    frame = (kind, tuple(pixels.shape), grid_thw, settings.patch_size, settings.temporal_patch_size)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(repr((*frame, settings.merge_size, settings.mean, settings.std, seconds_per_grid)).encode())
    digest.update(memoryview(pixels.contiguous().numpy()).cast("B"))
    return digest.digest()


def make_media_item(
    kind: Literal["image", "video"],
    pixels: Any,
    settings: PixelSettings,
    *,
    source: str = "",
    seconds_per_grid: float = 0.0,
    timestamps_s: tuple[float, ...] = (),
) -> MediaItem:
    """pixels: uint8 tensor [F, C, H, W], resized; a video's last frame is repeated to fill its temporal patch."""
    from executor.media.image import repeat_last

    steps = 1
    if kind == "video":
        pixels = repeat_last(pixels, settings.temporal_patch_size)
        steps = pixels.shape[0] // settings.temporal_patch_size
    grid_thw = (steps, pixels.shape[2] // settings.patch_size, pixels.shape[3] // settings.patch_size)
    return MediaItem(
        kind=kind,
        digest=media_digest(kind, pixels, grid_thw, settings, seconds_per_grid),
        pixels=pixels,
        grid_thw=grid_thw,
        num_tokens=math.prod(grid_thw) // settings.merge_size**2,
        source=source,
        seconds_per_grid=seconds_per_grid,
        timestamps_s=timestamps_s,
    )
