"""A plan as pictures: the memory of a rank by part, and speed against requests at once. Everything says "predicted".

matplotlib is imported when a picture is drawn. Knows no command: numbers come in, a file goes out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.errors import UserError

GIB = 2**30
SIZE_INCHES, DPI = (9.6, 5.4), 150
COLORS = ("#1f5f99", "#c4552d", "#3b7f4f", "#7a4f9a", "#8a6d1f")  # those of executor/bench/plot.py
FITS, OVER = "#3b7f4f", "#b3261e"


def _figure(num_axes: int) -> tuple[Any, Any]:
    """A figure of so many axes side by side; it needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots(1, num_axes, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(
            f"model_config.output_path: {path} cannot be written ({error.strerror}); give a folder that can be"
        ) from error
    return path


def memory_chart(path: Path, title: str, parts: Mapping[str, int], allowed_bytes: int) -> Path:
    """Bars of what each part takes of one rank, with their sum beside what is allowed, in GiB."""
    figure, (axes,) = _figure(1)
    shown = {name: count / GIB for name, count in parts.items() if count}
    names = [*shown, "all"]
    values = [*shown.values(), sum(shown.values())]
    over = values[-1] > allowed_bytes / GIB
    colors = [COLORS[0]] * len(shown) + [OVER if over else FITS]
    bars = axes.barh(names[::-1], values[::-1], color=colors[::-1])
    axes.bar_label(bars, [f"{value:.2f}" for value in values[::-1]], padding=4)
    axes.axvline(allowed_bytes / GIB, color="black", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"allowed: {allowed_bytes / GIB:.1f} GiB", (allowed_bytes / GIB, 1.0), xycoords=("data", "axes fraction"),
        xytext=(0, 3), textcoords="offset points", ha="center", va="bottom",
    )  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_xlim(0, max(values[-1], allowed_bytes / GIB) * 1.1)
    axes.set_xlabel("memory of one rank, GiB (predicted, not measured)")
    figure.suptitle(title)
    return _save(figure, path)


def speed_chart(path: Path, title: str, points: Sequence[Mapping[str, float]], held_users: int, wanted: str) -> Path:
    """Time for each token, time to the first, and tokens a second against requests at once.

    `points`: users, tpot_ms, ttft_ms, tokens_per_s. `held_users`: how many the memory holds: a line is drawn there.
    `wanted`: what each request is, in words.
    """
    figure, axes = _figure(3)
    users = [point["users"] for point in points]
    for each, (key, scale, label) in zip(
        axes,
        (
            ("tpot_ms", 1.0, "time for each further token (TPOT), ms"),
            ("ttft_ms", 1e-3, "first token of the last (TTFT), s"),
            ("tokens_per_s", 1.0, "output tokens a second, all requests"),
        ),
        strict=True,
    ):
        each.plot(users, [point[key] * scale for point in points], marker="o", markersize=4, color=COLORS[0])
        each.set_ylim(bottom=0)
        each.set_xscale("log", base=2)
        each.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        each.set_xlabel("requests at once")
        each.set_title(label, fontsize=10, loc="left")
        if users[0] <= held_users <= users[-1]:
            each.axvline(held_users, color="black", linestyle="--", linewidth=1.0)
            each.annotate(
                f"memory holds {held_users}", (held_users, 0.03), xycoords=("data", "axes fraction"),
                xytext=(-4, 0), textcoords="offset points", rotation=90, ha="right", va="bottom", fontsize=8,
            )  # fmt: skip
    held = "" if held_users else "; the memory holds none of these requests"
    figure.suptitle(f"{title}\npredicted, not measured; {wanted}{held}")
    return _save(figure, path)


def bars_chart(
    path: Path,
    title: str,
    names: Sequence[str],
    bars: Mapping[str, Sequence[float | None]],
    labels: Mapping[str, Sequence[int | None]],
    wanted: str,
) -> Path:
    """TPOT in ms of each name, a bar for each precision, the number of ranks above it; no bar where there is none."""
    figure, (axes,) = _figure(1)
    width = 0.8 / len(bars)
    for place, (precision, values) in enumerate(bars.items()):
        at = [number + (place - (len(bars) - 1) / 2) * width for number in range(len(names))]
        drawn = axes.bar(at, [value or 0 for value in values], width * 0.92, label=precision, color=COLORS[place])
        axes.bar_label(drawn, [str(ranks or "") for ranks in labels[precision]], fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel("time for each further token (TPOT), ms")
    axes.legend(title="weights", frameon=False)
    axes.set_title(f"above each bar: ranks. {wanted}", fontsize=10, loc="left")
    figure.suptitle(f"{title}: predicted, not measured")
    return _save(figure, path)
