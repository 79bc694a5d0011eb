"""Runs the tests of `inside/` in one emulating process of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.activate import available

ROOT = Path(__file__).resolve().parents[2]


def test_emulated_ops() -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-p", "tests.emulator.emulating", "tests/emulator/inside"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-3000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-500:]
