"""Bodies that do not fit together into the memory that they may take wait unread; small ones go on."""

import asyncio
import json
import random

import pytest

from executor.serve.room import FREE_BYTES, Body, Room
from tests.serve.conftest import Running, start
from tests.serve.test_connection import connected, reply_on
from tests.serve.test_life import CHAT, asked, until

PIECE = FREE_BYTES + 1


def test_all_bodies_come_to_their_end_within_the_bound() -> None:
    """Bodies of many sizes, half of which are given up at some moment: none waits for good, and nothing is kept."""
    rng = random.Random(0)

    async def read(room: Room, num_pieces: int) -> None:
        body = Body()
        try:
            for number in range(num_pieces):
                await room.wait(body)
                await asyncio.sleep(rng.random() / 1000)
                room.add(body, PIECE, is_last=number + 1 == num_pieces)
                most[0] = max(most[0], room.num_bytes)
            await asyncio.sleep(rng.random() / 500)
        finally:
            room.leave(body)

    async def run() -> Room:
        room = Room(4 * PIECE)
        tasks = [asyncio.ensure_future(read(room, rng.randrange(1, 12))) for _ in range(40)]
        for task in tasks[::2]:
            asyncio.get_running_loop().call_later(rng.random() / 20, task.cancel)
        async with asyncio.timeout(20):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None for end in ends[1::2])
        return room

    most = [0]
    room = asyncio.run(run())
    assert room.num_bytes == 0 and not room._reading and not room._waiting
    assert most[0] <= (4 + 12 + 40) * PIECE  # the bound, the oldest one, and a piece of each


@pytest.fixture
def narrow(tiny_engine):
    """A server with room for hardly more than one large body."""
    with start(tiny_engine, max_held_body_bytes=300_000) as running:
        yield running


def test_a_large_body_waits_for_room_and_a_small_one_does_not(narrow: Running) -> None:
    padded = json.dumps({**asked(2), "stream": False, "user": "x" * 4_000_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(padded)}\r\n\r\n".encode()
    with connected(narrow) as first, connected(narrow) as second:
        first.sendall(head + padded[:3_000_000])
        second.setblocking(False)
        rest = head + padded

        def is_stuck() -> bool:
            """The server reads no more of it, and what lies between is full."""
            nonlocal rest
            try:
                rest = rest[second.send(rest) :]
            except BlockingIOError:
                return True
            return not rest

        until(is_stuck)
        assert narrow.http.post(CHAT, json={**asked(1), "stream": False}).status_code == 200
        first.sendall(padded[3_000_000:])
        assert reply_on(first)[0] == 200
        second.settimeout(20)
        second.sendall(rest)
        assert reply_on(second)[0] == 200
