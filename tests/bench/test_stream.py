"""From the events of a stream to times and counts; exactly, because the times are handed in."""

import json

import pytest

from executor.bench.client import Reply
from executor.bench.load import results_of
from executor.bench.results import Run
from executor.bench.statistics import summarize, tpot_s
from executor.bench.stream import ChatStream


def event(delta: dict | None = None, finish: str | None = None, **more) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n".encode()


USAGE = event(usage={"prompt_tokens": 11, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}})
DONE = b"data: [DONE]\n\n"


def fed(*events: tuple[float, bytes]) -> ChatStream:
    stream = ChatStream()
    for now_s, data in events:
        stream.feed(data, now_s)
    return stream


def test_times_and_counts_of_a_stream():
    stream = fed(
        (1.0, event({"role": "assistant", "content": ""})),  # the role alone: no token yet
        (1.5, event({"content": "a"})),
        (1.75, event({"content": "b"})),
        (1.75, event({"content": ""})),  # a token whose letters are not whole yet
        (2.5, event({"content": "c"}, "length")),
        (2.6, USAGE),
        (2.7, DONE),
    )
    assert stream.fault() is None
    assert stream.piece_times_s == [1.5, 1.75, 1.75, 2.5]
    assert stream.ended_s == 2.5  # as vLLM's client: usage and [DONE] are not waited for
    assert (stream.prompt_tokens, stream.output_tokens, stream.cached_tokens) == (11, 4, 3)


def test_the_figures_are_those_of_vllm():
    """TTFT, TPOT and ITL of one request, by hand: pieces at 0.5, 0.75, 0.75 and 1.5 s, four tokens."""
    reply = Reply(1.0, 2.5, (1.5, 1.75, 1.75, 2.5), 11, 4, 3, True)
    (request,) = results_of([reply], begun_s=0.25)
    assert (request.sent_s, request.ended_s) == (0.75, 2.25)
    assert request.ttft_s == 0.5
    assert tpot_s(request) == pytest.approx(1.0 / 3)
    summary = summarize(Run(duration_s=2.0, requests=(request,)))
    assert summary.itl_ms.mean == pytest.approx(1000 * (0.25 + 0.0 + 0.75) / 3)
    assert summary.output_tokens_per_s == 2.0 and summary.total_tokens_per_s == 7.5


def test_several_tokens_in_a_piece_are_counted_by_usage():
    stream = fed((1.0, event({"content": "one two"})), (2.0, event({"content": " three"}, "stop")), (2.0, USAGE))
    assert len(stream.piece_times_s) == 2 and stream.output_tokens == 4


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_events_may_be_cut_anywhere(size, line_end):
    data = b": a comment\n\n" + event({"content": "é"}) + event({"content": "b"}, "stop") + USAGE + DONE
    data = data.replace(b"\n", line_end)
    stream = ChatStream()
    for start in range(0, len(data), size):
        stream.feed(data[start : start + size], float(start))
    assert stream.fault() is None and len(stream.piece_times_s) == 2 and stream.output_tokens == 4


@pytest.mark.parametrize(
    "delta", [{"content": "a"}, {"reasoning_content": "a"}, {"reasoning": "a"}, {"tool_calls": [{"index": 0}]}]
)
def test_what_is_a_piece(delta):
    assert fed((1.0, event(delta, "stop"))).piece_times_s == [1.0]


def test_an_end_without_text_is_no_piece_but_the_end():
    stream = fed((1.0, event({"content": "a"})), (3.0, event({}, "stop")), (3.0, DONE))
    assert stream.piece_times_s == [1.0] and stream.ended_s == 3.0
    assert fed((3.0, event({}, "stop"))).piece_times_s == [3.0]  # an answer of an end token alone


@pytest.mark.parametrize(
    "events, words",
    [
        ((), "the stream ended before the answer did"),
        ((event({"content": "a"}),), "the stream ended before the answer did"),
        ((DONE,), "the answer has nothing in it"),
        ((b'data: {"error": {"message": "no room"}}\n\n', DONE), "in the stream: no room"),
        ((b'data: {"error": "no room"}\n\n', DONE), "in the stream: no room"),
        ((b"data: [1]\n\n",), r"an event that is no chunk of a chat: \[1\]"),
        ((b'data: {"choices": [1]}\n\n',), "an event that is no chunk of a chat"),
        ((b"data: {broken\n\n",), "an event that is no chunk of a chat: {broken"),
    ],
)
def test_what_is_no_whole_answer(events, words):
    stream = fed(*((1.0, data) for data in events))
    assert stream.fault() is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(stream.fault())
