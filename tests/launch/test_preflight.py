"""What nodes tell each other before they start, over a store in this process: threads are the nodes."""

import threading
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from executor.errors import UserError
from executor.launch.preflight import PROBLEM, Card, agree, exchange, take_place

NAMES = ["node 10.0.0.1", "node 10.0.0.2", "node 10.0.0.3"]
CARD = Card(NAMES[0], "generate", "c0de" * 16, {"model_config": {"dtype": "bfloat16"}, "data_config": {"fps": None}})


def cards(**changes):
    """Three nodes, the last of which is different."""
    return [replace(CARD, name=name, **(changes if name == NAMES[2] else {})) for name in NAMES]


def meet(nodes, layouts=None, timeout_s=5.0):
    """What each node got: cards or its UserError."""
    store, got = HashStore(), [None] * len(nodes)

    def node(index):
        try:
            take_place(store, index, NAMES, (layouts or ["alike"] * 3)[index])
            got[index] = exchange(store, index, NAMES, lambda: nodes[index], timeout_s=timeout_s)
            agree(got[index])
        except UserError as error:
            got[index] = str(error)

    threads = [threading.Thread(target=node, args=(index,)) for index, card in enumerate(nodes) if card]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_alike():
    assert meet(cards()) == [cards()] * 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"code": "f00d" * 16}, "node 10.0.0.3 runs other code than node 10.0.0.1 (f00df00df00d, c0dec0dec0de)"),
        ({"command": "bench"}, "node 10.0.0.3 was told to bench, node 10.0.0.1 to generate"),
        (
            {"recipe": {"model_config": {"dtype": "float16"}, "data_config": {"fps": 2}}},
            "another recipe than node 10.0.0.1: model_config.dtype is float16 there, bfloat16 on node 10.0.0.1 and",
        ),
        ({"problem": "model_config.model_path: no weights"}, "on node 10.0.0.3: model_config.model_path: no weights"),
    ],
)
def test_a_node_that_is_not(changes, words):
    """Every node ends with the same words, in one line."""
    got = meet(cards(**changes))
    assert words in got[0] and got == [got[0]] * 3 and "\n" not in got[0]


def test_ranks_that_look_at_the_same_files_need_not_tell_their_recipe():
    agree(cards(recipe=None))


def test_nodes_that_do_not_agree_on_the_nodes_do_not_wait():
    got = meet(cards(), ["2 nodes: a, b", "2 nodes: a, b", "3 nodes: a, b, c"], timeout_s=60)
    assert all("the nodes do not agree on the job" in words and "3 nodes: a, b, c" in words for words in got)


def test_a_node_that_does_not_come():
    got = meet([*cards()[:2], None], timeout_s=0.3)
    assert got[0] == got[1] == "node 10.0.0.3 did not join within 0 s: type the same command there"


def test_someone_who_says_that_it_cannot_come():
    store = HashStore()
    store.set(PROBLEM, "this machine is not among the nodes")
    with pytest.raises(UserError, match="this machine is not among the nodes"):
        exchange(store, 0, NAMES, lambda: CARD)


def test_a_place_that_is_taken():
    store = HashStore()
    take_place(store, 1, NAMES, "alike")
    with pytest.raises(UserError, match="node 10.0.0.2 has joined this job before"):
        take_place(store, 1, NAMES, "alike")
