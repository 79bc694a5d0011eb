"""A pytest plugin that makes its process an emulating one: `pytest -p tests.emulator.emulating tests/emulator/inside`.

Emulation stays in a process for good (torch_npu patches torch), so these tests never share one with the others.
"""

import pytest
import torch

from emulator import chips
from emulator.activate import activate

A2, A3, DUO = chips.CHIPS
ALL = (A2, A3, DUO)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the tensors are small
    activate(A2)


@pytest.fixture
def a2() -> chips.Chip:
    return activate(A2)


@pytest.fixture
def a3() -> chips.Chip:
    return activate(A3)


@pytest.fixture
def duo() -> chips.Chip:
    return activate(DUO)
