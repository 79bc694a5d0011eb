"""Runs the tests of the NPU backend in an emulating process of their own."""

import re
import subprocess
import sys

import pytest

from executor.emulator.activate import available
from tests.reference import REPO

FILES = sorted(path.name for path in (REPO / "tests" / "device" / "inside").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_npu_backend(file: str) -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "tests.emulator.emulating", f"tests/device/inside/{file}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-500:]
