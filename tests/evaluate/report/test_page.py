"""The report in a headless Chromium, as a file: what a person sees, filters and turns, and what must not happen."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executor.evaluate.compare import compare
from executor.evaluate.report.write import write_report
from executor.evaluate.runs import read_run
from tests.evaluate.report.test_write import HOSTILE
from tests.evaluate.rows_files import row, rows_file
from tests.reference import REPO
from tests.serve.page.browser import chromium

PICTURE = str(REPO / "dataset/media/objects.png")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of two runs; at the end nothing may have gone wrong or been asked for."""
    wrong: list[str] = []

    def open_page(first: list[dict], second: list[dict], **options: Any) -> Any:
        runs = [read_run(rows_file(tmp_path / name, rows)) for name, rows in (("a.jsonl", first), ("b.jsonl", second))]
        path = tmp_path / "r.html"
        write_report(path, compare(*runs), lambda index, name: None)
        page = browser.new_page(**options)
        page.set_default_timeout(30_000)
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or wrong.append(asked.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert wrong == []


def two_runs() -> tuple[list[dict], list[dict]]:
    """Two lost, one won, one wrong in both, three right; kinds take turns."""
    first, second = [1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1, 1]
    kinds = [{"kind": "odd" if index % 2 else "even"} for index in range(7)]
    runs = [
        [row(index, float(score), labels=kinds[index], sources=[PICTURE]) for index, score in enumerate(scores)]
        for scores in (first, second)
    ]
    runs[1][6] |= {"text": "right!", "extracted": "right"}
    return runs[0], runs[1]


def ids(page: Any) -> list[str]:
    return [text.split(" \u00b7 ")[0] for text in page.locator(".sample h3").all_inner_texts()]


def test_flips_are_shown_first_and_filters_show_the_others(visit: Open) -> None:
    page = visit(*two_runs())
    assert page.locator("h1").inner_text() == "textvqa: a and b"
    assert (
        "A scores 71.4 %, B 57.1 %, over 7 samples. Better in B: 1, worse: 2" in page.locator("#verdict").inner_text()
    )
    filters = page.locator("#filters button")
    assert filters.all_inner_texts() == [
        *("Worse in B (2)", "Better in B (1)", "Wrong in both (1)"),
        *("Other words, same score (1)", "Right in both (3)", "All (7)"),
    ]
    found = []
    for number in range(6):
        filters.nth(number).click()
        assert filters.nth(number).get_attribute("aria-pressed") == "true"
        found.append([int(name.removeprefix("sample ")) for name in ids(page)])
    assert found == [[0, 1], [2], [3], [6], [4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    page.get_by_label("kind").select_option("odd")
    assert ids(page) == ["sample 1", "sample 3", "sample 5"]
    page.get_by_label("Text").fill("QUESTION 3")
    page.get_by_text("1 to 1 of 1 samples").wait_for()
    assert ids(page) == ["sample 3"]


def test_figures_stand_in_the_table(visit: Open) -> None:
    page = visit(*two_runs())
    rows = page.locator("#scores tbody tr").all_inner_texts()
    assert [text.split("\t")[:2] for text in rows] == [["all", "7"], ["kind: even", "4"], ["kind: odd", "3"]]
    assert rows[0].split("\t")[4].startswith("\u221214.3 [") and rows[0].split("\t")[5:] == ["1", "2"]


def test_hostile_answers_stay_texts(visit: Open) -> None:
    texts = {"text": HOSTILE, "extracted": "x", "prompt": HOSTILE, "labels": {"kind": HOSTILE}, "references": [HOSTILE]}
    texts |= {"media": [HOSTILE], "sources": [HOSTILE]}
    page = visit([row(0, **texts)], [row(0, 0.0, **texts)])
    assert page.locator(".sample script, .sample img").count() == 0
    assert page.locator(".answer .said").first.text_content() == HOSTILE
    assert page.locator(".question").text_content() == HOSTILE
    assert page.locator(".absent").count() == 1


def test_a_picture_is_enlarged_and_closed_by_the_keyboard(visit: Open) -> None:
    page = visit(*two_runs())
    page.locator(".picture").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog").is_visible()
    assert page.locator("dialog img").evaluate("image => image.naturalWidth") > 0
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_boxes_are_drawn_where_they_are_wanted_and_said(visit: Open) -> None:
    boxes = {"sources": [PICTURE], "boxes": [[0.25, 0.5, 0.75, 1.0]]}
    page = visit(
        [row(0, **boxes, said_boxes=[[0.25, 0.5, 0.75, 1.0]])], [row(0, 0.0, **boxes, said_boxes=[[0, 0, 0.5, 0.5]])]
    )
    assert page.locator(".legend").inner_text().split() == ["wanted", "A", "B"]
    side = 112  # of the picture in pixels
    places = [
        [float(box.get_attribute(name)) / side for name in ("x", "y", "width", "height")]
        for box in (page.locator(f".sample rect.{of}") for of in ("wanted", "A", "B"))
    ]
    assert places == [[0.25, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 0.5], [0, 0, 0.5, 0.5]]


def test_thousands_of_samples_are_drawn_a_page_at_a_time(visit: Open) -> None:
    rows = [row(index, sources=[PICTURE]) for index in range(5000)]
    page = visit(rows, rows)
    assert page.locator("#count").inner_text() == "1 to 25 of 5000 samples"
    assert page.locator(".sample").count() == 25
    page.get_by_role("button", name="Next").click()
    assert ids(page)[0] == "sample 25" and page.locator("#place").inner_text() == "Page 2 of 200"
    page.get_by_label("Text").fill("question 4999?")
    page.get_by_text("1 to 1 of 1 samples").wait_for()
    assert ids(page) == ["sample 4999"] and not page.locator("#pages").is_visible()


def test_everybody_can_use_it(visit: Open) -> None:
    """axe-core's rules in both colour schemes, at 360 px without side scroll."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    first, second = two_runs()
    first[0] |= {"sources": ["/moved/away.png"], "text": "long " * 40 + "y" * 300}
    page = visit(first, second, viewport={"width": 360, "height": 740}, color_scheme="light", bypass_csp=True)
    page.get_by_role("button", name="All (7)").click()
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        violations = axe.Axe().run(page).response["violations"]
        assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in violations] == []
