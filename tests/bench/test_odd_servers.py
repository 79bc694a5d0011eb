"""Servers, addresses and files that are not as they should be: told in words, never a traceback, never NaN."""

import pytest

from executor.bench.client import Endpoint
from executor.bench.load import arrival_times_s
from executor.bench.server_figures import parse
from executor.bench.stream import ChatStream
from executor.errors import UserError, shortened


def streamed(*events: bytes) -> ChatStream:
    stream = ChatStream()
    stream.feed(b"".join(b"data: " + event + b"\n\n" for event in events), 1.0)
    return stream


END = b'{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}'


@pytest.mark.parametrize("count", [b'"3"', b"NaN", b"-1", b"2.5", b"true", b"1e999"])
def test_counts_that_are_none(count):
    stream = streamed(END, b'{"usage": {"prompt_tokens": 1, "completion_tokens": ' + count + b"}}")
    assert "no chunk of a chat" in stream.fault() and not stream.has_usage


def test_a_last_line_without_its_end():
    stream = streamed(END)
    stream.feed(b'data: {"usage": {"prompt_tokens": 3, "completion_tokens": 9}}', 2.0)
    assert stream.fault() is None and (stream.prompt_tokens, stream.output_tokens) == (3, 9)


def test_what_is_no_stream_is_shown():
    stream = ChatStream()
    stream.feed(b"<html>hi</html>", 1.0)
    assert stream.fault() == "the answer is no stream of events: <html>hi</html>"


def test_words_of_others_are_one_line_that_no_terminal_obeys():
    assert streamed(b'{"error": "a\\u001b[31m\\nb"}').fault() == "in the stream: a\\x1b[31m b"
    assert len(shortened("x" * 10_000)) < 500
    assert "no chunk" in streamed(b"[" * 200_000).fault()


@pytest.mark.parametrize(
    "url", ["http://a..b:80", f"http://{'a' * 70}.com", "http://h:0", "http://h/a b", "http://h/ä"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="base_url"):
        Endpoint.at(url)


def test_the_address_of_chats_is_that_of_the_server():
    assert Endpoint.at("http://h:1/a/v1/chat/completions").path == "/a"


@pytest.mark.parametrize("burstiness", [1e-300, 1e-3, 1e300])
@pytest.mark.parametrize("rate", [1e-3, 1e6, 1e308])
def test_arrivals_of_extremes_are_times(rate, burstiness):
    for seed in range(20):
        times_s = arrival_times_s(3, rate, burstiness, seed)
        assert sorted(times_s) == times_s and times_s[-1] == pytest.approx(3 / rate)


def test_metrics_that_are_no_numbers_are_left_out():
    assert parse("a NaN\nb +Inf\nc 1\n") == {"c": 1.0}
