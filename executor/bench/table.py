"""Results for people: the table of `vllm bench serve`, line by line, and beside it what that one does not say.

Figures are medians over the repetitions; lines without data hold "-".
"""

from collections.abc import Mapping, Sequence

from executor.bench.results import Floor, Point, Startup
from executor.bench.statistics import Figure, figures

WIDTH = 50
GIB, GB, GFLOP = 2**30, 1e9, 1e9
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
    if found["failed"].most:
        lines.append(line("Failed requests:", f"{found['failed'].most:.0f}"))
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
    return f"{found['requests'].median - found['failed'].most:.0f}"


def beside_table(point: Point) -> str:
    """What `vllm bench serve` does not print, in its form: whole answers, stages, the model alone, the floor, memory,
    drafts, spread. Parts without data are left out."""
    found = figures(point.runs)
    lines = [
        f"{' Beside it ':=^{WIDTH}}",
        line("Vision tokens among the input:", number(found, "vision_tokens", 0)),
        line("Input tokens found in the cache:", number(found, "cached_tokens", 0)),
        *latency_lines(found, "End-to-end Latency", "e2e_ms", "E2EL"),
    ]
    lines += _stage_lines(found)
    if "model_tpot_ms" in found:
        lines += [
            f"{'Time per Output Token, side by side':-^{WIDTH}}",
            line("Model-only TPOT (ms):", number(found, "model_tpot_ms")),
            line("End-to-end TPOT, mean (ms):", number(found, "tpot_ms.mean")),
        ]
    if point.floor is not None:
        lines += _floor_lines(found, point.floor)
    if "peak_memory_bytes" in found:
        peak = found["peak_memory_bytes"].most / GIB
        lines += [f"{'Memory':-^{WIDTH}}", line("Peak memory (GiB):", f"{peak:.2f}")]
    lines += _section(found, "Speculative Decoding", DRAFTING)
    lines += _section(found, "Server and Client", BESIDE)
    return "\n".join([*lines, *_spread_lines(found, len(point.runs)), "=" * WIDTH])


def startup_table(startup: Startup) -> str:
    """From the start of the process on; empty where nothing is known."""
    lines = []
    if startup.weights_s is not None:
        lines.append(line("Process start to weights in (s):", f"{startup.weights_s:.2f}"))
    if startup.first_token_s is not None:
        lines.append(line("Process start to first token (s):", f"{startup.first_token_s:.2f}"))
    return "\n".join([f"{' Start-up ':=^{WIDTH}}", *lines, "=" * WIDTH]) if lines else ""


OVERVIEW = (  # heading, figure, digits
    ("req/s", "request_per_s", 2),
    ("out tok/s", "output_tokens_per_s", 1),
    ("total tok/s", "total_tokens_per_s", 1),
    ("TTFT ms", "ttft_ms.mean", 1),
    ("P99 TTFT", "ttft_ms.p99", 1),
    ("TPOT ms", "tpot_ms.mean", 2),
    ("P99 ITL", "itl_ms.p99", 1),
    ("x floor", "measured_over_floor", 2),
)


def overview_table(points: Sequence[Point]) -> str:
    """A line for each load."""
    rows = [["load", *(heading for heading, _, _ in OVERVIEW), "failed"]]
    for point in points:
        found = figures(point.runs)
        cells = [number(found, name, digits) for _, name, digits in OVERVIEW]
        rows.append([point.load.words, *cells, f"{found['failed'].most:.0f}"])
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *others]))
    return "\n".join(lines)


def _stage_lines(found: Mapping[str, Figure]) -> list[str]:
    stages = {name.partition(".")[2]: found[name].median for name in found if name.startswith("stage_s.")}
    if not stages:
        return []
    duration_s = found["duration_s"].median
    names = {"media": "media, meanwhile"}
    rows = [
        line(f"{names.get(name, name)} (s, % of duration):", f"{s:.2f}  {100 * s / duration_s:.0f} %")
        for name, s in stages.items()
    ]
    return [f"{'Stages':-^{WIDTH}}", *rows]


def _floor_lines(found: Mapping[str, Figure], floor: Floor) -> list[str]:
    lines = [
        f"{'Against the Floor':-^{WIDTH}}",
        line(f"Memory ({floor.origin}, GB/s):", f"{floor.bytes_per_s / GB:.1f}"),
        line(f"Products ({floor.origin}, GFLOP/s):", f"{floor.flops_per_s / GFLOP:.0f}"),
    ]
    for word, floor_s, names in (
        ("TTFT of the batch", floor.ttft_s, (("P99 TTFT", "ttft_ms.p99"),)),
        ("TPOT", floor.tpot_s, (("Model-only TPOT", "model_tpot_ms"), ("Mean TPOT", "tpot_ms.mean"))),
    ):
        if floor_s:
            lines.append(line(f"Floor of {word} (ms):", f"{1000 * floor_s:.2f}"))
            lines += [
                line(f"{label} / floor:", f"{found[name].median / (1000 * floor_s):.2f}")
                for label, name in names
                if name in found
            ]
    return [*lines, line("Duration / floor of all its steps:", number(found, "measured_over_floor"))]


DRAFTING = (  # as BESIDE
    ("Acceptance rate (%):", "acceptance_rate", 2, 100),
    ("Acceptance length:", "acceptance_length", 2, 1),
    ("Drafts:", "drafts", 0, 1),
    ("Draft tokens:", "draft_tokens", 0, 1),
    ("Accepted tokens:", "accepted_draft_tokens", 0, 1),
    ("Gain of steps with drafts:", "drafting_gain", 2, 1),
)
BESIDE = (  # label, name in Run.beside, digits, factor
    ("Input tokens found in the prefix cache:", "prefix_cache_hit_tokens", 0, 1),
    ("Pictures found in the encoder cache:", "encoder_cache_hits", 0, 1),
    ("Most of the KV cache in use (%):", "most_kv_cache_usage", 1, 100),
    ("Most requests computed at once:", "most_running", 0, 1),
    ("Most requests waiting:", "most_waiting", 0, 1),
    ("Preemptions:", "preemptions", 0, 1),
    ("Tokens in a chunk of the stream:", "tokens_per_piece", 2, 1),
    ("The client's own load (% of a core):", "client_cpu", 1, 100),
)


def _section(found: Mapping[str, Figure], heading: str, parts: Sequence[tuple[str, str, int, float]]) -> list[str]:
    """Figures of Run.beside under a heading; nothing where none is known."""
    rows = [
        line(label, f"{found[f'beside.{name}'].median * factor:.{digits}f}")
        for label, name, digits, factor in parts
        if f"beside.{name}" in found
    ]
    return [f"{heading:-^{WIDTH}}", *rows] if rows else []


SPREAD = (
    ("Benchmark duration", "duration_s"),
    ("Output token throughput", "output_tokens_per_s"),
    ("Mean TTFT", "ttft_ms.mean"),
    ("Mean TPOT", "tpot_ms.mean"),
)


def _spread_lines(found: Mapping[str, Figure], num_runs: int) -> list[str]:
    """How far the repetitions lie apart, as a share of their median."""
    lines = [f"{'Repetitions':-^{WIDTH}}", line("Runs, of which the above are medians:", str(num_runs))]
    for label, name in SPREAD:
        spread = found[name].spread if name in found else None
        if spread is not None:
            lines.append(line(f"Spread of {label} (%):", f"{100 * spread:.1f}"))
    return lines
