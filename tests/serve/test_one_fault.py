"""One request's fault is that request's answer alone: the streams beside it are as they are without it."""

import base64
import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.conftest import Running
from tests.serve.test_life import CHAT, asked

MARK = "broken"
NUM_TOKENS = 24


def answer(server: Running, word: str) -> str:
    """A streamed answer, whole."""
    body = {**asked(NUM_TOKENS), "messages": [{"role": "user", "content": f"What is {word}?"}]}
    with httpx.Client(base_url=server.url, timeout=60) as http, http.stream("POST", CHAT, json=body) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1])


def not_finite(server: Running, patch: pytest.MonkeyPatch) -> None:
    """The model's logits of a marked request are no numbers."""
    forward = server.engine.runner.forward

    def broken(plan):
        logits = forward(plan).clone()
        rows = [row for row in plan.rows if row.max_yield]
        for number, row in enumerate(rows):
            if MARK in row.request.prompt.text and row.request.output_token_ids:
                logits[number] = math.nan
        return logits

    patch.setattr(server.engine.runner, "forward", broken)


def step_raises(server: Running, patch: pytest.MonkeyPatch) -> None:
    """Every step with a marked request in it fails, and is computed again row by row."""
    forward = server.engine.runner.forward

    def broken(plan):
        if any(MARK in row.request.prompt.text for row in plan.rows):
            raise RuntimeError("a kernel refuses")
        return forward(plan)

    patch.setattr(server.engine.runner, "forward", broken)


def building_raises(server: Running, patch: pytest.MonkeyPatch) -> None:
    build = server.engine.processor.build

    def broken(messages, **options):
        if MARK in str(messages):
            raise ZeroDivisionError("a defect")
        return build(messages, **options)

    patch.setattr(server.engine.processor, "build", broken)


def nothing(server: Running, patch: pytest.MonkeyPatch) -> None: ...


CUT_PICTURE = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
PICTURE = [{"type": "image_url", "image_url": {"url": CUT_PICTURE}}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize(
    ("breaks", "content", "status", "words"),
    [
        (not_finite, MARK, 500, "not finite"),
        (step_raises, MARK, 500, "its step failed: RuntimeError: a kernel refuses"),
        (building_raises, MARK, 500, "ZeroDivisionError: a defect"),
        (nothing, PICTURE, 400, "damaged"),
    ],
)
def test_the_others_answers_stay(server: Running, monkeypatch, breaks, content, status: int, words: str) -> None:
    wanted = [answer(server, word) for word in ("red", "green", "blue")]
    breaks(server, monkeypatch)
    bad = {**asked(NUM_TOKENS), "messages": [{"role": "user", "content": content}], "stream": False}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(answer, server, word) for word in ("red", "green", "blue")]
        replies = [server.http.post(CHAT, json=bad) for _ in range(2)]
        assert [other.result() for other in others] == wanted
    for reply in replies:
        assert reply.status_code == status and words in reply.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200
    assert not server.engine.has_work
    server.engine.scheduler.check()
