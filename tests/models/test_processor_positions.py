"""M-RoPE positions equal transformers' `get_rope_index`, and where we follow the training, a token-by-token rule."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from executor.schedule.request import MediaItem, Span
from models.qwen2_5_vl import processor as qwen2_5
from models.qwen3_vl import processor as qwen3

MERGE = 2
TOKENS_PER_SECOND = 2
TEXT, IMAGE, VIDEO = 0, 1, 2


def picture(h, w):
    return MediaItem("image", b"", None, (1, h * MERGE, w * MERGE), h * w)


def video(t, h, w, seconds_per_grid=1.0):
    return MediaItem("video", b"", None, (t, h * MERGE, w * MERGE), t * h * w, seconds_per_grid=seconds_per_grid)


def lay_out(*parts, split_frames):
    """(token types, spans, media) of numbers of text tokens and media items one after another."""
    types, spans, media = [], [], []
    for part in parts:
        if isinstance(part, int):
            types += [TEXT] * part
            continue
        runs = part.grid_thw[0] if split_frames else 1
        size = part.num_tokens // runs
        for run in range(runs):
            if run:
                types += [TEXT] * 5  # the time stamp and the marks between two frames
            spans.append(Span(len(types), size, len(media), run * size))
            types += [IMAGE if part.kind == "image" else VIDEO] * size
        media.append(part)
    return types, spans, media


def bare(model_class, config):
    """The model without its weights: `get_rope_index` reads nothing but the config."""
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = config
    return model


@pytest.fixture(scope="module")
def reference_2_5():
    config = Qwen2_5_VLConfig(vision_config={"spatial_merge_size": MERGE, "tokens_per_second": TOKENS_PER_SECOND})
    return bare(Qwen2_5_VLModel, config)


@pytest.fixture(scope="module")
def reference_3():
    return bare(Qwen3VLModel, Qwen3VLConfig(vision_config={"spatial_merge_size": MERGE}))


def rope_index(model, types, media, **more):
    def grids(kind):
        found = [item.grid_thw for item in media if item.kind == kind]
        return torch.tensor(found) if found else None

    positions, delta = model.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=grids("image"),
        video_grid_thw=grids("video"),
        **more,
    )
    return positions[:, 0].numpy(), int(delta)


def rope_index_2_5(model, types, media):
    seconds = [item.seconds_per_grid for item in media if item.kind == "video"]
    return rope_index(model, types, media, second_per_grid_ts=torch.tensor(seconds) if seconds else None)


def ours_2_5(types, spans, media):
    return qwen2_5.mrope_positions(len(types), spans, media, merge_size=MERGE, tokens_per_second=TOKENS_PER_SECOND)


def ours_3(types, spans, media):
    return qwen3.mrope_positions(len(types), spans, media, merge_size=MERGE)


def assert_same(got, wanted):
    assert got[0].dtype == np.int64
    np.testing.assert_array_equal(got[0], wanted[0])
    assert got[1] == wanted[1]


PICTURES = [
    (7,),
    (3, picture(1, 1), 4),
    (15, picture(4, 6), 9),
    (picture(9, 2),),
    (2, picture(3, 5), 2, picture(5, 3), 1, picture(1, 8)),
    (2, picture(3, 5), picture(2, 2), 6),  # side by side
]


@pytest.mark.parametrize("parts", PICTURES)
def test_pictures_and_text(parts, reference_2_5, reference_3):
    parts_with_marks = [part for pair in itertools.zip_longest(parts, [1] * len(parts)) for part in pair]
    layout = lay_out(*parts_with_marks, split_frames=False)
    assert_same(ours_2_5(*layout), rope_index_2_5(reference_2_5, layout[0], layout[2]))
    assert_same(ours_3(*layout), rope_index(reference_3, layout[0], layout[2]))


@pytest.mark.parametrize("seconds_per_grid", [0.25, 0.4, 1.0, 2 / 1.9980019980019983, 2 / 29.97])
@pytest.mark.parametrize(("t", "h", "w"), [(1, 2, 2), (2, 4, 6), (3, 9, 8), (4, 12, 3)])
def test_short_videos_of_qwen2_5(t, h, w, seconds_per_grid, reference_2_5):
    clip = video(t, h, w, seconds_per_grid)
    if int((t - 1) * TOKENS_PER_SECOND * seconds_per_grid) >= max(h, w):
        pytest.skip("longer than its frames are large: see test_text_resumes_after_a_long_video")
    layout = lay_out(5, clip, 3, picture(2, 3), 4, clip, 6, split_frames=False)
    assert_same(ours_2_5(*layout), rope_index_2_5(reference_2_5, layout[0], layout[2]))


def test_temporal_positions_of_qwen2_5_equal_for_any_length(reference_2_5):
    for seconds_per_grid in (0.1, 1 / 3, 0.7, 1.0, 2 / 1.7, 20.02):
        types, spans, media = layout = lay_out(4, video(300, 1, 2, seconds_per_grid), split_frames=False)
        wanted, _ = rope_index_2_5(reference_2_5, types, media)
        np.testing.assert_array_equal(ours_2_5(*layout)[0], wanted)


def by_hand_2_5(types, spans, media):
    """Token by token, with the rule of training: whatever follows a span resumes at its greatest position + 1."""
    starts = {span.start: span for span in spans}
    columns, index, following = [], 0, 0
    while index < len(types):
        span = starts.get(index)
        if span is None:
            columns.append((following,) * 3)
        else:
            item = media[span.media_index]
            t, h, w = (side // merge for side, merge in zip(item.grid_thw, (1, MERGE, MERGE), strict=True))
            interval = np.float32(TOKENS_PER_SECOND) * np.float32(item.seconds_per_grid)
            for frame, row, column in itertools.product(range(t), range(h), range(w)):
                time = int(np.float32(frame) * interval)
                columns.append((following + time, following + row, following + column))
        index = len(columns)
        following = max(max(column) for column in columns) + 1
    return np.array(columns).T, following - len(types)


def test_text_resumes_after_a_long_video(reference_2_5):
    """Here we follow the training, not transformers 5.23, whose text would overlap the video in time."""
    layout = lay_out(5, video(20, 3, 4, 1.0), 7, picture(4, 4), 2, video(3, 2, 2, 10.0), 1, split_frames=False)
    types, spans, media = layout
    positions, delta = ours_2_5(*layout)
    assert_same((positions, delta), by_hand_2_5(*layout))
    after = spans[0].start + spans[0].num_tokens
    assert (positions[:, after] == positions[:, :after].max() + 1).all()
    overlapping, _ = rope_index_2_5(reference_2_5, types, media)
    np.testing.assert_array_equal(positions[:, :after], overlapping[:, :after])
    assert overlapping[0, after] < overlapping[0, after - 1]  # what 5.23 does; when this fails, join the tests again


def test_random_layouts_of_qwen2_5():
    choose = random.Random(0)
    for _ in range(50):
        parts = []
        for _ in range(choose.randint(1, 6)):
            parts.append(choose.randint(1, 20))
            size = [choose.randint(1, 6) for _ in range(3)]
            parts.append(picture(*size[1:]) if choose.random() < 0.5 else video(*size, choose.choice([0.1, 1.0, 3.7])))
        layout = lay_out(*parts, split_frames=False)
        assert_same(ours_2_5(*layout), by_hand_2_5(*layout))


def test_random_layouts_of_qwen3(reference_3):
    choose = random.Random(1)
    for _ in range(50):
        parts = []
        for _ in range(choose.randint(1, 6)):
            parts.append(choose.randint(1, 20))
            size = [choose.randint(1, 6) for _ in range(3)]
            parts.append(picture(*size[1:]) if choose.random() < 0.5 else video(*size))
        layout = lay_out(*parts, choose.randint(0, 9), split_frames=True)
        assert_same(ours_3(*layout), rope_index(reference_3, layout[0], layout[2]))


def test_the_next_token_follows_the_greatest_position():
    types, spans, media = layout = lay_out(4, video(9, 2, 2, 5.0), split_frames=False)
    positions, delta = ours_2_5(*layout)
    assert len(types) + delta == positions.max() + 1


def test_a_prompt_of_a_million_tokens_is_quick_to_place():
    layout = lay_out(300_000, video(384, 22, 40, 1.0), 300_000, split_frames=False)
    positions, _ = ours_2_5(*layout)
    assert positions.shape == (3, 600_000 + 384 * 22 * 40)
