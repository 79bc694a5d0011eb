"""These tests run in an emulating process only (see tests/capacity/test_kernels.py), and are collected there only."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.pluginmanager.hasplugin("tests.emulator.emulating") else True
