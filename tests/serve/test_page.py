"""GET /: the chat page in a real browser, over a real server: the same answers as the API's, and a person's needs."""

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from executor.engine.engine import Engine
from executor.media.draw import find_marks, to_pixels
from executor.serve.page.route import FOLDER, whole_page
from tests.engines import engine_over
from tests.reference import REPO
from tests.serve.browser import chromium
from tests.serve.conftest import Running, start
from tests.serve.scripted import ScriptedBackend

MEDIA = REPO / "dataset/media"
PICTURE, WORD, CLIP = MEDIA / "objects.png", MEDIA / "word.png", MEDIA / "clip.mp4"
LOCATE = "Locate the blue square."


# --- Without a browser ---


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
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", path.read_text()
        )
        assert not found, f"{path.name}: {found.group()}"


def test_all_files_of_the_page_are_in_it() -> None:
    html, _ = whole_page()
    for path in (*FOLDER.glob("*.js"), *FOLDER.glob("*.css")):
        assert path.read_text() in html


def test_settings_are_those_of_the_recipe(server: Running) -> None:
    told = server.http.get("/page/settings").json()
    assert told["model"] == server.service.model_name and told["max_model_len"] == 2048
    assert told["max_pictures"] == server.service.recipe.server.max_pictures


@pytest.mark.parametrize(
    ("body", "word"),
    [({"text": "", "width": 0, "height": 5}, "width"), ({"text": "", "width": 100_000, "height": 1}, "at most 200")],
)
def test_a_picture_that_cannot_be_is_refused(server: Running, body: dict[str, Any], word: str) -> None:
    reply = server.http.post("/page/marks", json=body)
    assert reply.status_code == 400 and word in reply.json()["error"]["message"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_places_are_in_pixels_of_the_picture(family: str) -> None:
    """Absolute places are of the resized picture, relative ones of 1000: both families' answers to one question."""
    text = {"qwen2_5_vl": "[56, 28, 112, 84]", "qwen3_vl": "[500, 250, 1000, 750]"}[family]
    with engine_over(REPO / "models/tiny" / family) as engine:
        for running in start(engine):
            asked = {"text": f'{{"bbox_2d": {text}, "label": "a"}}', "width": 200, "height": 200}
            found = running.http.post("/page/marks", json=asked).json()["marks"]
            resized = engine.processor.picture_size(200, 200, engine.processor.options)
    expected = to_pixels(find_marks(asked["text"]), engine.processor.box_convention, resized, (200, 200))
    assert found == [{"label": "a", "box": list(expected[0].coordinates)}]
    if family == "qwen3_vl":
        assert found[0]["box"] == [100, 50, 199, 150]


# --- In a browser ---


class Visit:
    """A page that is open: what a person does there and sees, and what went wrong meanwhile."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.set_default_timeout(10_000)
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._see(request.url))
        page.goto(f"{url}/")

    def _see(self, url: str) -> None:
        if not url.startswith((self.url, "blob:", "data:")):
            self.outside.append(url)

    def add(self, *paths: Path) -> None:
        self.page.set_input_files("#files", list(paths))
        self.page.wait_for_function("n => document.querySelectorAll('#media li').length === n", arg=len(paths))

    def ask(self, question: str, *, waits: bool = True) -> None:
        num_turns = self.page.locator(".turn").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        if waits:
            self.page.locator(".foot").nth(num_turns).wait_for()
            self.page.locator("#send").wait_for()

    def answers(self) -> list[str]:
        return self.page.locator(".body").all_inner_texts()

    def has_no_side_scroll(self) -> bool:
        return self.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth && "
                                  "document.querySelector('main').scrollWidth <= innerWidth")  # fmt: skip


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, server: Running) -> Iterator[Open]:
    """Opens the page of `server` or another one; at the end nothing may have gone wrong or out of the machine."""
    contexts, visits = [], []

    def open_page(running: Running = server, *, allowed: str = "", **options: Any) -> Visit:
        contexts.append(browser.new_context(**options))
        visits.append((Visit(contexts[-1].new_page(), running.url), allowed))
        return visits[-1][0]

    yield open_page
    for opened, allowed in visits:
        assert [error for error in opened.errors if not (allowed and allowed in error)] == []
        assert opened.outside == []
    for context in contexts:
        context.close()


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


def api_answer(server: Running, *messages: dict[str, Any]) -> str:
    reply = server.http.post("/v1/chat/completions", json={"messages": list(messages)})
    return reply.json()["choices"][0]["message"]["content"]


def test_answers_are_the_apis_and_the_conversation_goes_on(visit: Open, server: Running) -> None:
    opened = visit()
    opened.add(PICTURE)
    opened.ask(LOCATE)
    first = message(LOCATE, PICTURE)
    expected = api_answer(server, first)
    assert opened.answers() == [expected]
    opened.ask("Count the objects.")
    told = {"role": "assistant", "content": expected}
    assert opened.answers()[1] == api_answer(server, first, told, message("Count the objects."))
    figures = opened.page.locator(".figures").all_inner_texts()
    assert all(
        re.search(r"TTFT [\d.]+ m?s · TPOT [\d.]+ m?s · \d+ tokens in.* · \d+ out", line) for line in figures[:1]
    )
    usage = re.search(r"(\d+) tokens in", figures[0])
    assert usage and int(usage[1]) > 16  # with the picture's

    # Its box is where the picture's square is: 56, 0 to 98, 42 of 112 pixels.
    image = opened.page.locator(".canvas img").first.bounding_box()
    box = opened.page.locator(".mark").first.bounding_box()
    assert image and box
    shares = [(box["x"] - image["x"]) / image["width"], (box["y"] - image["y"]) / image["height"],
              box["width"] / image["width"], box["height"] / image["height"]]  # fmt: skip
    assert shares == pytest.approx([56 / 112, 0, 42 / 112, 42 / 112], abs=0.01)
    assert "blue square at 56, 0, 98, 42" in (opened.page.locator(".canvas img").first.get_attribute("alt") or "")


def test_a_video_is_asked_about_as_the_api_is(visit: Open, server: Running) -> None:
    opened = visit()
    opened.add(CLIP)
    opened.ask("Describe the video.")
    assert opened.answers() == [api_answer(server, message("Describe the video.", CLIP))]


def test_pictures_go_in_the_order_that_is_shown(visit: Open, scripted: Any) -> None:
    backend, opened = scripted("fine"), visit()
    opened.add(PICTURE, WORD, CLIP)
    assert opened.page.locator("#order").is_visible()
    opened.page.click("[aria-label='Move Picture 2: word.png earlier']")
    opened.page.click("[aria-label='Remove Video 3: clip.mp4']")
    opened.ask("Which?")
    assert backend.asks[0].prompt.messages[0]["content"] == message("Which?", WORD, PICTURE)["content"]


def test_files_are_dropped_and_pasted(visit: Open) -> None:
    page = visit().page
    give = """([kind, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "given.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind === "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: data })
                                       : new DragEvent(kind, { ...options, dataTransfer: data });
        document.querySelector("#question").dispatchEvent(event);
    }"""
    content = base64.b64encode(PICTURE.read_bytes()).decode()
    page.evaluate(give, ["dragenter", content])
    assert page.locator("#drop").is_visible()
    page.evaluate(give, ["drop", content])
    assert not page.locator("#drop").is_visible()
    page.evaluate(give, ["paste", content])
    names = page.locator("#media img").evaluate_all("images => images.map((image) => image.alt)")
    assert names == ["Picture 1: given.png", "Picture 2: pasted picture"]


def test_an_answer_is_stopped_and_kept(visit: Open, scripted: Any) -> None:
    backend, opened = scripted("One. ", "Two", " three", hold=2), visit()
    opened.ask("Count.", waits=False)
    opened.page.get_by_text("One. Two").first.wait_for()
    assert opened.page.locator("#stop").is_visible() and not opened.page.locator("#send").is_visible()
    opened.page.keyboard.press("Escape")
    opened.page.get_by_text("Stopped.").first.wait_for()
    opened.page.wait_for_function("!document.querySelector('#send').hidden")
    opened.page.wait_for_timeout(50)
    assert backend.num_aborted == 1 and opened.answers() == ["One. Two"]
    backend = scripted("Four.")
    opened.ask("Go on.")
    assert [m["content"] for m in backend.asks[0].prompt.messages] == ["Count.", "One. Two", "Go on."]


def test_the_last_question_is_asked_again_and_changed(visit: Open, scripted: Any) -> None:
    backend, opened = scripted("yes"), visit()
    opened.ask("first")
    opened.add(WORD)
    opened.ask("second")
    opened.page.get_by_role("button", name="Regenerate").click()
    opened.page.wait_for_function("!document.querySelector('#send').hidden")
    assert backend.asks[2].prompt == backend.asks[1].prompt
    opened.page.get_by_role("button", name="Edit question").click()
    assert opened.page.input_value("#question") == "second" and opened.page.locator("#media li").count() == 1
    opened.page.fill("#question", "changed")
    opened.page.press("#question", "Enter")
    opened.page.get_by_text("changed").wait_for()
    opened.page.wait_for_function("!document.querySelector('#send').hidden")
    told = [m["content"] for m in backend.asks[3].prompt.messages]
    assert told == ["first", "yes", message("changed", WORD)["content"]] and opened.page.locator(".turn").count() == 2
    opened.page.click("#new")
    assert opened.page.locator(".turn").count() == 0
    opened.page.get_by_role("button", name="Bring the last one back").click()
    assert opened.page.locator(".turn").count() == 2


def test_settings_go_with_the_question(visit: Open, scripted: Any) -> None:
    backend, opened = scripted("yes"), visit()
    opened.page.click("#show-settings")
    opened.page.fill("#system", "Be brief.")
    opened.page.fill("#temperature", "0.5")
    opened.page.fill("#max-tokens", "9")
    opened.ask("Well?")
    ask = backend.asks[0]
    assert (ask.params.temperature, ask.params.max_new_tokens) == (0.5, 9)
    assert ask.prompt.messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("num_bytes", [0, 60_000])
def test_the_curl_command_runs_as_it_stands(
    visit: Open, server: Running, tmp_path: Path, num_bytes: int, browser: Any
) -> None:
    """A small picture stands in the command, a large one is read from its file."""
    picture = tmp_path / "it's a picture.png"
    picture.write_bytes(PICTURE.read_bytes() + b"\0" * num_bytes)  # what follows a PNG's end is left
    opened = visit(permissions=["clipboard-read", "clipboard-write"])
    opened.add(picture)
    opened.ask('What color is the square? It\'s `$HOME` \\ "here"\n!')
    opened.page.get_by_role("button", name="Copy as curl").click()
    opened.page.get_by_text("Copied").wait_for()
    command = opened.page.evaluate("navigator.clipboard.readText()")
    assert len(command) < 4_000
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    reply = json.loads(done.stdout[done.stdout.index("{") :])
    assert reply["choices"][0]["message"]["content"] == opened.answers()[0]


def test_the_key_is_asked_for_and_kept_for_the_tab(visit: Open, tiny_engine: Engine) -> None:
    for running in start(tiny_engine, api_key="open sesame"):
        assert running.http.get("/").status_code == 200
        opened = visit(running, allowed="401")
        opened.page.locator("#key-dialog").wait_for()
        for key in ("wrong", "open sesame"):
            opened.page.fill("#key", key)
            opened.page.press("#key", "Enter")
            opened.page.wait_for_timeout(100)
            if key == "wrong":
                opened.page.get_by_text("does not accept this key").wait_for()
        opened.page.locator("#key-dialog").wait_for(state="hidden")
        opened.ask("What is a square?")
        assert len(opened.answers()) == 1 and opened.page.locator(".fault").is_hidden()
        opened.page.reload()
        opened.page.get_by_role("heading", name=running.service.model_name).wait_for()
        assert not opened.page.locator("#key-dialog").is_visible()
        assert opened.page.evaluate("localStorage.length") == 0


def test_what_goes_wrong_is_said_in_words_and_can_be_tried_again(visit: Open, scripted: Any) -> None:
    opened = visit(allowed="400")
    opened.page.click("#show-settings")
    opened.page.fill("#max-tokens", "1000000")
    opened.ask("Too much?")
    assert "maximum context length is 2048" in opened.page.locator(".fault.error").inner_text()
    opened.page.fill("#max-tokens", "")
    scripted("half", failure="the engine stumbled")
    opened.page.get_by_role("button", name="Retry").click()
    opened.page.get_by_text("the engine stumbled").first.wait_for()
    assert opened.answers() == ["half"]
    scripted("whole")
    opened.page.get_by_role("button", name="Retry").click()
    opened.page.get_by_text("whole").first.wait_for()
    assert opened.page.locator(".turn").count() == 1 and opened.page.locator(".fault").is_hidden()


def test_a_server_that_is_gone_is_named(visit: Open) -> None:
    opened = visit(allowed="ERR_")
    opened.page.get_by_role("heading", name="qwen3_vl").wait_for()
    opened.page.route("**/v1/**", lambda route: route.abort())
    opened.ask("Anybody?")
    assert "The server cannot be reached" in opened.page.locator(".fault.error").inner_text()


def stream_of(*deltas: dict[str, Any]) -> str:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def test_reasoning_is_folded_and_calls_are_shown(visit: Open) -> None:
    opened = visit()
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "look_up", "arguments": ""}}
    body = stream_of(
        {"role": "assistant", "reasoning_content": "Let me "},
        {"reasoning_content": "think."},
        {"content": "So."},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"word": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"cat"}'}}]},
    )
    opened.page.route("**/v1/**", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    opened.ask("Think.")
    assert not opened.page.get_by_text("Let me think.").is_visible()
    opened.page.get_by_text("Reasoning").click()
    assert opened.page.get_by_text("Let me think.").is_visible()
    assert opened.page.locator(".calls").inner_text().split("\n") == ["Calls look_up", '{"word": "cat"}']


MARKDOWN = """# Title
Some **bold**, *slanted* and `code` <img src=x onerror=alert(1)>.

