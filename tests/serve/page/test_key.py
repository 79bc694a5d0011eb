"""A server with a key: the chat page is open, asks for the key, and keeps it for its tab alone."""

from pathlib import Path

from executor.engine.engine import Engine
from tests.serve.conftest import start
from tests.serve.page.conftest import CLIPBOARD, Open, run_curl


def test_the_key_is_asked_for_and_kept_for_the_tab(visit: Open, tiny_engine: Engine, tmp_path: Path) -> None:
    with start(tiny_engine, api_key="open-sesame") as running:
        assert running.http.get("/").status_code == 200
        opened = visit(running, allowed="401", permissions=CLIPBOARD)
        opened.page.locator("#key-dialog").wait_for()
        for key in ("wrong", "open-sesame"):
            opened.page.fill("#key", key)
            opened.page.press("#key", "Enter")
            if key == "wrong":
                opened.page.get_by_text("does not accept this key").wait_for()
        opened.page.locator("#key-dialog").wait_for(state="hidden")
        opened.ask("What is a square?")
        assert len(opened.answers()) == 1 and opened.page.locator(".fault").is_hidden()
        command = opened.copied_curl()
        assert "open-sesame" not in command, "a command that is handed on must not hold the key"
        reply = run_curl(command, tmp_path, API_KEY="open-sesame")
        assert reply["choices"][0]["message"]["content"] == opened.answers()[0]
        opened.page.reload()
        opened.page.get_by_role("heading", name=running.service.model_name).wait_for()
        assert not opened.page.locator("#key-dialog").is_visible()
        assert opened.page.evaluate("localStorage.length") == 0
