"""Runs the tests of `inside/` in one emulating process of their own."""

import pytest

from emulator.activate import available
from tests.emulator.apart import run_apart


def test_emulated_ops() -> None:
    if reason := available():
        pytest.skip(reason)
    found = run_apart("tests/emulator/inside", timeout_s=900)
    for outcome in found.values():
        outcome.check()
    assert sum(outcome.num_passed for outcome in found.values()) > 100
