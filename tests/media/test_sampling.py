"""What the rules of sampling do where transformers gives no answer, and frames by time (equality: test_processors)."""

import numpy as np
import pytest

from executor.errors import UserError
from executor.media.sampling import Sampling, frame_size_of_all, frame_size_per_frame, spread, strided
from executor.media.timeline import Timeline


def test_indices_stay_inside_and_ascend() -> None:
    for rule in (spread, strided):
        for total in range(1, 300):
            for rate in (0.2, 24.0, 60.0):
                indices = Sampling(rule, min_frames=4, max_frames=64).indices(total, rate)
                assert 1 <= len(indices) <= min(64, total)
                assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < total
                assert rule is spread or total == 1 or len(indices) % 2 == 0


def test_the_index_past_the_end_is_left_out() -> None:
    assert len(Sampling(strided, num_frames=14).indices(17, 10.0)) == 14  # transformers: 15, the last one 17


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"fps": 0}, "above 0"), ({"num_frames": 0}, "above 0"), ({"min_frames": 9, "max_frames": 8}, "min_frames 9")],
)
def test_settings_that_cannot_be(settings: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Sampling(spread, **settings)


@pytest.mark.parametrize("size_rule", [frame_size_per_frame, frame_size_of_all])
def test_one_frame_counts_as_two(size_rule) -> None:
    for cap in (None, 768):
        settings = {"factor": 32, "min_pixels": 4096, "max_pixels": 100000, "max_video_tokens": cap}
        assert size_rule(1, 480, 640, **settings) == size_rule(2, 480, 640, **settings)
    with pytest.raises(UserError, match="2010x10 pixels: one side is 201.0 times"):
        size_rule(2, 10, 2010, factor=32, min_pixels=4096, max_pixels=100000)


def test_a_rate_is_believed_where_the_times_agree() -> None:
    rate = 30000 / 1001
    rounded = np.round(np.arange(1000) / rate, 3)
    timeline = Timeline(rounded, 0.033, rate)
    assert timeline.frame_rate == rate and timeline.frames_at([0, 7, 999]) == [0, 7, 999]
    wrong = Timeline(rounded, 0.033, 60.0)  # a header may say anything
    assert wrong.frame_rate == pytest.approx(rate, rel=1e-4) and wrong.frames_at([0, 7, 999]) == [0, 7, 999]


def test_variable_times_give_the_frame_on_the_screen() -> None:
    timeline = Timeline(np.array([0.0, 0.1, 0.2, 9.0]), 1.0, 10.0)
    assert timeline.duration_s == 10.0 and timeline.frame_rate == 0.4 and not timeline.is_constant
    assert timeline.frames_at([0, 1, 2, 3]) == [0, 2, 2, 2]  # at 0, 2.5, 5 and 7.5 seconds


def test_durations() -> None:
    assert Timeline(np.array([0.0]), 0.0, None).duration_s == 1.0
    assert Timeline(np.array([0.0]), 0.0, 25.0).duration_s == 1 / 25
    assert Timeline(np.array([0.0, 0.5, 1.0]), 0.0, None).duration_s == 1.5


@pytest.mark.parametrize(
    "start_s, end_s, first, num_frames",
    [
        (None, None, 0, 100),
        (1.05, 5, 11, 40),  # ceil(10.5) to floor(50)
        (1.05, 4.99, 11, 39),
        (None, 99, 0, 100),  # cut to the video
        (9.7, None, 97, 3),
        (0, 0.1, 0, 2),
    ],
)
def test_a_stretch_of_a_video_is_the_official_tools_one(start_s, end_s, first, num_frames) -> None:
    """qwen_vl_utils 0.0.14, calculate_video_frame_range, of 100 frames at 10 a second."""
    sampling = Sampling(rule=spread, start_s=start_s, end_s=end_s)
    assert sampling.window(100, 10.0) == (first, num_frames)
    chosen = sampling.indices(100, 10.0)
    assert first == chosen[0] and chosen[-1] == first + num_frames - 1
    assert chosen == [first + index for index in Sampling(rule=spread).indices(num_frames, 10.0)]


def test_a_stretch_of_one_frame_is_refused() -> None:
    for start_s, end_s in ((9.95, None), (3600, None), (5.01, 5.09)):
        with pytest.raises(UserError, match="fewer than two frames; the video has 100 in 10.00 seconds"):
            Sampling(rule=strided, start_s=start_s, end_s=end_s).indices(100, 10.0)
