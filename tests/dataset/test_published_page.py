"""docs/datasets.md and docs/metrics.md say of every published set and metric what the tables in the code say."""

import re

from dataset.published import METRICS_OF_OTHERS, PUBLISHED
from executor.evaluate.metrics import METRICS
from tests.reference import REPO

PAGE = (REPO / "docs" / "datasets.md").read_text()
METRICS_PAGE = (REPO / "docs" / "metrics.md").read_text()


def rows(page: str) -> dict[str, str]:
    """Table rows by the names in their first cell; of several the first."""
    found: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([a-z_]+)`", line.split("|")[1]):
                found.setdefault(name, line)
    return found


def test_every_published_set_has_its_parts_and_metric_on_the_page():
    found = rows(PAGE.split("How each set is asked")[0])
    for name, published in PUBLISHED.items():
        cells = [cell.strip() for cell in found[name].split("|")]
        assert cells[3] == ", ".join(published.splits), name
        assert cells[4] == f"`{published.metric}`", name
    for name, metric in METRICS_OF_OTHERS.items():
        assert f"`{metric}`" in found[name]


def test_every_prompt_is_on_the_page():
    found = rows(PAGE.split("How each set is asked")[1])
    for name, published in PUBLISHED.items():
        cell = found[name].split("|")[2].replace(" ⏎⏎ ", "⏎⏎").replace(" ⏎ ", "⏎").replace("⏎", "\n")
        wanted = published.prompt.replace("{options}", "A. {option}\nB. ...")
        assert wanted in cell, name
        assert published.open_prompt in cell, name


def test_every_metric_and_its_source_is_on_the_page():
    found = rows(METRICS_PAGE)
    assert found.keys() == METRICS.keys()
    for name, metric in METRICS.items():
        source = metric.source.split(",")[0]
        assert name == "exact_match" or source.split("/")[-1].split(" ")[0] in found[name], name
