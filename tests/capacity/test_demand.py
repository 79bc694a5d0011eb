"""What is understood of a demand in words, and what is refused."""

import pytest

from executor.capacity.demand import UNDERSTOOD, Demand, parse_demand
from executor.errors import UserError

MODELS, CHIPS = ("Qwen3-VL-8B-Instruct", "Qwen2.5-VL-7B-Instruct"), ("910b4", "310p3")


def parsed(text: str) -> Demand:
    return parse_demand(text, MODELS, CHIPS)


def test_the_demand_of_the_documents():
    wanted = Demand(users=32, pictures=4, picture_size=(1920, 1080), text_tokens=8192, tpot_ms=50.0)
    assert parsed("32 users, 4 pictures of 1080p, 8k context, TPOT 50 ms") == wanted
    assert parsed("TPOT 50 ms and 8k context; 4 images of 1920x1080, 32 concurrent requests") == wanted


@pytest.mark.parametrize(
    "phrase, said",
    [
        ("1,000 users", {"users": 1000}),
        ("1 user", {"users": 1}),
        ("a picture", {"pictures": 1}),
        ("no pictures", {"pictures": 0}),
        ("2 pictures of 4k each", {"pictures": 2, "picture_size": (3840, 2160)}),
        ("two 1080p pictures", {"pictures": 2, "picture_size": (1920, 1080)}),
        ("2 640x480 images each", {"pictures": 2, "picture_size": (640, 480)}),
        ("one user", {"users": 1}),
        ("40 ms TPOT", {"tpot_ms": 40.0}),
        ("2 s TTFT", {"ttft_ms": 2000.0}),
        ("3 images at 640 x 480 px", {"pictures": 3, "picture_size": (640, 480)}),
        ("context of 8,000", {"text_tokens": 8000}),
        ("1.5k tokens of text", {"text_tokens": 1536}),
        ("10k in all", {"total_tokens": 10240}),
        ("500 output tokens", {"output_tokens": 500}),
        ("answers of 64 tokens", {"output_tokens": 64}),
        ("TPOT < 0.05 s", {"tpot_ms": 50.0}),
        ("ttft of 2 s", {"ttft_ms": 2000.0}),
        ("1,500 tokens/s", {"tokens_per_s": 1500.0}),
        ("at most 16 dies", {"most_dies": 16}),
        ("W8A8_dynamic", {"quantization": "w8a8_dynamic"}),
        ("bf16", {"quantization": "none", "float_type": "bfloat16"}),
        ("50 ms TPOT", {"tpot_ms": 50.0}),
        ("TPOT 500 us", {"tpot_ms": 0.5}),
        ("TTFT 2 seconds", {"ttft_ms": 2000.0}),
        ("Qwen/Qwen3-VL-8B-Instruct", {"model": "Qwen3-VL-8B-Instruct"}),
        ("qwen2.5-vl-7b", {"model": "Qwen2.5-VL-7B-Instruct"}),
        ("on 310P3", {"chip": "310p3"}),
        ("Atlas 300I DUO", {"soc": "atlas_300i_duo"}),
        ("atlas_800i_a2", {"soc": "atlas_800i_a2"}),
    ],
)
def test_a_phrase_says_one_thing(phrase, said):
    assert parsed(phrase) == Demand(**said)


@pytest.mark.parametrize("phrase", ["32 usrs", "8k", "TPOT 50", "TPOT fast", "as fast as possible", "Qwen9"])
def test_what_is_not_understood_is_named_with_what_is(phrase):
    with pytest.raises(UserError, match="is not understood") as refused:
        parsed(f"2 users, {phrase}")
    assert f"'{phrase}'" in str(refused.value) and all(example in str(refused.value) for example in UNDERSTOOD)


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "it says nothing"),
        ("5 users, 6 users", "another users than 5"),
        ("0 users", "allowed 1 and more"),
        ("TPOT 0 ms", "allowed above 0"),
        ("0x480 pictures", "not understood"),
        ("4 pictures of 9p", "720p"),
        ("8k context, 10k in all", "not both"),
    ],
)
def test_a_demand_that_contradicts_itself_is_refused(text, part):
    with pytest.raises(UserError, match="plan_config.demand") as refused:
        parsed(text)
    assert part in str(refused.value)


def test_the_examples_are_understood():
    for example in UNDERSTOOD[:9]:
        assert parsed(example.split(" (")[0]) != Demand()


def test_phrases_stand_between_any_commas():
    wanted = Demand(users=32, output_tokens=100, tpot_ms=50.0)
    assert (
        parsed("32 users,100 output tokens,TPOT 50 ms") == parsed("32 users，100 output tokens、TPOT 50 ms") == wanted
    )


def test_a_time_without_its_unit_and_no_throughput_are_refused():
    with pytest.raises(UserError, match="as in TPOT 50 ms"):
        parsed("TPOT 50")
    with pytest.raises(UserError, match="0 tokens/s, allowed above 0"):
        parsed("0 tokens/s")
