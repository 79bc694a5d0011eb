"""An engine's front door and its replica in another process, joined by a real socket."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import get_type_hints

import pytest

from executor.engine.totals import Totals
from executor.errors import UserError
from executor.schedule.request import Grammar, SamplingParams
from executor.serve import wire
from executor.serve.asks import Ask, ChatPrompt, Delta, Done, EngineStats, Failure, TextPrompt, TokenInfo, TokenPrompt
from executor.serve.gate import Front, Gate, Peer, call
from executor.serve.remote import RemoteBackend, attend
from tests.serve.fakes import DONE, FakeBackend, ask_of, taken

PARAMS = SamplingParams(
    max_new_tokens=7, temperature=0.5, stop=("\n", "é"), seed=2**63, logit_bias=((3, -math.inf), (4, 1.5)),
    allowed_token_ids=(1, 2), grammar=Grammar("regex", "a+"),
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "prompt",
    [
        ChatPrompt([{"role": "user", "content": [{"text": "ü\ud800"}]}], [TOOL], media_options={"fps": 2}),
        TextPrompt("a <image>", [{"type": "image", "image": "data:,"}]),
        TokenPrompt([1, 2, 3]),
    ],
    ids=["chat", "text", "tokens"],
)  # fmt: skip
def test_asks_travel_as_they_are(prompt: ChatPrompt | TextPrompt | TokenPrompt) -> None:
    ask = Ask("id", prompt, PARAMS, timeout_s=2.5, fits_exactly=True)
    assert wire.ask_from_tree(wire.unpack(wire.pack(wire.ask_to_tree(ask), has_long=True)[8:])) == ask


def test_long_texts_travel_beside_the_json() -> None:
    long, other = "\u00fc\ud800" * 20_000, "data:," + "A" * 100_000
    tree = {"a": [1, {"b": long, "c": [None, other, "short"]}], "\0": -math.inf}
    packed = wire.pack(tree, has_long=True)
    assert wire.unpack(packed[8:]) == tree
    assert int.from_bytes(packed[:8], "little") == len(packed) - 8
    assert len(packed) < len(long.encode("utf-8", "surrogatepass")) + len(other) + 200


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(UserError, match="prompt"):
        wire.ask_from_tree(wire.ask_to_tree(Ask("id", TextPrompt(["no text"]), PARAMS)))


def test_events_travel_as_they_are() -> None:
    token = TokenInfo(5, -0.25, ((5, -0.25), (6, -math.inf)))
    events = [
        (1, Delta(1, "é", (5, 6), 9, 4, (token, token), "stop", "x", None, (None, token))),
        (2, Delta(0, "", (), 9, finish_reason="error", error="why", is_own_fault=True)),
        (1, DONE),
        (3, Failure("late", "words")),
    ]
    assert wire.events_from_tree(wire.unpack(wire.pack(wire.events_to_tree(events))[8:])) == events


def counted(kind: type[Totals], number: float) -> Totals:
    """Of every field that number, whatever fields there are; halves where a number may be broken."""
    parts = {int: number, float: number + 0.5, tuple[int, ...]: (number, 0)}
    hints = get_type_hints(kind)
    return kind(**{name: parts[each] if each in parts else counted(each, number) for name, each in hints.items()})


def test_stats_travel_and_add_up_with_all_their_parts() -> None:
    stats = counted(EngineStats, 3)
    assert stats.stages.draft_s == 3.5 and stats.disk_cache.num_dropped == 3
    travelled = wire.stats_from_tree(wire.unpack(wire.pack(wire.stats_to_tree(stats))[8:]))
    assert travelled == stats
    assert travelled + stats == counted(EngineStats, 6) + counted(EngineStats, 0)


def joined(test: Callable[[RemoteBackend, FakeBackend, "asyncio.Task[None]", list[Peer]], Awaitable[None]]) -> None:
    """Runs `test` with a front door's backend, the leader's, the task that attends, and the front door's peers."""

    async def run() -> None:
        peers: list[Peer] = []
        remotes: asyncio.Queue[RemoteBackend] = asyncio.Queue()

        async def on_peer(peer: Peer) -> None:
            peers.append(peer)
            remote = RemoteBackend(peer, f"replica {peer.hello['number']}")
            remotes.put_nowait(remote)
            await remote.run()

        gate = await Gate.open("127.0.0.1", on_peer)
        backend = FakeBackend()
        peer = await call(Front.from_text(gate.front.to_text()), {"number": 3})
        attending = asyncio.ensure_future(attend(peer, backend))
        remote = await remotes.get()
        await test(remote, backend, attending, peers)
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)
        gate.close()

    asyncio.run(asyncio.wait_for(run(), 30))


