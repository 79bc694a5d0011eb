"""What the nodes tell each other before any rank starts: the same nodes, code, recipe and command, weights everywhere.

Under another launcher every rank takes part, with us every node's launcher: a member has an index and a name.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from torch.distributed import Store

from executor.errors import UserError
from executor.launch.layout import Layout
from executor.launch.store import BROKEN, JOIN_S, connect, wait_for

PROBLEM = "problem"
"""The key under which someone who cannot take part in the job says why. Of no effect once the job has started: it may
be someone who has taken a running job for his own."""


RIVAL_S = 1.0
"""Between two looks for another master."""


@dataclass(frozen=True)
class Card:
    """One member as it presents itself."""

    name: str
    command: str
    code: str
    recipe: dict[str, Any] | None
    """Settled, as recipe.settle.prepare returns it. None: the member looks at the same files as one that tells."""
    problem: str = ""
    """What keeps it from starting, in words for the user: no weights ..."""


def take_place(store: Store, index: int, names: list[str], layout: str) -> None:
    """Enter the job. UserError where this place is taken, or where the first who came has another `layout`.

    The layout is how a member sees the job's nodes, in words: who waits for others must wait for the right ones. The
    others are told, as one of them may be the one who is wrong.
    """
    first = store.compare_set("layout", "", layout).decode()
    if first != layout:
        raise _disagreement(store, names[index], layout, first)
    if store.add(f"joined/{index}", 1) > 1:
        raise UserError(
            f"{names[index]} has joined this job before: an earlier job still runs on the master {names[0]}; end it "
            "(Ctrl-C there), or set MASTER_PORT to another port on every node"
        )


def check_rival(store: Store, name: str, layout: str) -> None:
    """UserError, there too, where `store` is that of another node which takes itself for the master."""
    if store.check(["layout"]):
        theirs = store.get("layout").decode()
        if theirs != layout:
            raise _disagreement(store, name, layout, theirs)


def _disagreement(store: Store, name: str, layout: str, other: str) -> UserError:
    words = (
        f"the nodes do not agree on the job: {name} has {layout}, another node {other}; give every node the same YAML, "
        "--set, IPs in executor/scripts/set_env.sh and ASCEND_RT_VISIBLE_DEVICES, and end an earlier job that may "
        "still run there"
    )
    store.set(PROBLEM, words)
    return UserError(words)


def exchange(
    store: Store,
    index: int,
    names: list[str],
    make_card: Callable[[], Card],
    meanwhile: Callable[[list[int]], object] = lambda missing: None,
    timeout_s: float = JOIN_S,
) -> list[Card]:
    """Meet the others, then show one's own card and read everyone's.

    `make_card` may take long (a download of weights), so it comes after the meeting, and its end is awaited without
    limit. `meanwhile` often gets the indices of those who are not there yet. UserError for those who do not come, and
    for those who say that they cannot.
    """

    def indices(keys: list[str]) -> list[int]:
        return [int(key.split("/")[1]) for key in keys]

    def listed(keys: list[str]) -> str:
        return ", ".join(names[other] for other in indices(keys))

    def keys(stage: str) -> list[str]:
        return [f"{stage}/{other}" for other in range(len(names))]

    def heed_problem(*_: object) -> None:
        if store.check([PROBLEM]):
            raise UserError(store.get(PROBLEM).decode())

    store.set(f"here/{index}", "yes")
    advice = "type the same command there"
    missing = wait_for(
        store,
        keys("here"),
        timeout_s,
        remind=lambda keys: f"waiting for {listed(keys)}: {advice}",
        meanwhile=lambda keys: (heed_problem(), meanwhile(indices(keys))),
    )
    if missing:
        raise UserError(f"{listed(missing)} did not join within {timeout_s:.0f} s: {advice}")
    store.set(f"card/{index}", json.dumps(asdict(make_card())))
    busy = "busy with checks or a download"
    wait_for(store, keys("card"), inf, lambda keys: f"waiting for {listed(keys)}: {busy}", heed_problem)
    return [Card(**json.loads(store.get(key))) for key in keys("card")]


def agree(cards: list[Card]) -> None:
    """UserError for the first thing that keeps the job from starting, naming the member."""
    for card in cards:
        if card.problem:
            where = f"on {card.name}: " if len(cards) > 1 else ""
            raise UserError(where + card.problem)
    first = cards[0]
    for card in cards[1:]:
        if card.code != first.code:
            raise UserError(
                f"{card.name} runs other code than {first.name} ({card.code[:12]}, {first.code[:12]}): copy the same "
                "version of this repository to every node"
            )
        if card.command != first.command:
            raise UserError(
                f"{card.name} was told to {card.command}, {first.name} to {first.command}: type one command"
            )
        differences = _differences(first.recipe or {}, card.recipe) if card.recipe is not None else []
        if differences:
            key, ours, theirs = differences[0]
            more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise UserError(
                f"{card.name} has another recipe than {first.name}: {key} is {theirs} there, {ours} on {first.name}"
                f"{more}; give every node the same YAML, the same --set and the same checkpoint"
            )


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(section.key, our value, their value) where two recipes differ."""
    return [
        (f"{section}.{key}", ours[section].get(key), theirs[section].get(key))
        for section in ours
        for key in sorted(ours[section].keys() | theirs[section].keys())
        if ours[section].get(key) != theirs[section].get(key)
    ]


class Rivals:
    """Looks, while the master waits, whether another node takes itself for the master: IPs in another order there.

    Both would wait for each other until they give up.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._looked_at = 0.0

    def __call__(self, missing: list[int]) -> None:
        """UserError, there too, when one of the missing nodes is one."""
        if time.monotonic() - self._looked_at < RIVAL_S:
            return
        self._looked_at = time.monotonic()
        for address in (self._layout.addresses[node] for node in missing):
            try:
                with socket.create_connection((address, self._layout.port), timeout=0.5):
                    pass
                rival = connect(address, self._layout.port)
                check_rival(rival, f"node {self._layout.master}", self._layout.in_words)
            except BROKEN:
                continue  # nobody there, or something that is no store
