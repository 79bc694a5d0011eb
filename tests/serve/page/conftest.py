"""The chat page in a headless Chromium, over a real server; what goes wrong there fails the test that saw it."""

import base64
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reference import REPO
from tests.serve.conftest import Running
from tests.serve.page.browser import chromium
from tests.serve.scripted import ScriptedBackend

MEDIA = REPO / "dataset/media"
PICTURE, WORD, CLIP = MEDIA / "objects.png", MEDIA / "word.png", MEDIA / "clip.mp4"


class Visit:
    """A page that is open: what a person does there and sees, and what went wrong meanwhile."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.outside: list[str] = []
        self._handlers = {
            "console": lambda message: message.type in ("error", "warning") and self.errors.append(message.text),
            "pageerror": lambda error: self.errors.append(str(error)),
            "request": lambda request: self._see(request.url),
        }
        for event, handler in self._handlers.items():
            page.on(event, handler)
        page.set_default_timeout(30_000)
        page.goto(f"{url}/")

    def leave(self) -> None:
        for event, handler in self._handlers.items():
            self.page.remove_listener(event, handler)
        self.page.unroute_all()
        self.page.goto("about:blank")  # ends what it still asks: the server waits for that when it is stopped

    def _see(self, url: str) -> None:
        if not url.startswith((self.url, "blob:", "data:")):
            self.outside.append(url)

    def add(self, *paths: Path) -> None:
        self.page.set_input_files("#files", list(paths))
        self.page.locator("#media li").nth(len(paths) - 1).wait_for()

    def ask(self, question: str, *, waits: bool = True) -> None:
        num_turns = self.page.locator(".turn").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        if waits:
            self.page.locator(".foot").nth(num_turns).wait_for()
            self.page.locator("#send").wait_for()

    def copied_curl(self) -> str:
        self.page.get_by_role("button", name="Copy as curl").click()
        self.page.get_by_text("Copied").wait_for()
        return self.page.evaluate("navigator.clipboard.readText()")

    def answers(self) -> list[str]:
        return self.page.locator(".body").all_inner_texts()

    def has_no_side_scroll(self) -> bool:
        return self.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth && "
                                  "document.querySelector('main').scrollWidth <= innerWidth")  # fmt: skip


Open = Callable[..., Visit]
CLIPBOARD = ["clipboard-read", "clipboard-write"]


def run_curl(command: str, folder: Path, **environment: str) -> dict[str, Any]:
    """The reply of a copied command, which may say before it which files it reads."""
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | environment, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="package")  # and no longer: Playwright keeps an event loop in this thread
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="package")
def tab(browser: Any) -> Any:
    """The page of all visits that want nothing special: opening one costs more than most tests."""
    return browser.new_page()


@pytest.fixture
def visit(browser: Any, tab: Any, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the page of `server` or another one; at the end nothing may have gone wrong or out of the machine."""
    visits: list[tuple[Visit, str]] = []

    def open_page(running: Running | None = None, *, allowed: str = "", **options: Any) -> Visit:
        url = (running or request.getfixturevalue("server")).url
        visits.append((Visit(browser.new_page(**options) if options else tab, url), allowed))
        return visits[-1][0]

    yield open_page
    for opened, allowed in visits:
        opened.leave()
        if opened.page is not tab:
            opened.page.close()
        assert [error for error in opened.errors if not (allowed and allowed in error)] == []
        assert opened.outside == []


@pytest.fixture
def scripted(server: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedBackend]:
    def install(*pieces: str, **options: Any) -> ScriptedBackend:
        backend = ScriptedBackend(pieces, **options)
        monkeypatch.setattr(server.service, "backend", backend)
        return backend

    return install


def message(text: str, *paths: Path) -> dict[str, Any]:
    kinds = {".mp4": ("video", "video/mp4"), ".png": ("image", "image/png")}
    parts: list[dict[str, Any]] = []
    for path in paths:
        kind, media_type = kinds[path.suffix]
        url = f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
