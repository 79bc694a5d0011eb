"""Asking on the chat page: the same answers as the API's; stopped, asked again, changed, copied; what goes wrong."""

import base64
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.page.conftest import CLIP, CLIPBOARD, PICTURE, WORD, Open, message, run_curl

LOCATE = "Locate the blue square."


def api_reply(server: Running, *messages: dict[str, Any]) -> dict[str, Any]:
    return server.http.post("/v1/chat/completions", json={"messages": list(messages)}).json()


def api_answer(server: Running, *messages: dict[str, Any]) -> str:
    return api_reply(server, *messages)["choices"][0]["message"]["content"]


def test_answers_are_the_apis_and_the_conversation_goes_on(visit: Open, server: Running) -> None:
    opened = visit()
    opened.add(PICTURE)
    opened.ask(LOCATE)
    first = message(LOCATE, PICTURE)
    expected = api_answer(server, first)
    assert opened.answers() == [expected]
    opened.ask("Count the objects.")
    said = {"role": "assistant", "content": expected}
    assert opened.answers()[1] == api_answer(server, first, said, message("Count the objects."))
    figures = opened.page.locator(".figures").all_inner_texts()
    told = re.fullmatch(r"TTFT [\d.]+ m?s · TPOT [\d.]+ m?s · (\d+) prompt tokens · (\d+) output tokens", figures[0])
    usage = api_reply(server, first)["usage"]
    assert told and [int(told[1]), int(told[2])] == [usage["prompt_tokens"], usage["completion_tokens"]]

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
    opened.page.locator("#send").wait_for(state="visible")
    deadline_s = time.monotonic() + 30
    while not backend.num_aborted and time.monotonic() < deadline_s:  # until the server sees that the client has left
        time.sleep(0.01)
    assert backend.num_aborted == 1 and opened.answers() == ["One. Two"]
    backend = scripted("Four.")
    opened.ask("Go on.")
    assert [m["content"] for m in backend.asks[0].prompt.messages] == ["Count.", "One. Two", "Go on."]


def wait_for_answer(opened: Any, backend: Any, number: int) -> None:
    """Until the server was asked `number` times and the page takes the next question."""
    deadline = time.monotonic() + 30
    while len(backend.asks) < number:
        assert time.monotonic() < deadline, f"{len(backend.asks)} questions came, not {number}"
        opened.page.wait_for_timeout(20)
    opened.page.locator("#send").wait_for(state="visible")


def test_the_last_question_is_asked_again_and_changed(visit: Open, scripted: Any) -> None:
    backend, opened = scripted("yes"), visit()
    opened.ask("first")
    opened.add(WORD)
    opened.ask("second")
    opened.page.get_by_role("button", name="Regenerate").click()
    wait_for_answer(opened, backend, 3)
    assert backend.asks[2].prompt == backend.asks[1].prompt
    opened.page.get_by_role("button", name="Edit question").click()
    assert opened.page.input_value("#question") == "second" and opened.page.locator("#media li").count() == 1
    opened.page.fill("#question", "changed")
    opened.page.press("#question", "Enter")
    wait_for_answer(opened, backend, 4)
    told = [m["content"] for m in backend.asks[3].prompt.messages]
    assert told == ["first", "yes", message("changed", WORD)["content"]] and opened.page.locator(".turn").count() == 2
    opened.page.click("#new")
    assert opened.page.locator(".turn").count() == 0
    opened.page.get_by_role("button", name="Bring the last one back").click()
    assert opened.page.locator(".turn").count() == 2


def test_settings_go_with_the_question(visit: Open, scripted: Any, server: Running) -> None:
    backend, opened = scripted("yes"), visit()
    opened.page.click("#show-settings")
    opened.page.fill("#system", "Be brief.")
    opened.page.fill("#temperature", "0.5")
    most = server.service.recipe.generation.max_new_tokens
    shown = opened.page.locator("#max-tokens").get_attribute("placeholder")
    assert shown == ("As many as fit" if most is None else str(most))
    opened.page.fill("#max-tokens", "9")
    opened.ask("Well?")
    ask = backend.asks[0]
    assert (ask.params.temperature, ask.params.max_new_tokens) == (0.5, 9)
    assert ask.prompt.messages[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("num_bytes", [0, 60_000])
def test_the_curl_command_runs_as_it_stands(visit: Open, server: Running, tmp_path: Path, num_bytes: int) -> None:
    """A small picture stands in the command, a large one is read from its file."""
    picture = tmp_path / "it's a picture.png"
    picture.write_bytes(PICTURE.read_bytes() + b"\0" * num_bytes)  # what follows a PNG's end is left
    opened = visit(permissions=CLIPBOARD)
    opened.add(picture)
    opened.ask('What color is the square? It\'s `$HOME` \\ "here"\n!')
    command = opened.copied_curl()
    assert len(command) < 4_000
    reply = run_curl(command, tmp_path)
    assert reply["choices"][0]["message"]["content"] == opened.answers()[0]


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


def test_a_bad_picture_is_named_by_its_file(visit: Open, tmp_path: Path) -> None:
    bad = tmp_path / "broken one.png"
    bad.write_bytes(b"no picture")
    opened = visit(allowed="400")
    opened.page.click("#show-settings")
    opened.page.fill("#system", "Be brief.")
    opened.add(PICTURE, bad)
    opened.ask("What is it?")
    words = opened.page.locator(".fault.error p").first.inner_text()
    assert words.startswith("“broken one.png”: ") and "essages[" not in words


def test_a_burst_of_tokens_has_no_time_per_token(visit: Open, scripted: Any) -> None:
    scripted(*"0123456789")
    opened = visit()
    opened.ask("Count.")
    assert opened.answers() == ["0123456789"]
    figures = opened.page.locator(".figures").inner_text()
    assert "TTFT" in figures and "10 output tokens" in figures and "TPOT" not in figures


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (None, "The server cannot be reached. Is it still running?"),
        ({"status": 502, "body": "<html>"}, "The server answered 502 Bad Gateway"),
        (
            {"status": 503, "headers": {"Retry-After": "3"}, "json": {"error": {"message": "8 requests wait"}}},
            "The server is busy: 8 requests wait. Try again in 3 s.",
        ),
        ({"body": 'data: {"choices": []}\n\n'}, "The connection was closed before the answer was whole."),
        ({"body": "data: {\n\n"}, "The connection broke before the answer was whole."),
    ],
)
def test_a_server_that_does_not_answer_is_told_of(visit: Open, reply: dict[str, Any] | None, words: str) -> None:
    opened = visit(allowed="Failed to load resource")
    opened.page.get_by_role("heading", name="qwen3_vl").wait_for()
    opened.page.route("**/v1/**", lambda route: route.abort() if reply is None else route.fulfill(**reply))
    opened.ask("Anybody?")
    assert opened.page.locator(".fault.error p").first.inner_text() == words
