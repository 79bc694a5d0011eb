"""Runs the tests of the NPU backend in an emulating process of their own."""

import re
import subprocess
import sys

import pytest

from emulator.activate import available
from tests.reference import REPO

FILES = sorted(path.name for path in (REPO / "tests" / "device" / "inside").glob("test_*.py"))


def run(file: str, *options: str, timeout_s: float = 1200) -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "tests.emulator.emulating", *options, f"tests/device/inside/{file}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-500:]


@pytest.mark.parametrize("file", FILES)
def test_npu_backend(file: str) -> None:
    run(file)


@pytest.mark.long
def test_every_recipe_at_its_true_size_in_ten_minutes() -> None:
    run("test_check.py", "-m", "long", timeout_s=600)
