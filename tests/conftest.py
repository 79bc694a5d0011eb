"""Before any test module is imported: transformers must find torchvision, or never will. And the order of the files."""

import gc
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests import torchvision_reference

# Files that take longest, longest first: a worker that came to one of them last would keep all others waiting.
LONGEST = (
    "tests/device/test_npu_engines.py",
    "tests/device/test_npu.py",
    "tests/parallel/test_emulated.py",
    "tests/test_readme.py",
    "tests/parallel/test_equality.py",
    "tests/parallel/test_spread.py",
    "tests/models/test_tiny.py",
    "tests/parallel/test_loading.py",
    "tests/emulator/test_inside.py",
    "tests/emulator/test_two_ranks.py",
    "tests/recipe/test_memory.py",
    "tests/launch/test_two_nodes.py",
    "tests/launch/test_one_node.py",
)


# Here and not in a hook: conftests of folders that are named on the command line are imported before any hook runs.
torchvision_reference.install()


def pytest_configure() -> None:
    # A command that a test runs in this process would begin the process anew to have it.
    os.environ.setdefault("GLIBC_TUNABLES", "")
    gc.set_threshold(20_000)  # torch and transformers are a million objects, and no garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Asked for by tests that compare with transformers' default processors."""
    reason = torchvision_reference.missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def msmodelslim(tmp_path_factory) -> Callable[[str], Path]:
    """A quantized folder of tests/msmodelslim by its name, complete and read-only by custom: it is shared."""
    from tests.msmodelslim.folders import unpack

    root = tmp_path_factory.mktemp("msmodelslim")
    return lru_cache(maxsize=None)(lambda name: unpack(name, root))
