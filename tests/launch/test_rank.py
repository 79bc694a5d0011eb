"""What a rank leaves for its launcher, over a store in this process."""

import pytest
from torch.distributed import HashStore

from executor.launch.rank import Rank, outcome_of


@pytest.fixture
def rank(monkeypatch):
    """Rank 1 of 2 under this project's launcher, its store at hand."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    joined = Rank({}, has_launcher=True)
    joined._store = HashStore()
    return joined


def test_a_result_whatever_its_status_is_a_rank_that_ended_well(rank, capsys):
    document = {"command": "generate", "failed": 3}
    assert rank.finish(document, 2, failed=False) == 0
    assert outcome_of(rank._store, 1) == {"document": document, "status": 2, "error": None}
    assert outcome_of(rank._store, 0) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("status", [1, 2])
def test_what_was_raised_is_a_rank_that_failed(rank, status):
    assert rank.finish({"error": "mend this"}, status, failed=True) == status
    assert outcome_of(rank._store, 1)["error"] == "mend this"
    assert outcome_of(rank._store, 1)["is_first"] is True


def test_only_the_first_to_fail_is_the_first(rank):
    rank._store.compare_set("first_failed", "", "0")
    rank.finish({"error": "Connection closed by peer"}, 1, failed=True)
    assert outcome_of(rank._store, 1)["is_first"] is False
