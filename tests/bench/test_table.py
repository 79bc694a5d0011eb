"""The table has the form of `vllm bench serve`, character by character."""

from executor.bench.results import Load, Point, RequestResult, Run
from executor.bench.table import load_table

# As vLLM's usage guide for Qwen2.5-VL prints it (docs.vllm.ai, recipes).
PUBLISHED = """\
============ Serving Benchmark Result ============
Successful requests:                     16
Benchmark duration (s):                  68.85
Total input tokens:                      127945
Total generated tokens:                  16000
Request throughput (req/s):              0.23
Output token throughput (tok/s):         232.40
Total Token throughput (tok/s):          2090.83
---------------Time to First Token----------------
Mean TTFT (ms):                          13912.67
Median TTFT (ms):                        13939.98
P99 TTFT (ms):                           26067.96
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          53.91
Median TPOT (ms):                        53.93
P99 TPOT (ms):                           64.82
---------------Inter-token Latency----------------
Mean ITL (ms):                           53.91
Median ITL (ms):                         42.84
P99 ITL (ms):                            431.25
=================================================="""


def published_like_run():
    """16 requests with the tokens and the duration of the published table."""
    tokens = [7997] * 15 + [7990]
    requests = tuple(
        RequestResult(0.0, 60.0, tuple(10 + 0.05 * i for i in range(1000)), tokens[number], 0, 1000)
        for number in range(16)
    )
    return Run(68.85, requests)


def test_the_form_is_the_published_one():
    """Labels, rules, columns and digits; and those figures that counts and duration alone decide."""
    ours = load_table(Point(Load(), (published_like_run(),))).splitlines()
    published = PUBLISHED.splitlines()
    assert ours[:6] == published[:6]
    assert abs(float(ours[6][41:]) - 232.40) < 0.02 and abs(float(ours[7][41:]) - 2090.83) < 0.2
    assert [text[:41] if ":" in text else text for text in ours] == [
        text[:41] if ":" in text else text for text in published
    ]
    assert all(len(text[41:].split(".")[1]) == 2 for text in ours[5:] if ":" in text)


def test_failures_and_missing_figures_are_shown():
    runs = (Run(2.0, (RequestResult(0.0, 1.0, (1.0,), 5, 0, 1), RequestResult(0.0, 1.0, error="no"))),)
    lines = load_table(Point(Load(), runs)).splitlines()
    assert lines[1:3] == [
        "Successful requests:                     1",
        "Failed requests:                         1",
    ]
    assert "Mean TPOT (ms):                          -" in lines
