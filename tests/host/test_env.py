"""Paths as users write them."""

from pathlib import Path

from executor.host.env import find_path


def test_the_home_of_nobody_is_a_name_like_any_other() -> None:
    assert find_path("~nobody_at_all/x.json") == Path("~nobody_at_all/x.json")
