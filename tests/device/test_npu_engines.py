"""Runs the tests of engines on emulated chips in one emulating process."""

import pytest

from emulator.activate import available
from tests.device.test_npu import ENGINES
from tests.emulator.apart import Outcome, run_apart


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    if reason := available():
        pytest.skip(reason)
    return run_apart(*(f"tests/device/inside/{file}" for file in ENGINES))


@pytest.mark.parametrize("file", ENGINES)
def test_npu_backend(file: str, outcomes) -> None:
    outcomes[file].check()
