"""Results for people: the table of `vllm bench serve`, line by line, and beside it what that one does not say.

Figures are medians over the repetitions; lines without data hold "-".
"""

from collections.abc import Mapping

from executor.bench.results import Point
from executor.bench.statistics import Figure, figures

WIDTH = 50
LABEL_WIDTH = 40
SECTIONS = (  # heading, figure, word
    ("Time to First Token", "ttft_ms", "TTFT"),
    ("Time per Output Token (excl. 1st token)", "tpot_ms", "TPOT"),
    ("Inter-token Latency", "itl_ms", "ITL"),
)


def load_table(point: Point) -> str:
    """The table of `vllm bench serve` for one load. A line of failed requests stands in it only if there are any."""
    found = figures(point.runs)
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", line("Successful requests:", _completed(found))]
    if found["failed"].median:
        lines.append(line("Failed requests:", f"{found['failed'].median:.0f}"))
    lines += [
        line("Benchmark duration (s):", number(found, "duration_s")),
        line("Total input tokens:", number(found, "input_tokens", 0)),
        line("Total generated tokens:", number(found, "output_tokens", 0)),
        line("Request throughput (req/s):", number(found, "request_per_s")),
        line("Output token throughput (tok/s):", number(found, "output_tokens_per_s")),
        line("Total Token throughput (tok/s):", number(found, "total_tokens_per_s")),
    ]
    for heading, name, word in SECTIONS:
        lines += latency_lines(found, heading, name, word)
    return "\n".join([*lines, "=" * WIDTH])


def latency_lines(found: Mapping[str, Figure], heading: str, name: str, word: str) -> list[str]:
    """A heading and the three lines below it."""
    parts = (("Mean", "mean"), ("Median", "median"), ("P99", "p99"))
    rows = [line(f"{label} {word} (ms):", number(found, f"{name}.{part}")) for label, part in parts]
    return [f"{heading:-^{WIDTH}}", *rows]


def line(label: str, value: str) -> str:
    return f"{label:<{LABEL_WIDTH}} {value}"


def number(found: Mapping[str, Figure], name: str, digits: int = 2) -> str:
    return f"{found[name].median:.{digits}f}" if name in found else "-"


def _completed(found: Mapping[str, Figure]) -> str:
    return f"{found['requests'].median - found['failed'].median:.0f}"