async def until(found: Callable[[], object]) -> None:
    while not found():
        await asyncio.sleep(0.002)


def test_a_request_is_answered_and_a_step_is_one_message() -> None:
    async def test(remote, backend, attending, peers) -> None:
        big = "data:image/png;base64," + "A" * 3_000_000
        first, second = remote.ask(ask_of("a", "one", picture=big)), remote.ask(ask_of("b", "two"))
        assert remote.num_unfinished == 2
        await until(lambda: len(backend.feeds) == 2)
        assert backend.asked == [ask_of("a", "one", picture=big), ask_of("b", "two")]
        received, messages = peers[0].receive, []

        async def receive():
            messages.append(await received())
            return messages[-1]

        peers[0].receive = receive
        await until(lambda: remote.stats().num_running == 2)  # of now: `receive` is the new one from here on
        for request_id in "ab":
            backend.say(request_id, request_id.upper())
            backend.end(request_id)
        assert [type(event) async for event in first] == [Delta, Done]
        assert [event.text async for event in second if isinstance(event, Delta)] == ["B"]
        assert len([message for message in messages if "events" in message]) == 1
        assert remote.num_unfinished == 0

    joined(test)


def test_an_abort_and_a_refusal_travel() -> None:
    async def test(remote, backend, attending, peers) -> None:
        feed = remote.ask(ask_of("a"))
        await until(lambda: backend.feeds)
        feed.abort()
        await until(lambda: backend.aborted == ["a"])
        backend.end("a", Failure("aborted", "somebody"))
        assert [event async for event in feed] == [Failure("aborted", "somebody")]
        feed.abort()  # has ended: nothing happens
        refused = remote.ask(Ask("b", TextPrompt(["no text"]), SamplingParams()))
        assert (await refused.next()).kind == "refused"
        assert not attending.done()

    joined(test)


def test_a_fault_of_the_engine_reaches_the_front_door_with_its_reason() -> None:
    async def test(remote, backend, attending, peers) -> None:
        events = taken(remote.ask(ask_of("a")))
        await until(lambda: backend.feeds)
        backend.fault = "the device is gone"
        with pytest.raises(RuntimeError, match="the device is gone"):
            await attending
        await until(lambda: remote.fault)
        assert remote.fault == "replica 3 is lost: the device is gone"
        assert events == [Failure("lost", remote.fault)] and remote.num_unfinished == 0
        with pytest.raises(RuntimeError, match="takes no requests any more"):
            remote.ask(ask_of("b"))

    joined(test)


def test_a_broken_connection_is_seen_on_both_sides() -> None:
    async def test(remote, backend, attending, peers) -> None:
        events = taken(remote.ask(ask_of("a")))
        await until(lambda: backend.feeds)
        peers[0].close()
        with pytest.raises(RuntimeError, match="the front door is gone"):
            await attending
        await until(lambda: remote.fault)
        assert [event.kind for event in events] == ["lost"]

    joined(test)


def test_the_end_is_no_fault_of_the_leader() -> None:
    async def test(remote, backend, attending, peers) -> None:
        await remote.end()
        assert await attending is None

    joined(test)


@pytest.mark.parametrize("hello", [{"token": "x" * 64}, {}, ["token"], b"GET / HTTP/1.1\r\n\r\n"])
def test_nobody_comes_in_without_the_token(hello: object) -> None:
    async def run() -> None:
        came: list[Peer] = []

        async def on_peer(peer: Peer) -> None:
            came.append(peer)

        gate = await Gate.open("127.0.0.1", on_peer)
        reader, writer = await asyncio.open_connection(gate.front.address, gate.front.port)
        writer.write(hello if isinstance(hello, bytes) else wire.pack(hello))
        assert await reader.read() == b"" and not came
        writer.close()
        gate.close()

    asyncio.run(asyncio.wait_for(run(), 30))
