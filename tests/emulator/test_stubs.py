"""What the emulator says when it cannot start, and that it leaves the normal environment alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from emulator import stubs
from emulator.activate import activate, available
from executor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_missing_wheel_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stubs, "cache_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"pip install --no-deps --target .*torch_npu==2\.13\.0"):
        stubs.require_wheel()


def test_a_wheel_that_pip_cannot_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stubs, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(stubs, "install_command", lambda folder=None: ["install", "--no-index", "torch_npu==0.0"])
    with pytest.raises(UserError, match="pip could not fetch it"):
        stubs.require_wheel(install=True)


@pytest.mark.parametrize("tool", ["gcc", "nm"])
def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.setattr(stubs, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(stubs.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    with pytest.raises(UserError, match=f"{tool} is not on this machine"):
        stubs.build(stubs.Wheel(tmp_path, "2.13.0"))


def test_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "torch_npu" / "torch_npu" / "lib" / "libtorch_npu.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "torch_npu" / "torch_npu-1.2.3.dist-info").mkdir()
    monkeypatch.setattr(stubs, "cache_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=r"torch_npu 1\.2\.3 needs torch 1\.2"):
        stubs.require_wheel()


def test_an_unknown_chip_is_named() -> None:
    with pytest.raises(UserError, match=r"got 'atlas_800_a2'.*did you mean 'atlas_800i_a2'"):
        activate("atlas_800_a2")


def test_the_stubs_are_built_once_and_rest_stays_out(tmp_path: Path) -> None:
    reason = available()
    if reason:
        pytest.skip(reason)
    wheel = stubs.require_wheel()
    first = stubs.build(wheel)
    made = (first / "libcann_stub.so").stat().st_mtime_ns
    assert stubs.build(wheel) == first
    assert (first / "libcann_stub.so").stat().st_mtime_ns == made
    assert {path.name for path in first.iterdir()} >= {"libhccl.so", "libatb.so", "libascendcl.so"}
    code = "import sys, torch; assert 'torch_npu' not in sys.modules and not hasattr(torch, 'npu')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_torch_beside_the_cached_wheel_still_imports() -> None:
    """A spawned child inherits sys.path; the wheel's backend entry point must not make its torch fail."""
    reason = available()
    if reason:
        pytest.skip(reason)
    folder = stubs.require_wheel().folder
    code = f"import sys; sys.path.append({str(folder)!r}); import torch; assert 'torch_npu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
