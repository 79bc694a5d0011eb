"""What every peer's process does: load the checkpoint, answer what is asked, and print the times.

    PYTHON -m tests.benchmarks.peers.NAME FOLDER --form FORM --parts decode_1,picture --steps 24

FOLDER is one that `checkpoint.make` wrote. A peer answers prompts greedily and calls `tick(n)` whenever a step has
brought n tokens (0: a part of the prompts). A decode step is the time between two ticks, counted when both brought a
token of every prompt; a prefill is the time from the prompts to the first token, preprocessing of pictures included.
Nothing is cached between answers, since no prompt and no picture is asked twice. Asserts that exactly the tokens that
were asked for came, and that prompts are as long as in every other peer.
Runs in environments of other engines: standard library only. The last line of stdout is JSON.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DECODES = {"decode_1": 1, "decode_8": 8}  # prompts that are answered together
PREFILLS = ("text", "picture")
PARTS = (*DECODES, *PREFILLS)
LONG_S = 30
MAX_LENGTH = 1536  # tokens of a prompt and its answer

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """One prompt: as a user's message, as text behind the chat template, and as tokens."""

    message: str
    prompt: str
    token_ids: list[int]  # a picture is one placeholder
    num_tokens: int
    picture: str | None = None  # path of a PNG


class Peer(Protocol):
    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        """Answer all questions together with exactly `num_tokens` tokens each; the lengths of the prompts."""
        ...


def measure(open_peer: Callable[[Path, str], Peer], packages: tuple[str, ...]) -> None:
    """Run this process's peer as the command line says. `packages`: whose versions are told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", required=True)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turn", type=int, default=0, help="which of the prompts: others in every process")
    parser.add_argument("--realtime", action="store_true")
    args = parser.parse_args()
    if args.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # threads take it over from the one that starts them
    asked = json.loads((args.folder / "questions.json").read_text())
    begin = time.perf_counter()
    peer = open_peer(args.folder, args.form)
    report = {"load_s": round(time.perf_counter() - begin, 1), "threads": len(os.sched_getaffinity(0))}
    report["versions"] = {name: importlib.metadata.version(name) for name in packages}
    for part in args.parts:
        questions = [Question(**each) for each in asked[part]]
        count = DECODES.get(part, 1)
        warm, timed = questions[:count], questions[count * (1 + args.turn) : count * (2 + args.turn)]
        if part in DECODES:
            timed_answer(peer, warm, 3)
            report[part] = timed_answer(peer, timed, args.steps + 1)[1]
        else:
            report[part] = [timed_answer(peer, timed, 1)[0]]
            if report[part][0] < LONG_S:  # else no warm-up matters
                report[part] = [timed_answer(peer, warm, 1)[0]]
    report["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    print(json.dumps(report), flush=True)


def timed_answer(peer: Peer, questions: list[Question], num_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each decode step."""
    ticks: list[tuple[float, int]] = []
    begin = time.perf_counter()
    lengths = peer.answer(questions, num_tokens, lambda n: ticks.append((time.perf_counter(), n)))
    assert sum(n for _, n in ticks) == len(questions) * num_tokens, [n for _, n in ticks]
    assert lengths == [each.num_tokens for each in questions], (lengths, [each.num_tokens for each in questions])
    first = next(at for at, n in ticks if n)
    steps = [
        after - before for (before, n), (after, m) in zip(ticks, ticks[1:], strict=False) if n == m == len(questions)
    ]
    return first - begin, steps
