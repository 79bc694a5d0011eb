"""Charts of one report, or of several side by side, as PNG files. Knows reports only, and draws no number of its own.

Several loads: throughput, TTFT and TPOT over what is varied, and throughput against TPOT. One load: how its requests'
times are distributed. Points are medians over the repetitions, bars reach from the least to the greatest.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from executor.bench import statistics
from executor.bench.results import Load, Point, Report, RequestResult

COLOURS = ("#1f5f99", "#c4552d", "#3b7f4f", "#7a4f9a", "#8a6d1f", "#4a4a4a")
SIZE_INCHES = (11, 8.5)
MOST_TITLE = 130  # characters of a line
AXES = (("batch_size", "batch size (requests)"), ("request_rate", "request rate (requests/s)"),
        ("concurrency", "concurrency (requests at once)"))  # fmt: skip


def draw(reports: Sequence[Report], stem: Path, names: Sequence[str] = (), below: str = "") -> list[Path]:
    """Draw `reports` together into files that begin with `stem`; returns them. `names`: of the reports, for legends;
    `below`: a line below the title.

    Raises OSError where no file can be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # its search for fonts is no news
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    panels = figure.subplots(2, 2)
    named = list(zip(names or [""] * len(reports), reports, strict=True))
    if all(len(report.points) == 1 for report in reports):
        _distributions(panels, named)
    else:
        _curves(panels, named)
    figure.suptitle(
        "\n".join([*title_lines(reports[0], is_alone=len(reports) == 1), *([_short(below)] if below else [])]),
        fontsize=11,
    )
    path = Path(f"{stem}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return [path]


def title_lines(report: Report, *, is_alone: bool = True) -> list[str]:
    """What was measured, and on what; of several reports only what they share is told."""
    model = report.recipe["model_config"]
    name = str(model["model_path"]).rstrip("/").rpartition("/")[2]
    first = f"bench {report.mode}: {name}, data set {report.dataset}"
    numbers = sorted({len(point.runs) for point in report.points})
    if numbers[-1] > 1 and len(report.points) > 1:
        first += f"; medians of {numbers[-1]} repetitions, bars: least to greatest"
    if not is_alone:
        return [_short(first)]
    machine = report.machine
    chip = machine.get("soc") or machine.get("cpu", "")
    where = f"{model['dtype']}, {machine.get('device', 'a server elsewhere')} ({chip}, {machine.get('cores')} cores)"
    return [_short(first), _short(f"{where}, {report.created[:16].replace('T', ' ')} UTC")]


def _short(text: str) -> str:
    return text if len(text) <= MOST_TITLE else text[: MOST_TITLE - 3] + "..."


def _curves(panels: np.ndarray, named: Sequence[tuple[str, Report]]) -> None:
    (throughput, ttft), (tpot, trade) = panels
    axis, label = _varied(named)
    lines = [line for name, report in named for line in _lines(name, report, axis)]
    for colour, (name, points) in zip(_colours(len(lines)), lines, strict=True):
        found = [statistics.figures(point.runs) for point in points]
        x = [getattr(point.load, axis) for point in points]
        _curve(throughput, x, found, "output_tokens_per_s", colour, name or "output tokens")
        _curve(ttft, x, found, "ttft_ms.mean", colour, f"{name} mean".strip())
        _curve(ttft, x, found, "ttft_ms.p99", colour, f"{name} P99".strip(), style="--")
        _curve(tpot, x, found, "tpot_ms.mean", colour, f"{name} end to end, mean".strip())
        _curve(tpot, x, found, "model_tpot_ms", colour, f"{name} model alone".strip(), style="--")
        floors = [point.floor.tpot_s * 1000 if point.floor and point.floor.tpot_s else np.nan for point in points]
        if not np.isnan(floors).all():
            tpot.plot(x, floors, ":", color=colour, label=f"{name} floor".strip())
        _trade(trade, points, found, axis, colour, name)
    _finish(throughput, label, "output tokens/s", "Throughput")
    _finish(ttft, label, "TTFT (ms)", "Time to first token")
    _finish(tpot, label, "TPOT (ms)", "Time per output token")
    trade.set_xlim(left=0)
    _finish(trade, "TPOT, mean (ms)", "output tokens/s", f"Throughput against latency, by {label.partition(' (')[0]}")
    for panel in (throughput, ttft, tpot):
        values = [value for line in panel.lines for value in line.get_xdata()]
        if min(values) > 0 and max(values) >= 8 * min(values):
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted(set(values)))
            panel.get_xaxis().set_major_formatter(ScalarFormatter())
            panel.minorticks_off()
        elif all(float(value).is_integer() for value in values):
            panel.get_xaxis().set_major_locator(MaxNLocator(integer=True))


