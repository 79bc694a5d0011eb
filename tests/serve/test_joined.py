"""Several requests of one HTTP request: taken together or not at all, told as one, let go together."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from executor.engine.loop import QueueFull
from executor.serve.anthropic import messages
from executor.serve.asks import Ask, Delta, Done, Failure, TextPrompt
from executor.serve.blocks import BlockAnswer
from executor.serve.errors import ApiError
from executor.serve.feed import Feed, Joined
from executor.serve.mindie import generate
from executor.serve.openai import responses
from executor.serve.openai.response_output import ResponseWriter
from executor.serve.parser import AnswerParser
from executor.serve.service import Service
from tests.serve.conftest import Running

DONE = Done(1, 0, 0, 1, 0.0, 0.0, 0.0, 0.0, ("stop",))


def delta(text: str) -> Delta:
    return Delta(0, text, (1,), 3)


def test_events_come_in_their_order_whatever_waited_before() -> None:
    async def read() -> list[tuple[int, Any]]:
        feeds = [Feed(), Feed()]
        feeds[1].push(delta("b"))
        joined = Joined(feeds)
        reader = asyncio.ensure_future(_all(joined))
        await asyncio.sleep(0)
        for feed, event in ((0, delta("a")), (1, DONE), (0, delta("c")), (0, Failure("fault", "broken"))):
            feeds[feed].push(event)
            await asyncio.sleep(0)
        return await reader

    events = asyncio.run(read())
    assert [index for index, _ in events] == [1, 0, 1, 0, 0]
    assert [getattr(event, "text", "") for _, event in events] == ["b", "a", "", "c", ""]


async def _all(joined: Joined) -> list[tuple[int, Any]]:
    return [event async for event in joined]


def test_a_full_queue_takes_none_of_them(server: Running) -> None:
    taken: list[str] = []

    class Backend:
        fault, num_unfinished = None, 0

        def ask(self, ask: Ask) -> Feed:
            if len(taken) == 2:
                raise QueueFull("2 requests are unfinished")
            taken.append(ask.id)
            return Feed(abort=lambda: taken.append(f"let go {ask.id}"))

    real = server.service
    service = Service(real.recipe, real.processor, real.vocab_size, Backend(), is_ready=True)
    asks = [Ask(str(number), TextPrompt("a"), None) for number in range(3)]
    with pytest.raises(ApiError) as caught:
        service.ask_all(asks)
    assert caught.value.status == 503 and taken == ["0", "1", "let go 0", "let go 1"]


def test_a_client_that_hangs_up_lets_all_prompts_go(server: Running) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    for _ in range(5):  # on a busy machine this thread may wait until all has been answered
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
            num_unfinished = server.service.backend.num_unfinished
        if num_unfinished:
            break
    assert num_unfinished == 3
    until_s = time.monotonic() + 10
    while server.service.backend.num_unfinished and time.monotonic() < until_s:
        time.sleep(0.01)
    assert server.service.backend.num_unfinished == 0


@pytest.mark.parametrize("route", ["responses", "messages", "generate"])
def test_a_failure_after_the_first_text_is_told_in_the_routes_form(route: str) -> None:
    answer = BlockAnswer(AnswerParser())
    feed = Feed()
    feed.push(delta("a"))
    feed.push(Failure("fault", "the engine has ended"))
    if route == "responses":
        writer = ResponseWriter({"id": "resp_1"}, answer, lambda token_id: b"")
        job = SimpleNamespace(writer=writer, answer=answer)
        lines, write_error = responses.events(feed, job, None, None), responses._error_of(writer)
        expected = ('event: error\ndata: {"type":"error","sequence_number":', '"message":"the engine has ended"')
    elif route == "messages":
        lines = messages.events(feed, answer, messages.MessageWriter({"id": "msg_1"}, answer))
        write_error = messages._error
        expected = ('event: error\ndata: {"type":"error","error":{"type":"api_error"', '"the engine has ended"}}\n\n')
    else:
        lines, write_error = generate.objects(feed, 1), generate._error
        expected = ('{"error":{"message":"the engine has ended"', "}}\0")

    async def read() -> tuple[list[str], ApiError]:
        told = []
        with pytest.raises(ApiError) as caught:
            async for line in lines:
                told.append(line)
        return told, caught.value

    told, error = asyncio.run(read())
    assert len(told) == 1 and '"a"' in told[0] and error.status == 500
    text = write_error(error)
    assert all(part in text for part in expected)
