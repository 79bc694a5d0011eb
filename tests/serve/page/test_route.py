"""GET / and what the page asks for beside the API, without a browser."""

import base64
import hashlib
import importlib
import re
from typing import Any

import pytest

from executor.serve.page.route import FOLDER, whole_page
from tests.reference import REPO
from tests.serve.conftest import Running


def test_the_page_is_one_file_that_names_no_other_host(server: Running) -> None:
    reply = server.http.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    for outside in re.findall(r"[a-z]+://[^\s\"'`)]+", reply.text):
        assert outside.startswith("http://www.w3.org/"), f"the page names {outside}"  # SVG's namespace
    assert not re.search(r"<(?:script|img|link)[^>]*\ssrc=|@import|url\(", reply.text)
    assert re.findall(r"<link[^>]*>", reply.text) == ['<link rel="icon" href="data:,">']


def test_the_policy_allows_what_the_page_holds_and_nothing_else(server: Running) -> None:
    reply = server.http.get("/")
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", reply.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert policy[f"{tag}-src"].split() == [f"'sha256-{digest}'" for digest in hashes]
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", reply.text), "an inline handler or style would be refused"


def test_nothing_on_the_page_parses_html() -> None:
    for path in sorted(FOLDER.glob("*.js")):
        parsers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
        found = re.search(parsers, path.read_text())
        assert not found, f"{path.name}: {found.group()}"


def test_all_files_of_the_page_are_in_it() -> None:
    html, _ = whole_page()
    for path in (*FOLDER.glob("*.js"), *FOLDER.glob("*.css")):
        assert path.read_text() in html


def test_settings_are_those_of_the_recipe(server: Running) -> None:
    told = server.http.get("/page/settings").json()
    assert told["model"] == server.service.model_name and told["max_model_len"] == 2048
    assert told["max_tokens"] == server.service.recipe.generation.max_new_tokens
    assert told["max_pictures"] == server.service.recipe.server.max_pictures


@pytest.mark.parametrize(
    ("body", "word"),
    [({"text": "", "width": 0, "height": 5}, "width"), ({"text": "", "width": 100_000, "height": 1}, "at most 200")],
)
def test_a_picture_that_cannot_be_is_refused(server: Running, body: dict[str, Any], word: str) -> None:
    reply = server.http.post("/page/marks", json=body)
    assert reply.status_code == 400 and word in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("family", "numbers", "expected"),
    [
        ("qwen3_vl", [500, 250, 1000, 750], [100, 50, 199, 150]),
        ("qwen2_5_vl", [56, 28, 112, 84], [57.14, 28.57, 114.29, 85.71]),
    ],
)
def test_places_are_in_pixels_of_the_picture(
    server: Running, monkeypatch: pytest.MonkeyPatch, family: str, numbers: list[int], expected: list[int]
) -> None:
    """Of 1000 in the one family, of the resized picture (200 becomes 196) in the other."""
    processor = importlib.import_module(f"models.{family}.processor").Processor(REPO / "models/tiny" / family)
    monkeypatch.setattr(server.service, "processor", processor)
    text = f'[{{"bbox_2d": {numbers}, "label": "a"}}, {{"point_2d": [0, 0], "label": "b"}}]'
    reply = server.http.post("/page/marks", json={"text": text, "width": 200, "height": 200})
    box, point = reply.json()["marks"]
    assert box == {"label": "a", "box": pytest.approx(expected, abs=0.01)} and point == {"label": "b", "point": [0, 0]}