def _varied(named: Sequence[tuple[str, Report]]) -> tuple[str, str]:
    """Of what can be varied, what takes most values, and its words for an axis."""
    loads = [point.load for _, report in named for point in report.points]
    return max(AXES, key=lambda axis: len({getattr(load, axis[0]) for load in loads} - {None}))


def _lines(name: str, report: Report, axis: str) -> Iterator[tuple[str, list[Point]]]:
    """The points of a report in curves over `axis`: one curve for each value of whatever else is varied."""
    curves: dict[Load, list[Point]] = {}
    for point in report.points:
        if getattr(point.load, axis) is None:
            continue
        others = Load(**{other: getattr(point.load, other) for other, _ in AXES if other != axis})
        curves.setdefault(others, []).append(point)
    for others, points in curves.items():
        words = others.words if len(curves) > 1 else ""
        yield ", ".join(filter(None, (name, words))), sorted(points, key=lambda point: getattr(point.load, axis))


def _curve(
    panel: Axes,
    x: Sequence[float],
    found: Sequence[Mapping[str, statistics.Figure]],
    name: str,
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    """A figure over the loads that have it, with bars for the spread of its repetitions."""
    there = [(at, figures[name]) for at, figures in zip(x, found, strict=True) if name in figures]
    if not there:
        return
    medians = [figure.median for _, figure in there]
    bars = [[m - f.least for m, (_, f) in zip(medians, there, strict=True)],
            [f.most - m for m, (_, f) in zip(medians, there, strict=True)]]  # fmt: skip
    panel.errorbar(
        [at for at, _ in there], medians, yerr=bars, fmt=f"o{style}", color=colour, markersize=4, capsize=3, label=label
    )


def _trade(
    panel: Axes,
    points: Sequence[Point],
    found: Sequence[Mapping[str, statistics.Figure]],
    axis: str,
    colour: str,
    label: str,
) -> None:
    there = [
        (figures["tpot_ms.mean"].median, figures["output_tokens_per_s"].median, getattr(point.load, axis))
        for point, figures in zip(points, found, strict=True)
        if "tpot_ms.mean" in figures
    ]
    if not there:
        return
    panel.plot([x for x, _, _ in there], [y for _, y, _ in there], "o-", color=colour, markersize=4, label=label)
    for x, y, value in there:
        panel.annotate(
            f"{value:g}", (x, y), textcoords="offset points", xytext=(6, -12), fontsize=8, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )  # fmt: skip


def _distributions(panels: np.ndarray, named: Sequence[tuple[str, Report]]) -> None:
    """How many of the requests took at most so long, over all repetitions."""
    kinds = (
        ("Time to first token", "TTFT (ms)", lambda request: [request.ttft_s]),
        ("Time per output token (excl. 1st)", "TPOT of a request (ms)", lambda request: [statistics.tpot_s(request)]),
        ("Inter-token latency", "gap between tokens (ms)", lambda request: np.diff(request.token_times_s)),
        ("End-to-end latency", "whole answer (ms)", lambda request: [request.e2e_s]),
    )
    for panel, (title, label, values_of) in zip(panels.flat, kinds, strict=True):
        for colour, (name, report) in zip(_colours(len(named)), named, strict=True):
            values_ms = [
                1000 * value for request in _answered(report) for value in values_of(request) if value is not None
            ]
            if values_ms:
                panel.ecdf(values_ms, color=colour, label=name)
                panel.axvline(np.median(values_ms), color=colour, linestyle=":", linewidth=1)
        _finish(panel, label, "share of all (dotted: median)", title)
        panel.set_xlim(left=0)


def _answered(report: Report) -> list[RequestResult]:
    runs = [run for point in report.points for run in point.runs]
    return [request for run in runs for request in run.requests if request.error is None]


def _finish(panel: Axes, x: str, y: str, title: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_title(title, fontsize=10)
    # Room above the greatest value, counted from 0: a flat curve would else lie on the upper edge.
    panel.set_ylim(0, 1.08 * panel.dataLim.y1 if panel.dataLim.y1 > 0 else None)
    panel.margins(x=0.08)
    panel.grid(alpha=0.3)
    labels = [label for label in panel.get_legend_handles_labels()[1] if label]
    if labels:
        panel.legend(fontsize=8)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
