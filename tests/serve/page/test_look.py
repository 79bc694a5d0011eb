"""How the chat page shows answers, and to whom: screen readers, keyboards, narrow and dark screens."""

import json
import re
from typing import Any

import pytest

from tests.serve.page.conftest import PICTURE, WORD, Open


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
    for plain in ("<img src=x onerror=alert(1)>", "![seen](http://example.com/x.png)", "2 * 3 * 4", "[link](java"):
        assert plain in text


def test_screen_readers_hear_sentences_once(visit: Open, scripted: Any) -> None:
    scripted(*re.findall(r"\S+ ?", "The sky is blue today. It will rain tonight. Take an umbrella with you"))
    opened = visit()
    opened.page.evaluate("""() => {
        window.heard = [];
        const hear = (change) => change.addedNodes.forEach((node) => heard.push(node.textContent));
        new MutationObserver((changes) => changes.forEach(hear))
            .observe(document.querySelector("#spoken"), { childList: true, subtree: true });
    }""")
    opened.ask("Weather?")
    heard = opened.page.evaluate("heard")
    assert heard[1:] == ["The sky is blue today.", "It will rain tonight.", "Take an umbrella with you"]
    assert opened.page.locator("#turns [aria-live], #turns [role=log], #turns[aria-live]").count() == 0


def test_a_page_that_everybody_can_use(visit: Open, scripted: Any) -> None:
    """axe-core's rules at 360 px, with an answer, a drawing, the settings and pictures in the tray; no side scroll."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    scripted(MARKDOWN, '\n{"bbox_2d": [100, 100, 500, 500], "label": "' + "a long label " * 5 + '"}', "\n" + "x" * 300)
    narrow = {"width": 360, "height": 740}
    opened = visit(viewport=narrow, color_scheme="light", bypass_csp=True, reduced_motion="reduce")
    opened.add(PICTURE, WORD)
    opened.ask("Where? " + "y" * 200)
    opened.page.locator(".mark").wait_for()
    opened.page.click("#show-settings")
    opened.add(PICTURE, WORD)
    assert opened.has_no_side_scroll()
    assert faults(axe.Axe().run(opened.page)) == []
    opened.page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert faults(axe.Axe().run(opened.page, options={"runOnly": ["color-contrast"]})) == []


def faults(result: Any) -> list[tuple[str, list[str]]]:
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in result.response["violations"]]


def test_colours_are_the_systems_until_others_are_chosen(visit: Open) -> None:
    opened = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = opened.page.evaluate(ground)
    opened.page.emulate_media(color_scheme="light")
    light = opened.page.evaluate(ground)
    assert [brightness(dark) < 50, brightness(light) > 200] == [True, True]
    opened.page.click("#theme")
    assert opened.page.evaluate(ground) == dark
    opened.page.reload()
    assert opened.page.evaluate(ground) == dark


def brightness(color: str) -> float:
    return sum(int(part) for part in re.findall(r"\d+", color)[:3]) / 3


def test_the_keyboard_reaches_everything_in_order(visit: Open, scripted: Any) -> None:
    scripted("yes")
    opened = visit()
    opened.ask("Well?")
    assert opened.page.evaluate("document.activeElement.id") == "question"
    names = ["new", "show-settings", "theme", "Regenerate", "Edit question", "Copy", "Copy as curl"]
    names += ["question", "choose", "send"]
    reached = []
    for _ in range(2 * len(names)):  # from the question on, over the end of the page, and around
        opened.page.keyboard.press("Tab")
        is_page, name, outline = opened.page.evaluate("""() => {
            const focused = document.activeElement;
            const outline = getComputedStyle(focused).outlineStyle;
            return [focused === document.body, focused.id || focused.textContent, outline];
        }""")
        if not is_page:
            reached.append(name)
            assert outline == "solid" or name == "question", f"{name} does not show that it has the focus"
    first = reached.index("new")
    assert reached[first : first + len(names)] == names
    opened.page.fill("#question", "one")
    opened.page.press("#question", "Shift+Enter")
    assert opened.page.input_value("#question") == "one\n" and opened.page.locator(".turn").count() == 1
