"""Pictures and videos through the vision encoder, a bounded number of visual tokens at a time.

Attention never crosses frames, so a video is encoded in runs of frames where it is long: what a pass needs is bounded
by ENCODE_TOKENS, or by a single frame where that is larger, however many media one step brings. The estimate of
memory counts on it.
Each item's features have storage of their own: one that is kept keeps no other alive.
Legend: M visual tokens of an item, P patches of a pass, n hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from executor.checkpoint.settings import PixelSettings
from executor.media.patches import normalize_patchify
from executor.schedule.request import MediaItem

SLAB_PATCHES = 2048  # normalised at a time


@dataclass(frozen=True)
class Piece:
    """Frames of one item: `count` temporal patches from `first` on; all of a picture."""

    number: int  # which item of the step
    item: MediaItem
    first: int
    count: int

    @property
    def frame_tokens(self) -> int:
        return self.item.num_tokens // self.item.grid_thw[0]

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.count, *self.item.grid_thw[1:])

    @property
    def tokens(self) -> slice:
        """Of the item's."""
        return slice(self.first * self.frame_tokens, (self.first + self.count) * self.frame_tokens)

    def frames(self, temporal_patch_size: int) -> Tensor:
        start = self.first * temporal_patch_size
        return self.item.pixels[start : start + self.count * temporal_patch_size]


def passes(media: Sequence[MediaItem], most_tokens: int) -> Iterator[list[Piece]]:
    """The media in order, cut into passes of at most `most_tokens` visual tokens, or of one frame that has more.

    Only an item that is too long for a pass of its own is cut.
    """
    batch: list[Piece] = []
    room = most_tokens
    for number, item in enumerate(media):
        frames = item.grid_thw[0]
        per_pass = frames
        if item.num_tokens > most_tokens:
            per_pass = max(1, most_tokens * frames // item.num_tokens)
        for first in range(0, frames, per_pass):
            piece = Piece(number, item, first, min(per_pass, frames - first))
            num_tokens = piece.count * piece.frame_tokens
            if batch and num_tokens > room:
                yield batch
                batch, room = [], most_tokens
            batch.append(piece)
            room -= num_tokens
    if batch:
        yield batch


def encode_items(
    model: Any, media: Sequence[MediaItem], form: PixelSettings, dtype: torch.dtype, device: torch.device,
    most_tokens: int,
) -> list[Tensor]:  # fmt: skip
    """`[M, 1 + taps, n]` of every item, each with storage of its own.

    `model.encode` takes packed patches `[P, C*tp*p*p]` and their grids, and gives the visual tokens in their order.
    """
    features: list[Tensor | None] = [None] * len(media)
    for batch in passes(media, most_tokens):
        encoded = model.encode(patches_of(batch, form, dtype, device), [piece.grid for piece in batch])
        start = 0
        for piece in batch:
            if features[piece.number] is None:
                features[piece.number] = encoded.new_empty(piece.item.num_tokens, *encoded.shape[1:])
            stop = start + piece.count * piece.frame_tokens
            features[piece.number][piece.tokens] = encoded[start:stop]
            start = stop
        assert start == len(encoded), f"{len(encoded)} embeddings for {start} visual tokens"
    return features


def patches_of(batch: Sequence[Piece], form: PixelSettings, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalised patches `[P, C*tp*p*p]` of all pieces, one after another. Float32 stands beside it for a slab only."""
    counts = [t * h * w for t, h, w in (piece.grid for piece in batch)]
    width = batch[0].item.pixels.shape[1] * form.temporal_patch_size * form.patch_size**2
    patches = torch.empty(sum(counts), width, dtype=dtype, device=device)
    for piece, part in zip(batch, patches.split(counts), strict=True):
        pixels = piece.frames(form.temporal_patch_size).to(device)
        _, rows, columns = piece.grid
        # Patches run over time, then over rows of merge windows: slabs of whole rows follow each other.
        slab = max(1, SLAB_PATCHES // (columns * form.merge_size)) * form.merge_size
        frames = pixels.split(form.temporal_patch_size)
        for frame, into in zip(frames, part.split(rows * columns), strict=True):
            slabs = frame.split(slab * form.patch_size, dim=-2)
            for pixel_rows, target in zip(slabs, into.split(slab * columns), strict=True):
                normalize_patchify(
                    pixel_rows,
                    form.mean,
                    form.std,
                    form.patch_size,
                    form.temporal_patch_size,
                    form.merge_size,
                    dtype,
                    out=target,
                )
    return patches
