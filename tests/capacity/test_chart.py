"""The pictures of a plan have every number that they are given, titles, units, and say that they are predicted."""

from PIL import Image

from executor.capacity import chart


def drawn(monkeypatch) -> list[str]:
    """All texts of the figures that are saved."""
    texts: list[str] = []
    save = chart._save

    def noted(figure, path):
        from matplotlib.text import Text

        figure.draw_without_rendering()
        texts.extend(found.get_text() for found in figure.findobj(Text) if found.get_visible())
        return save(figure, path)

    monkeypatch.setattr(chart, "_save", noted)
    return texts


def test_memory(tmp_path, monkeypatch):
    texts = drawn(monkeypatch)
    parts = {"weights": 3 << 30, "KV cache": 2 << 30, "graphs": 0}
    path = chart.memory_chart(tmp_path / "sub" / "a.png", "a model", parts, 10 << 30)
    assert {"a model", "weights", "KV cache", "all", "3.00", "2.00", "5.00", "allowed: 10.0 GiB"} <= set(texts)
    assert "graphs" not in texts and any("GiB (predicted, not measured)" in text for text in texts)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (1440, 810)


def test_speed(tmp_path, monkeypatch):
    texts = drawn(monkeypatch)
    points = [{"users": u, "tpot_ms": 2.0 * u, "ttft_ms": 900.0 * u, "tokens_per_s": 50.0 * u} for u in (1, 2, 4, 8)]
    chart.speed_chart(tmp_path / "a.png", "a model", points, 5, "each 10 tokens")
    assert "a model\npredicted, not measured; each 10 tokens" in texts
    assert texts.count("requests at once") == texts.count("memory holds 5") == 3
    chart.speed_chart(tmp_path / "b.png", "a model", points, 0, "each 10 tokens")
    assert any("the memory holds none" in text for text in texts) and texts.count("memory holds 5") == 3
    for unit in ("ms", " s", "tokens a second"):
        assert any(unit in text for text in texts)


def test_bars(tmp_path, monkeypatch):
    texts = drawn(monkeypatch)
    bars = {"bfloat16": [5.0, None], "w8a8": [3.0, 4.0]}
    chart.bars_chart(
        tmp_path / "a.png", "a chip", ["one", "two"], bars, {"bfloat16": [2, None], "w8a8": [1, 4]}, "asked"
    )
    assert {"one", "two", "bfloat16", "w8a8", "2", "1", "4", "a chip: predicted, not measured"} <= set(texts)
    assert "time for each further token (TPOT), ms" in texts