- one
- two
  1. deeper

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>")
```
![seen](http://example.com/x.png) 2 * 3 * 4 [link](javascript:alert(1))"""


def test_markdown_is_shown_and_stays_text(visit: Open, scripted: Any) -> None:
    scripted(*re.findall(r"(?s).{1,7}", MARKDOWN))
    opened = visit()
    opened.ask("Show.")
    body = opened.page.locator(".body")
    told = {tag: body.locator(tag).all_inner_texts() for tag in ("h3", "strong", "em", "p code", "li li", "td", "pre")}
    assert told == {"h3": ["Title"], "strong": ["bold"], "em": ["slanted"], "p code": ["code"], "li li": ["deeper"],
                    "td": ["1", "2"], "pre": ['print("<b>")']}  # fmt: skip
    assert body.locator("img, a, script").count() == 0
    text = body.inner_text()
    for plain in (
        "<img src=x onerror=alert(1)>",
        "![seen](http://example.com/x.png)",
        "2 * 3 * 4",
        "[link](javascript:",
    ):
        assert plain in text


def test_screen_readers_hear_sentences_once(visit: Open, scripted: Any) -> None:
    words = "The sky is blue today. It will rain tonight. Take an umbrella with you".split(" ")
    scripted(*(f"{word} " for word in words))
    opened = visit()
    opened.page.evaluate("""() => {
        window.heard = [];
        new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach((node) => heard.push(node.textContent))))
            .observe(document.querySelector("#spoken"), { childList: true, subtree: true });
    }""")
    opened.ask("Weather?")
    heard = opened.page.evaluate("heard")
    assert heard[1:] == ["The sky is blue today.", "It will rain tonight.", "Take an umbrella with you"]
    assert opened.page.locator("#turns [aria-live], #turns [role=log], #turns[aria-live]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_that_everybody_can_use(browser: Any, visit: Open, scripted: Any, scheme: str) -> None:
    """axe-core's rules at 360 px, with an answer, a drawing, the settings and pictures in the tray; no side scroll."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    scripted(MARKDOWN, '\n{"bbox_2d": [100, 100, 500, 500], "label": "' + "a long label " * 5 + '"}', "\n" + "x" * 300)
    opened = visit(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
    )
    opened.add(PICTURE, WORD)
    opened.ask("Where? " + "y" * 200)
    opened.page.locator(".mark").wait_for()
    opened.page.click("#show-settings")
    opened.add(PICTURE, WORD)
    assert opened.has_no_side_scroll()
    found = axe.Axe().run(opened.page).response["violations"]
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found] == []
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", background)[:3])
    assert brightness > 600 if scheme == "light" else brightness < 150
    opened.page.click("#theme")
    switched = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert switched != background
    opened.page.reload()
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == switched


def test_the_keyboard_reaches_everything_in_order(visit: Open, scripted: Any) -> None:
    scripted("yes")
    opened = visit()
    opened.ask("Well?")
    assert opened.page.evaluate("document.activeElement.id") == "question"
    opened.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(10):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or reached[-1] in ("question", "main")
    names = [
        "new",
        "show-settings",
        "theme",
        "Regenerate",
        "Copy",
        "Copy as curl",
        "Edit question",
        "question",
        "choose",
        "send",
    ]
    assert [name for name in reached if name != "main"][: len(names)] == names[: len(reached)]
    opened.page.fill("#question", "one")
    opened.page.press("#question", "Shift+Enter")
    assert opened.page.input_value("#question") == "one\n" and opened.page.locator(".turn").count() == 1
