"""Media are encoded in bounded passes, and each item's features own their storage."""

import torch

from executor.checkpoint.settings import PixelSettings
from executor.engine.encode import encode_items, passes
from executor.media.patches import normalize_patchify
from executor.schedule.request import MediaItem

FORM = PixelSettings(14, 2, 2, (0.5, 0.4, 0.3), (0.3, 0.3, 0.2), 784, 784 * 100)


def item(grid: tuple[int, int, int], seed: int = 0) -> MediaItem:
    t, h, w = grid
    shape = 1 if t == 1 else 2 * t, 3, 14 * h, 14 * w
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.manual_seed(seed))
    return MediaItem("image" if t == 1 else "video", bytes([seed]), pixels, grid, t * h * w // 4)


def cut(media: list[MediaItem], most: int) -> list[list[tuple[int, int, int]]]:
    return [[(piece.number, piece.first, piece.count) for piece in batch] for batch in passes(media, most)]


def test_passes_are_bounded_and_only_what_is_too_long_is_cut():
    picture, video = item((1, 4, 4)), item((5, 4, 4))  # 4 tokens, and 5 frames of 4
    assert cut([picture] * 5, 8) == [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1), (3, 0, 1)], [(4, 0, 1)]]
    assert cut([picture, video, picture], 24) == [[(0, 0, 1), (1, 0, 5)], [(2, 0, 1)]]
    assert cut([picture, video], 20) == [[(0, 0, 1)], [(1, 0, 5)]]
    assert cut([picture, video, picture], 8) == [[(0, 0, 1)], [(1, 0, 2)], [(1, 2, 2)], [(1, 4, 1), (2, 0, 1)]]
    # A frame is never cut.
    assert cut([video, picture], 3) == [[(0, i, 1)] for i in range(5)] + [[(1, 0, 1)]]
    assert cut([], 8) == []


class Frames:
    """An encoder that looks at one frame at a time, as the real ones do."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def encode(self, patches: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor:
        counts = [h * w for t, h, w in grids for _ in range(t)]
        self.tokens.append(sum(counts) // 4)
        frames = [x.unflatten(0, (-1, 4)).mean(1) + x.mean() for x in patches.split(counts)]
        return torch.cat(frames)[:, None, :6].repeat(1, 3, 1)


def test_features_are_the_same_in_any_passes_and_own_their_storage():
    media = [item((1, 4, 8), 1), item((7, 4, 4), 2), *(item((1, 2, 2), seed) for seed in range(3, 15))]
    whole = [Frames().encode(normalize_patchify(x.pixels, FORM.mean, FORM.std, 14, 2, 2), [x.grid_thw]) for x in media]
    for most in (3, 8, 10_000):
        model = Frames()
        found = encode_items(model, media, FORM, torch.float32, torch.device("cpu"), most)
        assert max(model.tokens) <= max(most, 8)
        for x, features, expected in zip(media, found, whole, strict=True):
            assert torch.equal(features, expected) and features.shape == (x.num_tokens, 3, 6)
            assert features.untyped_storage().nbytes() <= 1.1 * features.nbytes
