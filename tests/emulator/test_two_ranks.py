"""Emulated ranks talk through whatever process group they have; here gloo."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from emulator.activate import available

ROOT = Path(__file__).resolve().parents[2]


def test_the_fused_product_reduces_over_its_group() -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.emulator.two_ranks", str(port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
