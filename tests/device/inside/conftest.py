"""These tests run in an emulating process only (see tests/device/test_npu.py), and are collected there only."""

from typing import Any

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.pluginmanager.hasplugin("tests.emulator.emulating") else True


@pytest.fixture
def acl_updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Of each ACL graph that is made while a test runs: its kernels that a replay updates, and which arguments of them.

    As far as the capture, which is the chip's.
    """
    import torchair._acl_concrete_graph.acl_graph as acl
    from torchair._acl_concrete_graph import fx2acl_converter, graph_pass

    seen: list[tuple[Any, dict[str, Any]]] = []
    name = "get_updated_ops_rulers_param"
    plain = getattr(acl, name)

    def noted(*given: Any) -> tuple[Any, dict[str, Any]]:
        seen.append(plain(*given))
        return seen[-1]

    for module in (acl, fx2acl_converter, graph_pass):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, noted)
    return seen
