"""Runs the tests of the NPU backend's calls, and of graphs at true sizes, in one emulating process.

Engines on emulated chips: test_npu_engines.py. Apart from each other, two workers share the work.
"""

import pytest

from emulator.activate import available
from tests.emulator.apart import Outcome, run_apart
from tests.reference import REPO

INSIDE = REPO / "tests" / "device" / "inside"
ENGINES = ("test_generation.py", "test_graph.py", "test_trained.py", "test_int8_engines.py")
RECIPES = "test_every_recipe_at_its_true_size"
FILES = sorted({path.name for path in INSIDE.glob("test_*.py")} - set(ENGINES))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    if reason := available():
        pytest.skip(reason)
    return run_apart(*(f"tests/device/inside/{file}" for file in FILES))


@pytest.mark.parametrize("file", FILES)
def test_npu_backend(file: str, outcomes) -> None:
    outcomes[file].check()


@pytest.mark.long
def test_every_recipe_at_its_true_size_in_ten_minutes() -> None:
    if reason := available():
        pytest.skip(reason)
    options = "-m", "long", "-k", RECIPES
    found = run_apart("tests/device/inside/test_check.py", options=options, timeout_s=600)
    found["test_check.py"].check(least=10)


@pytest.mark.long
def test_all_families_chips_and_forms() -> None:
    """What the tests above leave out of their matrices."""
    if reason := available():
        pytest.skip(reason)
    found = run_apart("tests/device/inside", options=("-m", "long", "-k", f"not {RECIPES}"), timeout_s=3600)
    for outcome in found.values():
        outcome.check()
