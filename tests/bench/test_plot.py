"""Charts: that every curve is there, with its units, and that files are pictures."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from executor.bench import plot
from executor.bench.results import Floor, Load, Point, Report
from tests.bench.test_compare import report_of, run_of

LOADS = [Load(batch_size=size) for size in (1, 2, 4, 8)]


def swept(loads, scale=1.0):
    points = []
    for number, load in enumerate(loads, 1):
        runs = tuple(
            replace(run_of(scale * number * seconds), model_tpot_s=0.05 * number) for seconds in (1.0, 1.2, 0.9)
        )
        points.append(Point(load, runs, Floor("measured", 1e10, 1e12, 0.05, 0.01 * number)))
    return replace(report_of(1.0), points=tuple(points), machine={"device": "cpu", "cpu": "x", "cores": 2})


def drawn(reports, names=("",)):
    panels = Figure().subplots(2, 2)
    plot._curves(panels, list(zip(names, reports, strict=True)))
    return panels


def test_curves_are_the_medians_over_what_is_varied():
    (throughput, ttft), (tpot, trade) = drawn([swept(LOADS)])
    x, y = throughput.lines[0].get_data()
    assert list(x) == [1, 2, 4, 8]
    assert np.allclose(y, [11 / (1.0 * number) for number in (1, 2, 3, 4)])
    assert throughput.get_xlabel() == "batch size (requests)" and throughput.get_ylabel() == "output tokens/s"
    assert (ttft.get_ylabel(), tpot.get_ylabel()) == ("TTFT (ms)", "TPOT (ms)")
    assert set(tpot.get_legend_handles_labels()[1]) == {"end to end, mean", "model alone", "floor"}
    floor = next(line for line in tpot.lines if line.get_label() == "floor")
    assert np.allclose(floor.get_ydata(), [10, 20, 30, 40])
    assert [text.get_text() for text in trade.texts] == ["1", "2", "4", "8"]


def test_every_other_load_has_a_curve_of_its_own():
    loads = [Load(request_rate=rate, concurrency=number) for number in (2, 4) for rate in (1.0, 2.0, 3.0)]
    (throughput, _), _ = drawn([swept(loads)])
    assert throughput.get_xlabel() == "request rate (requests/s)"
    assert throughput.get_legend_handles_labels()[1] == ["2 at once", "4 at once"]


def test_axes_have_room_above_a_flat_curve_and_marks_that_are_sizes_of_batches():
    (throughput, _), (_, trade) = drawn([swept([Load(batch_size=size) for size in (1, 2)], scale=1.0)])
    assert all(tick == int(tick) for tick in throughput.get_xticks())
    for panel in (throughput, trade):
        assert panel.get_ylim()[1] >= 1.05 * panel.dataLim.y1
    flat = Figure().subplots()
    flat.plot([1, 2], [54.1, 54.2])
    plot._finish(flat, "x", "y", "flat")
    assert flat.get_ylim() == (0, pytest.approx(1.08 * 54.2))


@pytest.mark.parametrize("reports, names", [(["curves"], ()), (["lone"], ()), (["curves", "curves"], ("a", "b"))])
def test_files_are_pictures(tmp_path, reports, names):
    made: dict[str, Report] = {"curves": swept(LOADS), "lone": swept([Load()])}
    (path,) = plot.draw([made[name] for name in reports], tmp_path / "new" / "chart", names)
    assert path == tmp_path / "new" / "chart.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 600
        assert len(picture.convert("L").getcolors(256)) > 10  # not blank


def test_titles_say_what_ran_where():
    first, second = plot.title_lines(swept(LOADS))
    assert first.startswith("bench latency: a, data set random") and "medians of 3 repetitions" in first
    assert second == "float32, cpu (x, 2 cores), 2026-01-01 00:00 UTC"
    assert len(plot.title_lines(swept(LOADS), is_alone=False)) == 1
